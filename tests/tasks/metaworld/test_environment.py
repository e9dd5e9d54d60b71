from __future__ import annotations

import warnings

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.metaworld.environment import MetaWorldTask, make_task

# One whose goal is constant, one that moves bodies of the model at reset, one with a second object.
TASKS = ("sweep-into", "disassemble", "box-close")


def rollout(task: MetaWorldTask, seed: int, steps: int = 30) -> np.ndarray:
    """Everything that comes out of an episode under actions fixed by the seed, as one array."""
    rng = np.random.default_rng(seed)
    rows = [np.append(task.reset(seed), [0.0, 0.0])]
    for _ in range(steps):
        observation, reward, success, _ = task.step(rng.uniform(-1, 1, 4))
        rows.append(np.concatenate([observation, [reward, success]]))
    return np.stack(rows)


@pytest.fixture(scope="module")
def used() -> dict[str, MetaWorldTask]:
    tasks = {name: make_task(name) for name in TASKS}
    for task in tasks.values():
        rollout(task, 99)
    return tasks


@pytest.mark.parametrize("name", TASKS)
def test_rollouts_are_bit_identical_on_fresh_and_used_environments(
    name: str, used: dict[str, MetaWorldTask], fresh_seed: int
) -> None:
    first = rollout(used[name], fresh_seed)
    other = rollout(used[name], fresh_seed + 1)
    assert np.array_equal(first, rollout(used[name], fresh_seed))
    assert np.array_equal(first, rollout(make_task(name), fresh_seed))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("name", TASKS)
def test_a_visible_goal_is_the_true_one_and_experts_succeed(name: str, used: dict[str, MetaWorldTask]) -> None:
    task = used[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wins = 0
        for seed in range(3):
            observation = task.reset(seed)
            goal = task.goal()
            won = over = False
            while not (won or over):
                np.testing.assert_allclose(observation[36:39], goal, atol=1e-6)
                action = task.expert_action(observation)
                assert action.dtype == np.float32
                assert np.abs(action).max() <= 1
                observation, reward, won, over = task.step(action)
                assert observation.dtype == np.float32
                assert 0 <= reward <= 10
            wins += won
    assert wins >= 2


def test_a_hidden_goal_stays_hidden_and_the_expert_still_knows_it(used: dict[str, MetaWorldTask]) -> None:
    hidden, shown = make_task("disassemble", goal_visible=False), used["disassemble"]
    a, b = hidden.reset(4), shown.reset(4)
    won = over = False
    while not (won or over):
        assert not a[36:39].any()
        assert b[36:39].any()
        assert np.array_equal(a[:36], b[:36])
        action = hidden.expert_action(a)
        assert np.array_equal(action, shown.expert_action(b))
        a, _, won, over = hidden.step(action)
        b, *_ = shown.step(action)
    assert won


def test_the_goal_tells_episodes_apart(used: dict[str, MetaWorldTask]) -> None:
    task = used["box-close"]
    task.reset(1)
    first = task.goal().copy()
    task.step(np.ones(4))
    assert np.array_equal(first, task.goal())
    task.reset(2)
    assert not np.array_equal(first, task.goal())
    task.reset(1)
    assert np.array_equal(first, task.goal())
    assert first.shape == (3,)


def test_actions_are_clipped(used: dict[str, MetaWorldTask]) -> None:
    task = used["box-close"]
    action = np.array([3.0, -7.0, 0.5, 9.0])
    task.reset(5)
    wild = task.step(action)[0]
    task.reset(5)
    assert np.array_equal(wild, task.step(np.clip(action, -1, 1))[0])


def test_the_time_limit_ends_an_episode_and_needs_a_reset(used: dict[str, MetaWorldTask]) -> None:
    task = used["box-close"]
    task.reset(6)
    flags = [task.step(np.zeros(4))[3] for _ in range(task.max_steps)]
    assert flags == [False] * 499 + [True]
    with pytest.raises(RuntimeError, match="the episode is over"):
        task.step(np.zeros(4))
    task.reset(6)
    task.step(np.zeros(4))


def test_calls_before_reset_and_unknown_tasks_are_refused() -> None:
    task = make_task("reach")
    with pytest.raises(RuntimeError, match="reset"):
        task.step(np.zeros(4))
    with pytest.raises(InputError, match="reech"):
        make_task("reech")
