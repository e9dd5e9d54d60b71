"""The pooled context: switches, dropout, missing prompts, and mixing several prompts in one batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.nn.context import ContextConfig, Keep, PooledContext, make_context
from llmdpd.nn.spaces import Spaces
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, TrajectoryTokens, make_tokens
from llmdpd.tasks.metaworld.layout import LAYOUT

S, A, D = 6, 2, 9
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=10)
CONFIG = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=3, encoder=ENCODER)


def make(**changes: Any) -> PooledContext:
    context = make_context(Spaces(S, A, D), dataclasses.replace(CONFIG, **changes))
    assert isinstance(context, PooledContext)
    return context.eval()


def tokens_of(rng: np.random.Generator, *lengths: int) -> TrajectoryTokens:
    pairs = [(rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in lengths]
    return make_tokens(pairs, ENCODER)


def row(tokens: TrajectoryTokens, i: int) -> TrajectoryTokens:
    keep = tokens.mask[i]
    parts = (getattr(tokens, name)[i : i + 1, keep] for name in ("states", "actions", "phase", "times", "mask"))
    return TrajectoryTokens(*parts, padded=False)


CLOCK = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize(("text", "trajectory", "size"), [(1, 1, 8), (1, 0, 5), (0, 1, 3), (0, 0, 0)])
def test_switches_change_the_prompts_size(rng: np.random.Generator, text: int, trajectory: int, size: int) -> None:
    context = make(text=bool(text), trajectory=bool(trajectory))
    assert context.prompt_dim == size
    assert context.state_dim == S
    names = {name.split(".")[0] for name, _ in context.named_parameters()}
    assert names == {n for n, on in (("text_head", text), ("trajectory_encoder", trajectory)) if on}
    prompts = context.encode(torch.randn(2, D), tokens_of(rng, 4, 10))
    assert prompts.pooled.shape == (2 if size else 1, size)
    index = torch.from_numpy(rng.integers(0, 2, 8))
    condition = context.condition(torch.randn(8, S), prompts, index, CLOCK)
    assert condition.prompt.shape == ((8, size) if size else (0,))


def test_what_is_switched_off_need_not_be_given(rng: np.random.Generator) -> None:
    text, tokens = torch.randn(2, D), tokens_of(rng, 4, 10)
    no_text, no_trajectory = make(text=False), make(trajectory=False)
    assert torch.equal(no_text.encode(None, tokens).pooled, no_text.encode(text, tokens).pooled)
    assert torch.equal(no_trajectory.encode(text, None).pooled, no_trajectory.encode(text, tokens).pooled)
    assert make(text=False, trajectory=False).encode(None, None).pooled.shape == (1, 0)


def test_prompt_vector_is_text_then_trajectory(rng: np.random.Generator) -> None:
    context, text, tokens = make(), torch.randn(2, D), tokens_of(rng, 4, 10)
    pooled = context.encode(text, tokens).pooled
    assert context.text_head is not None
    torch.testing.assert_close(pooled[:, :5], context.text_head(text))
    changed = context.encode(text + 1, tokens).pooled
    assert torch.equal(changed[:, 5:], pooled[:, 5:])
    assert (changed[:, :5] != pooled[:, :5]).any()
    changed = context.encode(text, tokens_of(rng, 4, 10)).pooled
    assert torch.equal(changed[:, :5], pooled[:, :5])
    assert (changed[:, 5:] != pooled[:, 5:]).any()


def test_text_head_is_the_papers(rng: np.random.Generator) -> None:
    head = PooledContext(Spaces(S, A, D), ContextConfig()).text_head
    assert isinstance(head, torch.nn.Sequential)
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert head[0].out_features == head[2].out_features == 512


@torch.no_grad()
def test_mixed_prompts_equal_each_alone(rng: np.random.Generator) -> None:
    context, text, tokens = make(), torch.randn(3, D), tokens_of(rng, 2, 10, 6)
    state, index = torch.randn(8, S), torch.tensor([2, 0, 1, 1, 2, 0, 0, 2])
    mixed = context.condition(state, context.encode(text, tokens), index, CLOCK)
    for i in range(3):
        own = index == i
        prompts = context.encode(text[i : i + 1], row(tokens, i))
        alone = context.condition(state[own], prompts, None, CLOCK[own])
        torch.testing.assert_close(mixed.state[own], alone.state)
        torch.testing.assert_close(mixed.prompt[own], alone.prompt.expand(int(own.sum()), -1), rtol=1e-5, atol=1e-5)
        assert alone.prompt.shape == (8,)  # one vector for all: multiplied once by the sampler


@torch.no_grad()
def test_states_and_demonstrations_pass_through_the_same_features(rng: np.random.Generator) -> None:
    context, text, tokens, state = make(), torch.randn(1, D), tokens_of(rng, 6), torch.randn(8, S)
    before = context.encode(text, tokens)
    context.features.mean.fill_(7.0)
    context.features.std.fill_(4.0)
    shifted = context.encode(text, dataclasses.replace(tokens, states=tokens.states * 4 + 7))
    torch.testing.assert_close(shifted.pooled, before.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(context.condition(state * 4 + 7, before, None, CLOCK).state, state)


@torch.no_grad()
def test_prompts_that_are_not_kept_are_zeros(rng: np.random.Generator) -> None:
    context, text, tokens = make(), torch.randn(3, D), tokens_of(rng, 2, 10, 6)
    whole = context.encode(text, tokens).pooled
    keep = Keep(torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [1.0]]))
    pooled = context.encode(text, tokens, keep).pooled
    expected = whole.clone()
    expected[1, :5] = 0
    expected[0, 5:] = 0
    assert torch.equal(pooled, expected), "what is kept is not rescaled"


@pytest.mark.parametrize("which", ["text", "trajectory"])
def test_a_missing_prompt(rng: np.random.Generator, which: str) -> None:
    text = None if which == "text" else torch.randn(2, D)
    tokens = None if which == "trajectory" else tokens_of(rng, 4, 7)
    with pytest.raises(InputError, match=f"{which} prompt") as error:
        make().encode(text, tokens)
    assert error.value.field == which
    assert "dropout" in str(error.value.hint)
    # A policy that was trained with prompt dropout knows the zero vector.
    pooled = make(text_dropout=0.1, trajectory_dropout=0.1).encode(text, tokens).pooled
    part = pooled[:, :5] if which == "text" else pooled[:, 5:]
    assert pooled.shape == (2, 8)
    assert (part == 0).all()
    assert (pooled != 0).any()
    neither = make(text_dropout=0.1, trajectory_dropout=0.1).encode(None, None).pooled
    assert torch.equal(neither, torch.zeros(1, 8))


def test_metaworld_features_widen_the_condition() -> None:
    context = PooledContext(Spaces(39, 4, D, LAYOUT), dataclasses.replace(CONFIG, features="combined"))
    assert context.state_dim == 75
