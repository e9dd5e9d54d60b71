"""The trajectory prompt: which steps are kept, and padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, choose_steps, make_tokens
from llmdpd.prompts.useful_part import Recorded

SMALL = TrajectoryEncoderConfig(layers=2, heads=2, width=16, inner=24, dropout=0.3, steps=12)

Pair = tuple[np.ndarray, np.ndarray]


def pair(rng: np.random.Generator, length: int, S: int = 5, A: int = 3) -> Pair:
    return rng.normal(size=(length, S)).astype(np.float32), rng.normal(size=(length, A)).astype(np.float32)


def test_default_sizes_are_mtdiffs() -> None:
    config = TrajectoryEncoderConfig()
    assert (config.layers, config.heads, config.width, config.inner, config.dropout) == (4, 2, 256, 1024, 0.1)


@pytest.mark.parametrize("length", [13, 40, 500])
def test_even_goes_from_first_to_last(length: int) -> None:
    index = choose_steps(length, SMALL)
    assert len(index) == 12
    assert (index[0], index[-1]) == (0, length - 1)
    gaps = np.diff(index)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("length", "last_start"), [(13, 1), (100, 88), (500, 149)])
def test_window_is_consecutive_and_starts_below_150(rng: np.random.Generator, length: int, last_start: int) -> None:
    config = dataclasses.replace(SMALL, sampling="window")
    assert choose_steps(length, config).tolist() == list(range(12))
    starts = set()
    for _ in range(3000):
        index = choose_steps(length, config, rng)
        assert index.tolist() == list(range(index[0], index[0] + 12))
        starts.add(int(index[0]))
    assert min(starts) == 0
    assert max(starts) == last_start


def test_tokens_hold_the_chosen_steps(rng: np.random.Generator) -> None:
    short, long = pair(rng, 4), pair(rng, 30)
    tokens = make_tokens([short, long], SMALL)
    assert tokens.states.shape == (2, 12, 5)
    assert tokens.actions.shape == (2, 12, 3)
    assert tokens.padded is True
    assert tokens.mask.tolist() == [[True] * 4 + [False] * 8, [True] * 12]
    index = choose_steps(30, SMALL)
    assert np.array_equal(tokens.states[0, :4], short[0])
    assert np.array_equal(tokens.actions[0, :4], short[1])
    assert np.array_equal(tokens.states[1], long[0][index])
    assert np.array_equal(tokens.actions[1], long[1][index])
    np.testing.assert_allclose(tokens.phase[0, :4], [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(tokens.phase[1], index / 29, rtol=1e-6)
    assert make_tokens([long, long], SMALL).padded is False
    assert tokens.returns is None
    assert make_tokens([pair(rng, 1)], SMALL).phase.tolist() == [[0.0]]


def test_tokens_hold_the_returns_from_each_step_on(rng: np.random.Generator) -> None:
    rewards = [rng.normal(size=length).astype(np.float32) for length in (4, 30)]
    tokens = make_tokens([Recorded(*pair(rng, len(earned)), earned) for earned in rewards], SMALL, returns=True)
    assert tokens.returns is not None
    for row, earned in enumerate(rewards):
        index = choose_steps(len(earned), SMALL)
        expected = [earned[step:].sum() for step in index]
        np.testing.assert_allclose(tokens.returns[row, : len(index)], expected, rtol=0, atol=1e-4)
        assert not tokens.returns[row, len(index) :].any()
    with pytest.raises(InputError, match="do not fit together"):
        make_tokens([Recorded(*pair(rng, 4), rewards[1])], SMALL)
    with pytest.raises(InputError, match="NaN or Inf"):
        make_tokens([Recorded(*pair(rng, 4), np.full(4, np.nan, np.float32))], SMALL)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda s, a: (s[:-1], a), "do not fit together"),
        (lambda s, a: (s[0], a[0]), "do not fit together"),
        (lambda s, a: (s[:0], a[:0]), "empty"),
        (lambda s, a: (np.where(np.arange(5) == 2, np.nan, s), a), "NaN or Inf"),
        (lambda s, a: (s, np.where(np.arange(3) == 2, np.inf, a)), "NaN or Inf"),
    ],
)
def test_bad_arrays(rng: np.random.Generator, spoil: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as error:
        make_tokens([pair(rng, 6), spoil(*pair(rng, 6))], SMALL)
    assert error.value.field == "trajectory"


@pytest.mark.parametrize("sampling", ["even", "window", "last", "all"])
def test_short_and_long_episodes(sampling: Any) -> None:
    config = dataclasses.replace(SMALL, sampling=sampling)
    for length in (1, 2, 11, 12):
        assert choose_steps(length, config, np.random.default_rng(0)).tolist() == list(range(length))
    with pytest.raises(InputError, match="empty"):
        choose_steps(0, config)
    if sampling == "last":
        assert choose_steps(30, config).tolist() == list(range(18, 30))
    if sampling == "all":
        with pytest.raises(InputError, match=r"(?s)longer than the encoder's limit.*13.*12.*even"):
            choose_steps(13, config)


def test_demonstrations_of_a_prompt_in_one_row(rng: np.random.Generator) -> None:
    pairs = [pair(rng, length) for length in (4, 30, 7, 2)]
    alone = make_tokens(pairs, SMALL)
    tokens = make_tokens(pairs, SMALL, counts=(3, 1))
    assert tokens.counts == (3, 1)
    rows = tokens.together()
    assert rows.padded is True
    assert rows.states.shape == (2, 36, 5)
    assert rows.ends is not None
    for place, (row, start) in enumerate([(0, 0), (0, 12), (0, 24), (1, 0)]):
        part = slice(start, start + 12)
        for name in ("states", "actions", "phase", "times", "mask"):
            assert np.array_equal(getattr(rows, name)[row, part], getattr(alone, name)[place]), name
        assert set(rows.ends[row, part].tolist()) == {start + min(len(pairs[place][0]), 12) - 1}
    assert not rows.mask[1, 12:].any()
    assert make_tokens(pairs, SMALL, counts=(1, 1, 1, 1)).counts == ()
