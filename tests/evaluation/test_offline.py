"""Judging policies on recorded episodes: what is held out, what is measured, under which prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data import EpisodeRecord, Trajectory, TrajectoryDataset, join_episodes
from llmdpd.errors import InputError
from llmdpd.evaluation.offline import hold_out, offline_results, offline_selection, prompt_variants, score_offline
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.layout import Layout, Point

S, A = 5, 3
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8)
LOW, HIGH = (-2.0, 0.0, -10.0), (2.0, 1.0, 30.0)
METADATA = {
    **{"trained_on": ["pour", "wipe"], "protocol": "mine", "goal_visible": None, "seed": 4},
    **{"training_data": "logs", "iterations": 7},
}


def recorded(rng: np.random.Generator, task: str, count: int) -> list[EpisodeRecord]:
    return [
        EpisodeRecord(rng.normal(size=(n + 1, S)), rng.uniform(LOW, HIGH, (n, A)), rng.normal(size=n), task)
        for n in rng.integers(2, 9, count)
    ]


@pytest.fixture
def logs(rng: np.random.Generator) -> TrajectoryDataset:
    return join_episodes(
        [record for task, count in (("pour", 25), ("wipe", 3)) for record in recorded(rng, task, count)]
    )


def make_policy(**context: Any) -> Policy:
    reads = ContextConfig("retrieval", text=False, encoder=ENCODER, trajectory_dim=4, **context)
    network = DiffusionPolicy(Spaces(S, A, 0, None, LOW, HIGH), DiffusionNetworkConfig(hidden_dim=16, context=reads))
    return Policy("llmdpd", network, None, BestOfN(samples=1), metadata=METADATA)


def prompts_of(**episodes: Trajectory) -> dict[str, TaskPrompt]:
    return {task: TaskPrompt(None, "none", (episode,), "logs") for task, episode in episodes.items()}


def same(a: Trajectory, b: Trajectory) -> bool:
    return a.observations.shape == b.observations.shape and bool((a.observations == b.observations).all())


def test_a_tenth_of_each_task_is_held_out_and_never_learned_from(logs: TrajectoryDataset) -> None:
    split = hold_out(logs, None, ("pour", "wipe"), seed=3)
    assert {task: len(episodes) for task, episodes in split.held_out.items()} == {"pour": 2, "wipe": 1}
    assert split.learned.num_episodes == 25
    learned = [split.learned.episode(e) for e in range(25)]
    assert not any(same(one, other) for held in split.held_out.values() for one in held for other in learned)
    again, other = hold_out(logs, None, (), seed=3), [hold_out(logs, None, (), seed=s) for s in range(8)]
    assert all(same(a, b) for a, b in zip(split.held_out["pour"], again.held_out["pour"], strict=True))
    assert not all(same(split.held_out["pour"][0], one.held_out["pour"][0]) for one in other)


def test_of_an_unseen_task_all_but_the_demonstration_is_held_out(
    logs: TrajectoryDataset, rng: np.random.Generator
) -> None:
    others = join_episodes([*recorded(rng, "stir", 4), *recorded(rng, "rinse", 1), *recorded(rng, "pour", 2)])
    split = hold_out(logs, others, ("pour", "wipe", "stir", "rinse"), seed=0)
    assert split.demonstrations is not None
    assert set(split.held_out) == {"pour", "wipe", "stir"}, "of rinse the one episode is its demonstration"
    assert len(split.held_out["stir"]) == 3
    shown = [split.demonstrations.episode(int(e)) for e in split.demonstrations.episodes_of("stir")]
    assert len(shown) == 1
    assert not any(same(shown[0], one) for one in split.held_out["stir"])
    assert len(split.demonstrations.episodes_of("pour")) == 23, "those of seen tasks are what is learned from"


def test_of_a_task_that_another_one_shows_every_episode_is_held_out(rng: np.random.Generator) -> None:
    learned = join_episodes([*recorded(rng, "finish-push", 5), *recorded(rng, "wait-push", 5)])
    tasks = ("finish-soccer", "wait-soccer", "wait-sweep-into")
    others = join_episodes(
        [record for task in (*tasks, "finish-sweep-into", "finish-push") for record in recorded(rng, task, 3)]
    )
    split = hold_out(learned, others, ("finish-push", "wait-push", *tasks), seed=0)
    assert split.demonstrations is not None
    counts = {"finish-soccer": 2, "wait-soccer": 3, "wait-sweep-into": 3, "finish-push": 1, "wait-push": 1}
    assert {task: len(episodes) for task, episodes in split.held_out.items()} == counts
    shown = split.demonstrations
    assert {task: len(shown.episodes_of(task)) for task in shown.tasks} == {
        **{"finish-push": 4, "wait-push": 4, "finish-soccer": 1, "finish-sweep-into": 1},
    }


def test_failed_episodes_of_an_unseen_task_are_not_held_out(logs: TrajectoryDataset, rng: np.random.Generator) -> None:
    outcomes = (0, 1, -1, 0, 1)
    stir = zip(recorded(rng, "stir", 5), outcomes, strict=True)
    others = join_episodes([dataclasses.replace(each, success=outcome) for each, outcome in stir])
    for keep_failed, count in ((False, 2), (True, 4)):
        held = hold_out(logs, others, ("pour", "wipe", "stir"), seed=0, keep_failed=keep_failed).held_out["stir"]
        assert len(held) == count
        assert (0 in [episode.success for episode in held]) == keep_failed


def test_a_task_with_one_episode_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="no episode to spare") as error:
        hold_out(join_episodes([*recorded(rng, "pour", 3), *recorded(rng, "wipe", 1)]), None, (), 0)
    assert error.value.field == "wipe"


def test_a_policy_that_remembers_the_step_before_is_judged_likewise(logs: TrajectoryDataset) -> None:
    layout, remembered = Layout((Point("hand", (0, 1)), Point("cup", (2, 3))), move=(0, 1)).completed(S)
    network = DiffusionPolicy(
        Spaces(S + 4, A, 0, layout, LOW, HIGH, remembered=remembered),
        DiffusionNetworkConfig(hidden_dim=16, context=ContextConfig(text=False, features="relative", encoder=ENCODER)),
    )
    policy = Policy("llmdpd", network, None, BestOfN(samples=1), metadata=METADATA)
    scores = score_offline(policy, prompts_of(pour=logs.episode(3)), {"pour": [logs.episode(0)]})
    assert np.isfinite(scores["pour"].diffusion_loss)
    assert scores["pour"].steps == len(logs.episode(0))


def test_errors_are_those_of_the_actions_that_the_policy_names(logs: TrajectoryDataset) -> None:
    """Against the policy itself, whose every action is the same: 0.5 in the networks' numbers."""
    policy = make_policy()

    def constant(states: Any, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(states.observations), 1, A), 0.5)

    policy.network.sample = constant  # type: ignore[method-assign]
    policy.network.freeze = lambda *_: None  # type: ignore[method-assign,assignment]
    episodes = {"pour": [logs.episode(0), logs.episode(1)], "wipe": [logs.episode(26)]}
    scores = score_offline(policy, prompts_of(pour=logs.episode(3), wipe=logs.episode(27)), episodes)
    low, high = np.array(LOW), np.array(HIGH)
    named = low + 0.75 * (high - low)
    for task, score in scores.items():
        actions = np.concatenate([episode.actions for episode in episodes[task]])
        assert score.steps == len(actions)
        np.testing.assert_allclose(score.action_errors, np.abs(actions - named).mean(0), rtol=1e-4)
        share = (np.abs(actions - named) / (high - low)).mean()
        assert score.action_error == pytest.approx(share, rel=1e-4)
    values, score_of = offline_selection(scores)
    assert score_of == -values["eval/seen_action_error"] < 0


