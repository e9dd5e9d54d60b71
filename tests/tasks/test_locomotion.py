from __future__ import annotations

import warnings

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.locomotion import REFERENCE_RETURNS, LocomotionTask, is_locomotion, locomotion_id, normalised_score


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hopper", "Hopper-v4"),
        ("halfcheetah-medium-replay-v2", "HalfCheetah-v4"),
        ("walker2d-medium-expert-v0", "Walker2d-v4"),
        ("Hopper-v5", "Hopper-v5"),
        ("Walker2d-v4", "Walker2d-v4"),
    ],
)
def test_names_of_d4rl_and_gymnasium(name: str, expected: str) -> None:
    import gymnasium

    if "Hopper-v4" not in gymnasium.registry:
        expected = expected.replace("v4", "v5")
    assert is_locomotion(name)
    assert locomotion_id(name) == expected


@pytest.mark.parametrize("name", ["hoper", "ant-medium-v2", "sweep-into-v3", ""])
def test_other_names_are_refused(name: str) -> None:
    assert not is_locomotion(name)
    with pytest.raises(InputError, match="unknown environment"):
        LocomotionTask(name)
    with pytest.raises(InputError, match="no reference returns"):
        normalised_score(name, 0.0)


@pytest.mark.parametrize(
    ("name", "score"), [("hopper", 31.348890), ("halfcheetah", 10.311402), ("walker2d", 21.747823)]
)
def test_normalised_score_of_the_reference_returns_and_of_1000(name: str, score: float) -> None:
    assert normalised_score(name, 1000.0) == pytest.approx(score, abs=1e-6)
    low, high = REFERENCE_RETURNS[name]
    assert normalised_score(name, low) == pytest.approx(0.0)
    assert normalised_score(f"{name}-medium-replay-v2", high) == pytest.approx(100.0)
    assert normalised_score(name, (low + high) / 2) == pytest.approx(50.0)


@pytest.mark.parametrize(("name", "width"), [("hopper", 11), ("halfcheetah", 17), ("walker2d", 17)])
def test_episodes_are_reproducible_and_without_success(name: str, width: int, fresh_seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = LocomotionTask(name)
    actions = np.random.default_rng(fresh_seed).uniform(-2, 2, (40, task.action_dim))

    def run() -> tuple[np.ndarray, float, int]:
        observation = task.reset(fresh_seed)
        assert observation.shape == (width,) == (task.state_dim,)
        total = 0.0
        steps = 0
        for action in actions:
            steps += 1
            observation, reward, success, over = task.step(action)
            assert success is False
            assert observation.dtype == np.float32
            total += reward
            assert not task.terminated or over
            if over:
                break
        return observation, total, steps

    first, second = run(), run()
    assert np.array_equal(first[0], second[0])
    assert first[1:] == second[1:]


def test_a_fall_is_a_terminal_state() -> None:
    task = LocomotionTask("hopper")
    task.reset(0)
    over = False
    for _ in range(1000):
        _, _, _, over = task.step([1.0, 1.0, 1.0])
        if over:
            break
    assert over
    assert task.terminated
    task.reset(0)
    assert not task.terminated
