"""No evaluated episode is a problem that the policy saw in training or was shown as an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.data import TrajectoryDataset
from llmdpd.envs import COLLECTION_SEED_END, EVALUATION_SEED_START, SELECTION_SEED_START
from llmdpd.envs.metaworld import MetaWorldTask, make_task
from llmdpd.experiments.cell import Share
from llmdpd.experiments.plan import Settings, make_plan
from llmdpd.runs.data import example_data, training_data

# Goals of sweep-into and bin-picking are constant, so their problems differ by the start alone.
SEEN, UNSEEN = ("sweep-into-v3", "coffee-push-v3"), ("bin-picking-v3",)
EPISODES = 12
Problem = tuple[float, ...]


def problems(env: MetaWorldTask, seeds: Iterable[int]) -> dict[Problem, int]:
    """Start and goal of each seed's episode, really reset; rounded, so that almost the same counts as the same."""
    found = {}
    for seed in seeds:
        env.reset(int(seed))
        found[tuple(np.round(env.start_and_goal(), 4))] = int(seed)
    return found


def seeds_of(dataset: TrajectoryDataset, task: str) -> list[int]:
    return dataset.seeds[dataset.episodes_of(task)].tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrajectoryDataset, TrajectoryDataset]:
    """What a run of an experiment's grid learns from, and what its examples are taken from."""
    folder = tmp_path_factory.mktemp("integrity")
    options = ("--tasks.seen", *SEEN, "--tasks.unseen", *UNSEEN, "--data.keep-failed")
    settings = Settings("table1", "paper", budget="smoke", out=folder / "out", options=options, variants=False)
    config = make_plan(settings).cells["full"][0].config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(folder / "data"), workers=1))
    return training_data(config)[0], example_data(config)


@pytest.mark.parametrize("task", [*SEEN, *UNSEEN])
def test_no_evaluated_episode_was_seen(task: str, data: tuple[TrajectoryDataset, TrajectoryDataset]) -> None:
    training, examples = data
    env = make_task(task)
    learned = problems(env, seeds_of(training, task)) if task in training.tasks else {}
    shown = problems(env, seeds_of(examples, task))
    evaluated = problems(env, range(EVALUATION_SEED_START, EVALUATION_SEED_START + EPISODES))
    selected = problems(env, range(SELECTION_SEED_START, SELECTION_SEED_START + EPISODES))
    # Every seed is a problem of its own, else sets would hide what they share.
    assert len(evaluated) == len(selected) == EPISODES
    assert len(shown) == len(seeds_of(examples, task)) > 0
    assert (len(learned) > 0) == (task in SEEN)
    groups = {"learned": learned, "shown": shown, "evaluated": evaluated, "selected": selected}
    for name, group in groups.items():
        for other in groups.keys() - {name}:
            assert not group.keys() & groups[other].keys(), f"{name} and {other} share a problem"
    # That the comparison sees a shared problem: one that is evaluated, once more.
    again = problems(env, [EVALUATION_SEED_START + 3])
    assert list(evaluated.keys() & again.keys()) == list(again)


@pytest.mark.parametrize("task", SEEN)
def test_recorded_seeds_are_those_of_the_episodes(task: str, data: tuple[TrajectoryDataset, TrajectoryDataset]) -> None:
    env = make_task(task)
    for dataset in data:
        for episode in dataset.episodes_of(task):
            example = dataset.episode(int(episode))
            assert np.array_equal(env.reset(int(example.seed)), example.observations[0])


def test_seeds_are_apart_by_construction(data: tuple[TrajectoryDataset, TrajectoryDataset]) -> None:
    for dataset in data:
        assert (dataset.seeds >= 0).all()
        assert (dataset.seeds < COLLECTION_SEED_END).all()
    # 500 million episodes fit before the next kind begins.
    assert COLLECTION_SEED_END <= EVALUATION_SEED_START < SELECTION_SEED_START
    assert not set(data[0].seeds.tolist()) & set(data[1].seeds.tolist())


def test_where_the_data_lies(tmp_path: Path) -> None:
    """All runs of an experiment collect into one folder."""
    plan = make_plan(Settings("table1", out=tmp_path / "out", data_root=tmp_path / "data"))
    steps = [cell.next_step(Share(1)) for cell in plan.runnable]
    roots = {step.words[step.words.index("--data.root") + 1] for step in steps if step is not None}
    assert roots == {str(tmp_path / "data")}
