"""The noise oracle: known answers, keys and counters, moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmdpd.diffusion import philox_normal
from llmdpd.ops.philox import philox4x32

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    return tuple(int(w) for w in philox4x32((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1]))))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert words(counter, key) == expected


def test_counter_is_row_draw_block_stream(rng: np.random.Generator) -> None:
    """One number of each of the four outputs, from the words of its counter, by hand."""
    seed = int(rng.integers(2**63))
    draws = philox_normal(seed, batch=3, samples=5, draws=4, action_dim=6)
    b, n, d = 2, 3, 1
    for dim in range(6):
        w = words((b * 5 + n, d, dim // 4, 0), (seed & 0xFFFFFFFF, seed >> 32))
        even, odd = w[2 * (dim % 4 // 2)], w[2 * (dim % 4 // 2) + 1]
        radius = math.sqrt(-2 * math.log(((even >> 8) + 1) / 2**24))
        angle = 2 * math.pi * (odd >> 8) / 2**24
        expected = radius * (math.sin(angle) if dim % 2 else math.cos(angle))
        assert float(draws[d, b, n, dim]) == pytest.approx(expected, abs=1e-12)


def test_a_states_noise_hangs_on_its_seed_alone(rng: np.random.Generator) -> None:
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, 7))
    whole = philox_normal(seeds, 7, 3, 4, 5)
    assert torch.equal(philox_normal(seeds[4:6], 2, 3, 4, 5), whole[:, 4:6])
    assert torch.equal(philox_normal(seeds[[6]], 1, 1, 4, 5)[:, 0], whole[:, 6, :1])
    assert torch.equal(philox_normal(int(seeds[2]), 1, 3, 4, 5)[:, 0], whole[:, 2])


def test_one_key_for_all_states_has_no_dimension() -> None:
    """A length of one is that of a batch of one, and no shared key for others."""
    assert torch.equal(philox_normal(torch.tensor(-9), 4, 2, 3, 5), philox_normal(-9, 4, 2, 3, 5))
    for wrong in (torch.zeros(1), torch.zeros(3), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match="of 4 states"):
            philox_normal(wrong.long(), 4, 2, 3, 5)


def test_more_draws_and_dims_extend_and_never_change() -> None:
    small, large = philox_normal(11, 2, 2, 3, 2), philox_normal(11, 2, 2, 6, 9)
    assert torch.equal(small, large[:3, ..., :2])


@pytest.mark.parametrize(("one", "other"), [(-1, 2**64 - 1), (5, 5 + 2**64), (-(2**63), 2**63)])
def test_any_integer_is_a_key_modulo_two_to_the_64(one: int, other: int) -> None:
    assert torch.equal(philox_normal(one, 2, 1, 2, 3), philox_normal(other, 2, 1, 2, 3))


def test_both_words_of_the_seed_count() -> None:
    base = philox_normal(1, 2, 1, 2, 3)
    assert not torch.equal(base, philox_normal(2, 2, 1, 2, 3))
    assert not torch.equal(base, philox_normal(1 + 2**32, 2, 1, 2, 3))


def test_numpy_integers_are_seeds() -> None:
    assert torch.equal(philox_normal(np.int64(-7), 2, 1, 2, 3), philox_normal(-7, 2, 1, 2, 3))  # type: ignore[arg-type]


def test_empty_batch() -> None:
    assert philox_normal(3, 0, 4, 6, 5).shape == (6, 0, 4, 5)
    assert philox_normal(torch.zeros(0, dtype=torch.int64), 0, 4, 6, 5).shape == (6, 0, 4, 5)


def test_standard_normal_and_uncorrelated(rng: np.random.Generator) -> None:
    sample = philox_normal(int(rng.integers(2**62)), 8000, 2, 3, 4).permute(1, 2, 0, 3).reshape(-1, 12).numpy()
    count = len(sample)
    assert np.abs(sample.mean(0)).max() < 6 / np.sqrt(count)  # six standard errors
    assert np.abs(sample.T @ sample / count - np.eye(12)).max() < 6 * np.sqrt(2 / count)
    assert abs((sample**4).mean() - 3) < 6 * np.sqrt(96 / sample.size)
