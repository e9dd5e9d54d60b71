"""Augmentation: what it moves, together, and what it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.nn.features import StateFeatures
from llmdpd.training.augmentation import Augmentation, AugmentationConfig

P, M = 5, 7
POSITIONS = [range(0, 3), range(4, 7), range(11, 14), range(18, 21), range(22, 25), range(29, 32), range(36, 39)]
UNTOUCHED = [i for i in range(39) if not any(i in part for part in POSITIONS)]


def make(rng: np.random.Generator, given: torch.Tensor | None = None, **changes: Any) -> Augmentation:
    return Augmentation(AugmentationConfig(**changes), P, rng, given)


def states(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(-0.5, 1, (P, M, 39)).astype(np.float32))


def test_nothing_by_default(rng: np.random.Generator) -> None:
    change, state, action = make(rng), states(rng), torch.rand(P, M, 4) * 2 - 1
    torch.testing.assert_close(change.states(state), state, atol=1e-6, rtol=0)
    torch.testing.assert_close(change.actions(action), action)
    torch.testing.assert_close(change.example_actions(action), action)
    assert torch.equal(change.times(torch.ones(P, M)), torch.ones(P, M))


def test_offsets_shift_each_thing_alike_in_both_frames(rng: np.random.Generator) -> None:
    state = states(rng)
    moved = make(rng, offset=0.1, offset_probability=1.0).states(state) - state
    torch.testing.assert_close(moved[..., UNTOUCHED], torch.zeros(P, M, len(UNTOUCHED)))
    assert moved[..., :3].abs().max() < 1e-6, "the hand is where it is"
    for now, before in ((4, 22), (11, 29)):
        torch.testing.assert_close(moved[..., now : now + 3], moved[..., before : before + 3], atol=1e-6, rtol=0)
    for part in (moved[..., 4:7], moved[..., 11:14], moved[..., 36:39]):
        torch.testing.assert_close(part, part[:, :1].expand(-1, M, -1), atol=1e-6, rtol=0)
        assert (part[:, 0].abs() > 1e-6).any(1).all()


def test_offsets_have_their_size_and_probability(rng: np.random.Generator) -> None:
    config = AugmentationConfig(offset=0.04, offset_probability=0.7)
    state = torch.full((4000, 1, 39), 0.3)
    moved = (Augmentation(config, 4000, rng).states(state) - state)[:, 0, 4:7]
    shifted = moved.abs().amax(1) > 1e-6
    assert abs(float(shifted.float().mean()) - 0.7) < 6 * (0.7 * 0.3 / 4000) ** 0.5
    assert float(moved[shifted].std()) == pytest.approx(0.04, rel=0.1)


def test_the_grippers_reading_is_stretched_from_open_alike_in_both_frames(rng: np.random.Generator) -> None:
    state = states(rng)
    state[0, 0, [3, 21]] = 1.0
    change = make(rng, gripper=0.3)
    after = change.states(state)
    others = [i for i in range(39) if i not in (3, 21)]
    torch.testing.assert_close(after[..., others], state[..., others], atol=1e-6, rtol=0)
    assert (after[0, 0, [3, 21]] == 1).all(), "open is open"
    closed = torch.zeros(P, M, 39)
    factor = 1 - change.states(closed)[..., [3, 21]]
    torch.testing.assert_close(factor, factor[:, :1, :1].expand(-1, M, 2))
    assert factor.min() >= 0.7
    assert factor.max() <= 1.3
    assert len(factor[:, 0, 0].unique()) == P
    torch.testing.assert_close(1 - after[..., [3, 21]], (1 - state[..., [3, 21]]) * factor)


@pytest.mark.parametrize("changes", [{"turn": 1.0}, {"mirror": 1.0}, {"turn": 1.0, "mirror": 0.5}])
def test_turned_scenes_keep_distances_heights_and_what_actions_do(
    rng: np.random.Generator, changes: dict[str, float]
) -> None:
    change, state = make(rng, **changes), states(rng)
    after = change.states(state)
    for one in range(len(POSITIONS)):
        a, b = list(POSITIONS[one]), list(POSITIONS[one - 1])
        before = (state[..., a] - state[..., b]).norm(dim=-1)
        torch.testing.assert_close((after[..., a] - after[..., b]).norm(dim=-1), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[..., a[2]], state[..., a[2]])
    assert (after[..., :2] - state[..., :2]).abs().amax(-1).amax(1).min() > 1e-4
    # An action moves the hand: the moved hand, turned, is the turned hand, moved by the turned action.
    action = (torch.rand(P, M, 4) * 2 - 1) * 0.5
    stepped = state.clone()
    stepped[..., :3] += 0.1 * action[..., :3]
    expected = after[..., :3] + 0.1 * change.actions(action)[..., :3]
    torch.testing.assert_close(change.states(stepped)[..., :3], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(change.actions(action)[..., 2:], action[..., 2:])


def test_actions_stay_within_their_bounds(rng: np.random.Generator) -> None:
    action = torch.sign(torch.randn(P, M, 4))
    assert make(rng, turn=1.0).actions(action).abs().max() <= 1
    assert make(rng, example_noise=1.0).example_actions(action).abs().max() <= 1


def test_what_an_observation_lacks_stays_absent(rng: np.random.Generator) -> None:
    state = states(rng)
    state[..., 11:14] = state[..., 29:32] = state[..., 36:39] = 0
    after = make(rng, offset=0.1, offset_probability=1.0, turn=1.0, mirror=0.5).states(state)
    for part in (slice(11, 14), slice(29, 32), slice(36, 39)):
        assert (after[..., part] == 0).all()
    features = StateFeatures(39, "relative")
    assert features.geometry(after)[..., 3:12].abs().max() == 0


def test_left_out_examples_are_left_alone(rng: np.random.Generator) -> None:
    given = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]])
    state = states(rng)
    change = make(rng, given, offset=0.1, offset_probability=1.0, turn=1.0, mirror=0.5, gripper=0.3)
    same = (change.states(state) - state).abs().amax((1, 2)) < 1e-6
    assert same.tolist() == [False, True, False, True, False]


def test_an_examples_clock_and_noise(rng: np.random.Generator) -> None:
    change = make(rng, clock_scale=1.0, example_noise=1.0)
    times = torch.arange(1.0, M + 1).expand(P, -1)
    factor = change.times(times) / times
    torch.testing.assert_close(factor, factor[:, :1].expand(-1, M))
    assert factor.min() >= 0.5
    assert factor.max() <= 2
    assert len(factor[:, 0].unique()) == P
    action = torch.zeros(P, M, 4)
    noisy = change.example_actions(action)
    assert (noisy != 0).all()
    assert torch.equal(change.actions(action), action), "the states' own actions are not touched"


def test_the_same_draws_from_the_same_state_of_the_generator(rng: np.random.Generator) -> None:
    config = {"offset": 0.04, "turn": 0.5, "mirror": 0.5, "example_noise": 0.5, "clock_scale": 0.5}
    seed, state = int(rng.integers(1 << 31)), states(rng)
    one, other = (make(np.random.default_rng(seed), **config).states(state) for _ in range(2))
    assert torch.equal(one, other)


def test_without_a_stretch_the_generator_stands_where_it_stood_before_there_was_one(rng: np.random.Generator) -> None:
    seed = int(rng.integers(1 << 31))
    plain, before = np.random.default_rng(seed), np.random.default_rng(seed)
    make(plain, offset=0.04)
    for draw, shape in (("random", 3), ("standard_normal", 9), *[("random", 1)] * 7):
        getattr(before, draw)((P, shape), np.float32)
    assert plain.random() == before.random()
