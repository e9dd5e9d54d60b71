"""No evaluated episode is a problem that the policy saw in training or was shown in a demonstration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.data import TrajectoryDataset
from llmdpd.experiments.cell import Share
from llmdpd.experiments.plan import Settings, make_plan
from llmdpd.runs.data import behaviour_demonstrations, demonstrations, training_data
from llmdpd.tasks import COLLECTION_SEED_END, EVALUATION_SEED_START, SELECTION_SEED_START
from llmdpd.tasks.metaworld.environment import MetaWorldTask, make_task
from llmdpd.tasks.metaworld.layout import FRAME

SEEN, UNSEEN = ("sweep-into-v3", "coffee-push-v3"), ("bin-picking-v3", "box-close-v3")
CONSTANT_GOALS = ("sweep-into-v3", "bin-picking-v3")
EPISODES = 12
Part = tuple[float, ...]
Problem = tuple[Part, Part]
Data = tuple[TrajectoryDataset, TrajectoryDataset, TrajectoryDataset]


def problems(env: MetaWorldTask, seeds: Iterable[int]) -> dict[Problem, int]:
    """Start and goal of each seed's episode, really reset; rounded, so that almost the same counts as the same."""
    found = {}
    for seed in seeds:
        start = env.reset(int(seed))[:FRAME]
        numbers = np.round(np.concatenate([start, env.goal()]).astype(np.float64), 4).tolist()
        found[tuple(numbers[:FRAME]), tuple(numbers[FRAME:])] = int(seed)
    return found


def shared_parts(one: Iterable[Problem], other: Iterable[Problem]) -> tuple[set[Part], set[Part]]:
    """The starts, and the goals, that are in both."""
    (starts, goals), (other_starts, other_goals) = (map(set, zip(*group, strict=True)) for group in (one, other))
    return starts & other_starts, goals & other_goals


def seeds_of(dataset: TrajectoryDataset, task: str) -> list[int]:
    return dataset.seeds[dataset.episodes_of(task)].tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """What a run of an experiment learns from, its demonstrations, and those of another demonstrator."""
    folder = tmp_path_factory.mktemp("integrity")
    options = ("--tasks.seen", *SEEN, "--tasks.unseen", *UNSEEN, "--data.keep-failed")
    settings = Settings("table1", "paper", budget="smoke", out=folder / "out", options=options, variants=False)
    config = make_plan(settings).cells["full"][0].config
    data, tasks = dataclasses.replace(config.data, root=str(folder / "data"), workers=1), config.tasks
    learned, _ = training_data(data, tasks)
    others = behaviour_demonstrations(data, tasks, UNSEEN, "overrun", 1, lambda: None)
    return learned, demonstrations(data, tasks), others


@pytest.mark.parametrize("task", [*SEEN, *UNSEEN])
def test_no_evaluated_episode_was_seen(task: str, data: Data) -> None:
    training, shown, others = data
    env = make_task(task)
    groups = {
        "shown": problems(env, seeds_of(shown, task)),
        "evaluated": problems(env, range(EVALUATION_SEED_START, EVALUATION_SEED_START + EPISODES)),
        "selected": problems(env, range(SELECTION_SEED_START, SELECTION_SEED_START + EPISODES)),
    }
    assert (task in training.tasks) == (task in SEEN)
    if task in SEEN:
        groups["learned"] = problems(env, seeds_of(training, task))
        assert groups["learned"]
    # Every seed is a problem of its own, else sets would hide what they share.
    assert len(groups["evaluated"]) == len(groups["selected"]) == EPISODES
    assert len(groups["shown"]) == len(seeds_of(shown, task)) > 0
    for name, group in groups.items():
        for other in groups.keys() - {name}:
            starts, goals = shared_parts(group, groups[other])
            assert not starts, f"{name} and {other} share a start"
            assert bool(goals) == (task in CONSTANT_GOALS), f"goals of {name} and {other}"
    if task in UNSEEN:  # another demonstrator's are of the same problems as the run's own
        by_another = problems(env, seeds_of(others, task))
        assert by_another
        assert by_another.keys() <= groups["shown"].keys()
    # That the comparison sees what is shared: a problem that is evaluated, once more.
    again = problems(env, [EVALUATION_SEED_START + 3])
    assert shared_parts(groups["evaluated"], again) == tuple({part} for part in next(iter(again)))


@pytest.mark.parametrize("task", SEEN)
def test_recorded_seeds_are_those_of_the_episodes(task: str, data: Data) -> None:
    env = make_task(task)
    for dataset in data[:2]:
        for episode in dataset.episodes_of(task):
            example = dataset.episode(int(episode))
            assert np.array_equal(env.reset(int(example.seed)), example.observations[0])


def test_seeds_are_apart_by_construction(data: Data) -> None:
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