def test_the_diffusion_loss_is_at_fixed_noise(logs: TrajectoryDataset) -> None:
    policy, other = make_policy(), make_policy()
    prompts, episodes = prompts_of(pour=logs.episode(3)), {"pour": [logs.episode(0), logs.episode(1)]}
    first, again = (score_offline(policy, prompts, episodes)["pour"].diffusion_loss for _ in range(2))
    assert first == again
    assert first is not None
    assert first > 0
    assert score_offline(other, prompts, episodes)["pour"].diffusion_loss != first
    with torch.no_grad():
        for parameter in policy.network.net.layers[-1].parameters():
            parameter.zero_()
    flat = score_offline(policy, prompts, episodes)["pour"].diffusion_loss
    assert flat == pytest.approx(1.0, abs=0.5), "noise of variance 1, predicted as 0"


@pytest.mark.parametrize(("dropout", "kinds"), [(0.0, ["own", "swapped"]), (0.1, ["own", "swapped", "no prompts"])])
def test_prompts_are_those_of_the_task_of_another_and_none(
    logs: TrajectoryDataset, dropout: float, kinds: list[str]
) -> None:
    policy = make_policy(trajectory_dropout=dropout)
    prompts = prompts_of(pour=logs.episode(3), wipe=logs.episode(27), stir=logs.episode(4))
    episodes = {task: [logs.episode(0)] for task in prompts}
    records = offline_results({"last": policy, "best": policy}, prompts, episodes)
    found = [(r.prompts.kind, r.task, r.split) for r in records if r.checkpoint == "last"]
    # The policy reads no text, so that its own prompts are a demonstration alone.
    own = "demonstration alone"
    wanted = [own if kind == "own" else f"swapped, {own}" if kind == "swapped" else kind for kind in kinds]
    assert list(dict.fromkeys(kind for kind, _, _ in found)) == wanted
    assert {task for kind, task, _ in found if kind.startswith("swapped")} == {"pour", "wipe"}, "stir is alone unseen"
    assert {split for _, task, split in found if task == "stir"} == {"unseen"}
    assert len(records) == 2 * len(found), "best is the checkpoint of the same iteration"
    assert all(not record.rolled_out and record.episodes == 1 for record in records)
    assert records[0] == type(records[0]).from_json(records[0].to_json())


def test_a_policy_without_prompts_has_one_variant(logs: TrajectoryDataset) -> None:
    network = DiffusionPolicy(
        Spaces(S, A, 0), DiffusionNetworkConfig(context=ContextConfig(text=False, trajectory=False))
    )
    policy = Policy("llmdpd", network, None, BestOfN(samples=1), metadata=METADATA)
    prompts = prompts_of(pour=logs.episode(3), wipe=logs.episode(27))
    assert prompt_variants(prompts, ["pour", "wipe"], policy) == [prompts]


def test_a_result_holds_one_kind_of_measure(make_result: Callable[..., Any]) -> None:
    record = make_result()
    with pytest.raises(InputError, match="successes, returns or both, or the error") as error:
        dataclasses.replace(record, action_error=0.1)
    assert error.value.found == "successes and action_error"
