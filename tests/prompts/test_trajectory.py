"""The trajectory prompt: which steps are kept, padding, and the encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.nn.trajectory_encoder import TrajectoryEncoder
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, TrajectoryTokens, choose_steps, make_tokens

SMALL = TrajectoryEncoderConfig(layers=2, heads=2, width=16, inner=24, dropout=0.3, steps=12)

Pair = tuple[np.ndarray, np.ndarray]


def pair(rng: np.random.Generator, length: int, S: int = 5, A: int = 3) -> Pair:
    return rng.normal(size=(length, S)).astype(np.float32), rng.normal(size=(length, A)).astype(np.float32)


def encoder_of(config: TrajectoryEncoderConfig = SMALL) -> TrajectoryEncoder:
    return TrajectoryEncoder(5, 3, 7, config).eval()


def encode(encoder: TrajectoryEncoder, tokens: TrajectoryTokens) -> torch.Tensor:
    return encoder.pool(encoder.encode_steps(tokens.states, tokens), tokens.mask)


def test_default_sizes_are_mtdiffs() -> None:
    config = TrajectoryEncoderConfig()
    assert (config.layers, config.heads, config.width, config.inner, config.dropout) == (4, 2, 256, 1024, 0.1)


@pytest.mark.parametrize("sampling", ["even", "window", "all"])
@pytest.mark.parametrize("length", [1, 2, 11, 12])
def test_a_short_episode_is_kept_whole(sampling: Any, length: int) -> None:
    config = dataclasses.replace(SMALL, sampling=sampling)
    assert choose_steps(length, config, np.random.default_rng(0)).tolist() == list(range(length))


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


def test_last_is_the_end_of_it() -> None:
    config = dataclasses.replace(SMALL, sampling="last")
    assert choose_steps(30, config).tolist() == list(range(18, 30))
    assert choose_steps(5, config).tolist() == list(range(5))


def test_all_refuses_a_longer_one() -> None:
    config = dataclasses.replace(SMALL, sampling="all")
    with pytest.raises(InputError, match="longer than the encoder's limit") as error:
        choose_steps(13, config)
    assert "13" in str(error.value.found)
    assert "12" in str(error.value.expected)
    assert "even" in str(error.value.hint)


def test_an_empty_one() -> None:
    with pytest.raises(InputError, match="empty"):
        choose_steps(0, SMALL)


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


def test_tokens_hold_the_returns_from_each_step_on(rng: np.random.Generator) -> None:
    rewards = [rng.normal(size=length).astype(np.float32) for length in (4, 30)]
    tokens = make_tokens([pair(rng, 4), pair(rng, 30)], SMALL, rewards=rewards)
    assert tokens.returns is not None
    for row, earned in enumerate(rewards):
        index = choose_steps(len(earned), SMALL)
        expected = [earned[step:].sum() for step in index]
        np.testing.assert_allclose(tokens.returns[row, : len(index)], expected, rtol=0, atol=1e-4)
        assert not tokens.returns[row, len(index) :].any()
    with pytest.raises(InputError, match="do not fit together"):
        make_tokens([pair(rng, 4)], SMALL, rewards=[rewards[1]])
    with pytest.raises(InputError, match="NaN or Inf"):
        make_tokens([pair(rng, 4)], SMALL, rewards=[np.full(4, np.nan, np.float32)])


def test_a_single_step(rng: np.random.Generator) -> None:
    tokens = make_tokens([pair(rng, 1)], SMALL)
    assert tokens.phase.tolist() == [[0.0]]
    assert torch.isfinite(encode(encoder_of(), tokens)).all()


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


@torch.no_grad()
def test_padding_never_changes_a_result(rng: np.random.Generator) -> None:
    encoder = encoder_of()
    pairs = [pair(rng, length) for length in (3, 12, 1, 7)]
    together = make_tokens(pairs, SMALL)
    vectors = encode(encoder, together)
    for row, one in enumerate(pairs):
        alone = encode(encoder, make_tokens([one], SMALL))
        torch.testing.assert_close(vectors[row], alone[0], rtol=1e-5, atol=1e-5)
    # Nor does what the padded places hold.
    noise = torch.randn_like(together.states)
    spoiled = dataclasses.replace(together, states=torch.where(together.mask[..., None], together.states, noise))
    torch.testing.assert_close(encode(encoder, spoiled), vectors, rtol=1e-5, atol=1e-5)


def test_padding_takes_no_gradient(rng: np.random.Generator) -> None:
    encoder = encoder_of()
    tokens = make_tokens([pair(rng, 3), pair(rng, 12)], SMALL)
    tokens.states.requires_grad_(True)
    encode(encoder, tokens).square().sum().backward()
    gradient = tokens.states.grad
    assert gradient is not None
    assert (gradient[0, 3:] == 0).all()
    assert (gradient[0, :3] != 0).any(-1).all()


@torch.no_grad()
def test_order_states_and_actions_all_count(rng: np.random.Generator) -> None:
    encoder, (states, actions) = encoder_of(), pair(rng, 8)
    base = encode(encoder, make_tokens([(states, actions)], SMALL))
    others = [(states[::-1].copy(), actions[::-1].copy()), (states + 0.1, actions), (states, actions + 0.1)]
    for other in others:
        assert not torch.allclose(encode(encoder, make_tokens([other], SMALL)), base, atol=1e-4)


@torch.no_grad()
def test_not_causal(rng: np.random.Generator) -> None:
    """A step's encoding reads the later ones too."""
    encoder, tokens = encoder_of(), make_tokens([pair(rng, 8)], SMALL)
    base = encoder.encode_steps(tokens.states, tokens)
    tokens.states[0, -1] += 1
    assert not torch.allclose(encoder.encode_steps(tokens.states, tokens)[0, 0], base[0, 0], atol=1e-5)


@torch.no_grad()
def test_pool_is_a_mean_over_the_real_steps(rng: np.random.Generator) -> None:
    encoder = encoder_of()
    steps = torch.randn(2, 4, 16)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    expected = encoder.head(torch.stack([steps[0, :2].mean(0), steps[1].mean(0)]))
    torch.testing.assert_close(encoder.pool(steps, mask), expected)


def test_more_steps_than_the_limit(rng: np.random.Generator) -> None:
    tokens = make_tokens([pair(rng, 13)], dataclasses.replace(SMALL, steps=13))
    with pytest.raises(InputError, match="limit") as error:
        encode(encoder_of(), tokens)
    assert "13" in str(error.value.found)


def test_dropout_only_in_training(rng: np.random.Generator) -> None:
    encoder, tokens = encoder_of(), make_tokens([pair(rng, 8)], SMALL)
    assert torch.equal(encode(encoder, tokens), encode(encoder, tokens))
    encoder.train()
    assert not torch.equal(encode(encoder, tokens), encode(encoder, tokens))
