"""Augmentation: what it moves, together, and what it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.data.augmentation import Augmentation, AugmentationConfig
from llmdpd.nn.features import StateFeatures
from llmdpd.tasks.metaworld.layout import LAYOUT

P, M = 5, 7
POSITIONS = [range(0, 3), range(4, 7), range(11, 14), range(18, 21), range(22, 25), range(29, 32), range(36, 39)]
UNTOUCHED = [i for i in range(39) if not any(i in part for part in POSITIONS)]


def make(rng: np.random.Generator, given: torch.Tensor | None = None, **changes: Any) -> Augmentation:
    return Augmentation(AugmentationConfig(**changes), LAYOUT, P, rng, given)


def states(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(-0.5, 1, (P, M, 39)).astype(np.float32))


def test_nothing_by_default(rng: np.random.Generator) -> None:
    change, state, action = make(rng), states(rng), torch.rand(P, M, 4) * 2 - 1
    torch.testing.assert_close(change.states(state), state, atol=1e-6, rtol=0)
    torch.testing.assert_close(change.actions(action), action)
    torch.testing.assert_close(change.demonstration_actions(action), action)
    assert AugmentationConfig(offset_probability=1.0).active is False


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
    moved = (Augmentation(config, LAYOUT, 4000, rng).states(state) - state)[:, 0, 4:7]
    shifted = moved.abs().amax(1) > 1e-6
    assert abs(float(shifted.float().mean()) - 0.7) < 6 * (0.7 * 0.3 / 4000) ** 0.5
    assert float(moved[shifted].std()) == pytest.approx(0.04, rel=0.1)


@pytest.mark.parametrize("changes", [{"rotate": 1.0}, {"mirror": 1.0}, {"rotate": 1.0, "mirror": 0.5}])
def test_rotated_scenes_keep_distances_heights_and_what_actions_do(
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
    # An action moves the hand: the moved hand, rotated, is the rotated hand, moved by the rotated action.
    action = (torch.rand(P, M, 4) * 2 - 1) * 0.5
    stepped = state.clone()
    stepped[..., :3] += 0.1 * action[..., :3]
    expected = after[..., :3] + 0.1 * change.actions(action)[..., :3]
    torch.testing.assert_close(change.states(stepped)[..., :3], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(change.actions(action)[..., 2:], action[..., 2:])


def test_actions_stay_within_their_bounds(rng: np.random.Generator) -> None:
    action = torch.sign(torch.randn(P, M, 4))
    change = make(rng, rotate=1.0)
    for moved in (change.actions(action), change.demonstration_actions(action)):
        assert moved.abs().max() <= 1


def test_what_an_observation_lacks_stays_absent(rng: np.random.Generator) -> None:
    state = states(rng)
    state[..., 11:14] = state[..., 29:32] = state[..., 36:39] = 0
    after = make(rng, offset=0.1, offset_probability=1.0, rotate=1.0, mirror=0.5).states(state)
    for part in (slice(11, 14), slice(29, 32), slice(36, 39)):
        assert (after[..., part] == 0).all()
    features = StateFeatures(39, "relative", LAYOUT)
    assert features.geometry(after)[..., 3:12].abs().max() == 0


def test_nothing_changes_where_the_demonstration_is_left_out(rng: np.random.Generator) -> None:
    given = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]])
    state = states(rng)
    change = make(rng, given, offset=0.1, offset_probability=1.0, rotate=1.0, mirror=0.5)
    same = (change.states(state) - state).abs().amax((1, 2)) < 1e-6
    assert same.tolist() == [False, True, False, True, False]


def test_the_same_samples_from_the_same_state_of_the_generator(rng: np.random.Generator) -> None:
    seed, state = int(rng.integers(1 << 31)), states(rng)
    one, other = (
        make(np.random.default_rng(seed), offset=0.04, rotate=0.5, mirror=0.5).states(state) for _ in range(2)
    )
    assert torch.equal(one, other)


def test_the_changes_of_some_prompts_are_theirs_among_all(fresh_seed: int, rng: np.random.Generator) -> None:
    config, own = AugmentationConfig(offset=0.04, rotate=0.5, mirror=0.5), np.array([3, 0])
    whole, part = (
        Augmentation(config, LAYOUT, P, np.random.default_rng(fresh_seed), shown=(M, 4), own=kept)
        for kept in (None, own)
    )
    state, action = states(rng), torch.from_numpy(rng.uniform(-1, 1, (P, M, 4)).astype(np.float32))
    assert torch.equal(part.states(state[own]), whole.states(state)[own])
    assert torch.equal(part.actions(action[own]), whole.actions(action)[own])


def test_the_generator_advances_as_it_did_in_version_0_1(rng: np.random.Generator) -> None:
    """A run that goes on with a newer version, or is repeated with it, has the same batches."""
    seed = int(rng.integers(1 << 31))
    now, before = np.random.default_rng(seed), np.random.default_rng(seed)
    Augmentation(AugmentationConfig(offset=0.04), LAYOUT, P, now, shown=(M, 4))
    for kind, shape in (("random", 3), ("standard_normal", 9), *[("random", 1)] * 7, ("standard_normal", 4 * M)):
        getattr(before, kind)((P, shape), np.float32)
    assert now.random() == before.random()
