"""The trajectory encoder: padding, positions, what it reads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.nn.trajectory_encoder import TrajectoryEncoder
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, TrajectoryTokens, make_tokens

SMALL = TrajectoryEncoderConfig(layers=2, heads=2, width=16, inner=24, dropout=0.3, steps=12)

Pair = tuple[np.ndarray, np.ndarray]


def pair(rng: np.random.Generator, length: int, S: int = 5, A: int = 3) -> Pair:
    return rng.normal(size=(length, S)).astype(np.float32), rng.normal(size=(length, A)).astype(np.float32)


def encoder_of(config: TrajectoryEncoderConfig = SMALL) -> TrajectoryEncoder:
    return TrajectoryEncoder(5, 3, 7, config).eval()


def encode(encoder: TrajectoryEncoder, tokens: TrajectoryTokens) -> torch.Tensor:
    return encoder.pool(encoder.encode_steps(tokens.states, tokens), tokens.mask)


def test_a_single_step(rng: np.random.Generator) -> None:
    tokens = make_tokens([pair(rng, 1)], SMALL)
    assert tokens.phase.tolist() == [[0.0]]
    assert torch.isfinite(encode(encoder_of(), tokens)).all()


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
