from __future__ import annotations

import numpy as np
import pytest

from llmdpd.envs.metaworld import make_task
from llmdpd.envs.scripted import NOISE_KINDS, ActionNoise, ScriptedExpert, ScriptedRequest, run_episode


def noises(kind: str, seed: int, count: int) -> list[ActionNoise]:
    return [ActionNoise(kind, np.random.default_rng([seed, n])) for n in range(count)]


@pytest.mark.parametrize("kind", sorted(NOISE_KINDS))
def test_actions_stay_in_bounds_and_repeat_for_a_seed(kind: str, fresh_seed: int) -> None:
    expert = np.array([0.9, -1.0, 0.1, 1.0], np.float32)
    first, second = (ActionNoise(kind, np.random.default_rng(fresh_seed)) for _ in range(2))
    for _ in range(200):
        action = first(expert)
        assert action.dtype == np.float32
        assert np.abs(action).max() <= 1
        assert np.array_equal(action, second(expert))
    assert first.level == second.level


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("clean", 0, 0), ("gaussian", 0.1, 0.5), ("bursts", 0.1, 0.4), ("random", 0.8, 1.0)]
)
def test_levels_fill_their_range(kind: str, low: float, high: float, fresh_seed: int) -> None:
    levels = [noise.level for noise in noises(kind, fresh_seed, 200)]
    assert low <= min(levels) <= max(levels) <= high
    assert max(levels) - min(levels) >= 0.8 * (high - low)


def test_clean_is_the_expert() -> None:
    expert = np.array([0.3, -0.2, 0.7, -1.0], np.float32)
    (noise,) = noises("clean", 0, 1)
    assert np.array_equal(noise(expert), expert)


def test_gaussian_noise_has_the_recorded_sigma(fresh_seed: int) -> None:
    for noise in noises("gaussian", fresh_seed, 3):
        # sigma <= 0.5 around 0: clipping at 2 sigma or more takes little.
        drawn = np.stack([noise(np.zeros(4, np.float32)) for _ in range(4000)])
        inside = np.quantile(np.abs(drawn), 0.5) / 0.6745  # the median is untouched by clipping
        assert inside == pytest.approx(noise.level, rel=0.06)


@pytest.mark.parametrize("kind", ["bursts", "random"])
def test_the_level_is_the_share_of_steps_without_the_expert(kind: str, fresh_seed: int) -> None:
    expert = np.zeros(4, np.float32)
    for noise in noises(kind, fresh_seed, 3):
        other = np.array([noise(expert).any() for _ in range(20_000)])
        assert other.mean() == pytest.approx(noise.level, abs=0.04)


def test_bursts_hold_one_action(fresh_seed: int) -> None:
    (noise,) = noises("bursts", fresh_seed, 1)
    drawn = np.stack([noise(np.zeros(4, np.float32)) for _ in range(3000)])
    changes = np.flatnonzero((np.diff(drawn, axis=0) != 0).any(1)) + 1
    runs = [part for part in np.split(drawn, changes)[1:-1] if part.any()]
    assert len(runs) > 5
    assert all(5 <= len(run) <= 15 for run in runs)


def request(noise: str, seed: int = 3, **changes: int) -> ScriptedRequest:
    fields = {"max_steps": 500, "tail": 20, **changes}
    return ScriptedRequest("disassemble-v3", seed, noise_seed=seed + 1, noise=noise, **fields)


@pytest.fixture(scope="module")
def task():  # type: ignore[no-untyped-def]
    return make_task("disassemble")


def test_an_episode_ends_its_tail_after_the_first_success(task) -> None:  # type: ignore[no-untyped-def]
    with_tail, without = (run_episode(task, request("clean", tail=tail)) for tail in (7, 0))
    assert with_tail.success
    assert without.success
    assert len(with_tail.actions) == len(without.actions) + 7
    assert np.array_equal(with_tail.actions[: len(without.actions)], without.actions)
    assert with_tail.observations.shape == (len(with_tail.actions) + 1, 39)
    assert with_tail.rewards.shape == (len(with_tail.actions),)
    assert np.array_equal(with_tail.actions, with_tail.expert_actions)


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
    collector = ScriptedExpert(goal_visible=False)
    short = {"seed": 1, "noise_seed": 2, "noise": "clean", "max_steps": 5, "tail": 0}
    first = collector.episode(ScriptedRequest("reach-v3", **short))  # type: ignore[arg-type]
    collector.episode(ScriptedRequest("push-v3", **short))  # type: ignore[arg-type]
    again = collector.episode(ScriptedRequest("reach-v3", **short))  # type: ignore[arg-type]
    assert np.array_equal(first.observations, again.observations)
    assert not first.observations[:, 36:39].any()
    shown = run_episode(make_task("reach"), ScriptedRequest("reach-v3", **short))  # type: ignore[arg-type]
    assert np.array_equal(shown.actions, first.actions)
