from __future__ import annotations

import numpy as np
import pytest

from llmdpd.tasks.demonstrators import Demonstrators, ScriptedRequest
from llmdpd.tasks.metaworld.environment import make_task
from llmdpd.tasks.metaworld.scripted import run_episode


def request(noise: str, seed: int = 3, **changes: int) -> ScriptedRequest:
    fields = {"max_steps": 500, "post_success_steps": 20, **changes}
    return ScriptedRequest("disassemble-v3", seed, noise_seed=seed + 1, behaviour=noise, **fields)


@pytest.fixture(scope="module")
def task():  # type: ignore[no-untyped-def]
    return make_task("disassemble")


def test_an_episode_ends_its_tail_after_the_first_success(task) -> None:  # type: ignore[no-untyped-def]
    with_tail, without = (run_episode(task, request("clean", post_success_steps=tail)) for tail in (7, 0))
    assert with_tail.success
    assert without.success
    assert len(with_tail.actions) == len(without.actions) + 7
    assert np.array_equal(with_tail.actions[: len(without.actions)], without.actions)
    assert with_tail.observations.shape == (len(with_tail.actions) + 1, 39)
    assert with_tail.rewards.shape == (len(with_tail.actions),)
    assert np.array_equal(with_tail.actions, with_tail.expert_actions)


def test_cut_and_overrun_end_when_they_like(task) -> None:  # type: ignore[no-untyped-def]
    clean, cut, overrun, wander = (run_episode(task, request(kind)) for kind in ("clean", "cut", "overrun", "wander"))
    assert clean.success
    assert len(cut.actions) == len(clean.actions) - 20
    assert 100 <= len(overrun.actions) - len(cut.actions) <= 200
    assert np.array_equal(overrun.actions[: len(cut.actions)], cut.actions)
    assert np.array_equal(overrun.actions, overrun.expert_actions)
    assert 100 <= len(wander.actions) - len(cut.actions) <= 400
    assert np.array_equal(wander.actions[: len(cut.actions)], cut.actions)
    assert wander.success_step == cut.success_step == len(cut.actions) - 1


@pytest.mark.parametrize("kind", ["slow", "pauses", "detour", "jerky"])
def test_other_manners_solve_a_task_too(task, kind: str) -> None:  # type: ignore[no-untyped-def]
    # Fixed seeds: not every episode succeeds, and these took place before.
    clean = [run_episode(task, request("clean", seed)) for seed in range(4)]
    other = [run_episode(task, request(kind, seed)) for seed in range(4)]
    assert sum(episode.success for episode in other) >= 2
    for episode, expert in zip(other, clean, strict=True):
        assert np.array_equal(episode.observations[0], expert.observations[0])
        assert not np.array_equal(episode.actions, episode.expert_actions)


def test_an_episode_without_success_ends_at_the_limit(task) -> None:  # type: ignore[no-untyped-def]
    episode = run_episode(task, request("clean", max_steps=12))
    assert not episode.success
    assert len(episode.actions) == 12


def test_expert_actions_are_those_of_the_visited_states(task) -> None:  # type: ignore[no-untyped-def]
    episode = run_episode(task, request("gaussian", max_steps=25))
    assert not np.array_equal(episode.actions, episode.expert_actions)
    task.reset(3)
    for step, action in enumerate(episode.actions):
        assert np.array_equal(task.expert_action(episode.observations[step]), episode.expert_actions[step])
        assert np.array_equal(task.step(action)[0], episode.observations[step + 1])


def test_the_collector_changes_tasks_and_hides_goals() -> None:
    collector = Demonstrators(goal_visible=False)
    short = {"seed": 1, "noise_seed": 2, "behaviour": "clean", "max_steps": 5, "post_success_steps": 0}
    first = collector.episode(ScriptedRequest("reach-v3", **short))  # type: ignore[arg-type]
    collector.episode(ScriptedRequest("push-v3", **short))  # type: ignore[arg-type]
    again = collector.episode(ScriptedRequest("reach-v3", **short))  # type: ignore[arg-type]
    assert np.array_equal(first.observations, again.observations)
    assert not first.observations[:, 36:39].any()
    shown = run_episode(make_task("reach"), ScriptedRequest("reach-v3", **short))  # type: ignore[arg-type]
    assert np.array_equal(shown.actions, first.actions)
