"""The retrieval context: its parts, its grouping, what it reads from the demonstration, and what it must not read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.nn.context import ContextConfig, EncodedPrompts, Keep, RetrievalConfig, RetrievalContext, make_context
from llmdpd.nn.spaces import Spaces
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.metaworld.layout import LAYOUT

S, A, D, W, HEADS, AHEAD = 39, 4, 9, 16, 2, (0, 3)
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=10, dropout=0.0)
SIZES = RetrievalConfig(layers=2, heads=HEADS, width=W, lookahead=AHEAD)
CONFIG = ContextConfig(
    "retrieval", text_dim=5, text_hidden=16, trajectory_dim=3, features="relative", encoder=ENCODER, retrieval=SIZES
)
FEATURES, GEOMETRY, CLOCK = 41, 13, 12


def make(sizes: dict[str, Any] | None = None, **changes: Any) -> RetrievalContext:
    config = dataclasses.replace(CONFIG, retrieval=dataclasses.replace(SIZES, **(sizes or {})), **changes)
    context = make_context(Spaces(S, A, D, LAYOUT), config)
    assert isinstance(context, RetrievalContext)
    with torch.no_grad():
        for parameter in context.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return context.eval()


def pair(rng: np.random.Generator, length: int) -> tuple[Any, Any]:
    return rng.normal(size=(length, S)).astype(np.float32), rng.normal(size=(length, A)).astype(np.float32)


def encoded(context: RetrievalContext, *pairs: tuple[Any, Any]) -> EncodedPrompts:
    """Prompts of these demonstrations, under random texts."""
    return context.encode(torch.randn(len(pairs), D), make_tokens(list(pairs), ENCODER))


def states(rng: np.random.Generator, count: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(count, S)).astype(np.float32))


@pytest.mark.parametrize(("text", "attention", "waypoints", "clock"), list(itertools.product([True, False], repeat=4)))
def test_each_part_can_be_switched(
    rng: np.random.Generator, text: bool, attention: bool, waypoints: bool, clock: bool
) -> None:
    context = make({"attention": attention, "waypoints": waypoints, "timestep_embedding": clock}, text=text)
    expected = FEATURES + clock * CLOCK + attention * W + waypoints * HEADS * (A + 2 * len(AHEAD) * GEOMETRY)
    assert context.state_dim == expected
    prompts = encoded(context, pair(rng, 4), pair(rng, 30))
    state, prompt = context.condition(states(rng, 6), prompts, None, torch.arange(6))
    assert state.shape == (6, expected)
    assert prompt.shape == (6, 3 + 5 * text)


def test_without_the_timestep_embedding_time_says_nothing(rng: np.random.Generator) -> None:
    tokens, text, state = make_tokens([pair(rng, 9)], ENCODER), torch.randn(1, D), states(rng, 5)
    for clock in (False, True):
        context = make({"timestep_embedding": clock})
        early = context.condition(state, context.encode(text, tokens), None, torch.zeros(5))
        slower = dataclasses.replace(tokens, times=2 * tokens.times)
        late = context.condition(state, context.encode(text, slower), None, torch.full((5,), 40.0))
        assert torch.equal(early.state, late.state) != clock


@torch.no_grad()
def test_groups_an_index_and_each_prompt_alone_agree(rng: np.random.Generator) -> None:
    """In float64, where nothing but the grouping can make a difference; that of rounding: tests/ops/test_layers.py."""
    context, text = make().double(), torch.randn(3, D).double()
    # Random states lie metres apart: at the scales of real ones their scores would be in the thousands, and rounded so.
    context.likeness -= 5
    pairs = [pair(rng, n) for n in (2, 30, 7)]
    state, time = states(rng, 12).double(), torch.from_numpy(rng.integers(0, 400, 12))

    def read(prompts: slice) -> EncodedPrompts:
        tokens = make_tokens(pairs[prompts], ENCODER)
        parts = {name: part for name, part in vars(tokens).items() if isinstance(part, torch.Tensor)}
        exact: dict[str, Any] = {name: part.double() for name, part in parts.items() if part.is_floating_point()}
        return context.encode(text[prompts], dataclasses.replace(tokens, **exact))

    together = read(slice(None))
    grouped = context.condition(state, together, None, time)
    index = torch.arange(3).repeat_interleave(4)
    order = torch.from_numpy(rng.permutation(12))
    shuffled = context.condition(state[order], together, index[order], time[order])
    torch.testing.assert_close(shuffled.state, grouped.state[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shuffled.prompt, grouped.prompt[order])
    for number in range(3):
        own = index == number
        single = context.condition(state[own], read(slice(number, number + 1)), None, time[own])
        torch.testing.assert_close(single.state, grouped.state[own], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(single.prompt.expand(4, -1), grouped.prompt[own], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_several_demonstrations_are_retrieved_from_together(rng: np.random.Generator) -> None:
    context, text, pairs = make(), torch.randn(2, D), [pair(rng, n) for n in (9, 30, 4)]
    context.likeness -= 5
    state, time = states(rng, 6), torch.from_numpy(rng.integers(0, 400, 6))

    def condition(*shown: tuple[Any, Any], counts: tuple[int, ...] = ()) -> torch.Tensor:
        prompts = context.encode(text[: len(counts) or len(shown)], make_tokens(list(shown), ENCODER, counts=counts))
        return context.condition(state, prompts, None, time).joined()

    one, two, three = pairs
    single = condition(one)
    assert torch.equal(condition(one, counts=(1,)), single)
    # What is there twice is found as it is found once.
    torch.testing.assert_close(condition(one, one, one, counts=(3,)), single, rtol=1e-3, atol=1e-4)
    both = condition(one, two, counts=(2,))
    torch.testing.assert_close(condition(two, one, counts=(2,)), both, rtol=1e-3, atol=1e-4)
    for other in (single, condition(two)):
        assert not torch.allclose(both, other, atol=1e-2)
    # Beside a prompt of fewer demonstrations each is what it is alone.
    mixed = condition(one, two, three, counts=(2, 1))
    torch.testing.assert_close(mixed[:3], both[:3], rtol=1e-3, atol=1e-4)
    alone = context.encode(text[1:], make_tokens([three], ENCODER))
    torch.testing.assert_close(
        mixed[3:], context.condition(state[3:], alone, None, time[3:]).joined(), rtol=1e-3, atol=1e-4
    )


def sharp(context: RetrievalContext, prompts: EncodedPrompts, step: int) -> None:
    """Make every waypoint head look at one step alone."""
    key = torch.zeros_like(prompts.memory["waypoint_key"])
    key[:, step] = 1.0
    prompts.memory["waypoint_key"] = key
    torch.nn.init.zeros_(context.waypoint_query.weight)
    torch.nn.init.constant_(context.waypoint_query.bias, 1e4)
    # Random states lie so far from one another that their similarity would outweigh the query.
    torch.nn.init.constant_(context.likeness, -math.inf)


def by_geometry_alone(context: RetrievalContext) -> None:
    """Make every waypoint head ask for geometric similarity and nothing else."""
    torch.nn.init.zeros_(context.waypoint_query.weight)
    torch.nn.init.zeros_(context.waypoint_query.bias)


@torch.no_grad()
def test_waypoints_are_the_examples_action_and_the_way_to_where_it_went(rng: np.random.Generator) -> None:
    context = make()
    observations, actions = pair(rng, 8)
    prompts = encoded(context, (observations, actions))
    state, step = states(rng, 5), 6
    sharp(context, prompts, step)
    parts = context.condition(state, prompts, None, torch.zeros(5)).state[:, FEATURES + CLOCK + W :]
    heads = parts.unflatten(1, (HEADS, -1))
    for head in range(HEADS):
        torch.testing.assert_close(heads[:, head, :A], torch.from_numpy(actions[step]).expand(5, -1))
        there = torch.from_numpy(observations[[step, 7]])  # three steps on is past the end: where it ended
        away = context.features.geometry(there)[None] - context.features.geometry(state)[:, None]
        away = away.flatten(1)
        torch.testing.assert_close(heads[:, head, A:], torch.cat([away, torch.tanh(6 * away)], 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_an_example_waypoints_never_look_nowhere(rng: np.random.Generator) -> None:
    context = make(trajectory_dropout=0.1)
    prompts = encoded(context, pair(rng, 8))
    assert (context.weights(states(rng, 5), prompts, torch.zeros(5))[..., -1] == 0).all()
    none = context.encode(torch.randn(1, D), None)
    parts = context.condition(states(rng, 5), none, None, torch.zeros(5)).state[:, FEATURES + CLOCK + W :]
    assert (parts == 0).all(), "and without one they find nothing, at no distance"


@torch.no_grad()
@pytest.mark.parametrize("clock", [True, False])
def test_geometric_similarity_is_minus_the_scaled_squared_distance(rng: np.random.Generator, clock: bool) -> None:
    context = make({"timestep_embedding": clock})
    by_geometry_alone(context)
    observations, actions = pair(rng, 7)
    context.likeness.copy_(0.3 * torch.randn_like(context.likeness) - 4)
    prompts = encoded(context, (observations, actions))
    state, time = states(rng, 5), torch.from_numpy(rng.integers(0, 400, 5))
    here, there = context.features.geometry(state), context.features.geometry(torch.from_numpy(observations))
    away = here[:, None] - there
    if clock:
        away = torch.cat([away, (time[:, None, None] - torch.arange(7)[:, None]) / 50], -1)
    expected = -(context.likeness.exp()[:, None, None] * away.square()).sum(-1)
    torch.testing.assert_close(
        context.weights(state, prompts, time)[..., :-1].transpose(0, 1), expected.softmax(-1), rtol=1e-4, atol=1e-6
    )


@torch.no_grad()
def test_geometric_similarity_does_not_cancel_far_from_the_origin(rng: np.random.Generator) -> None:
    """Multiplied out, w here^2 and its like are 8e5 here, and a float32 knows them to 0.06."""
    context = make()
    by_geometry_alone(context)
    context.likeness.fill_(3.0)
    observations, actions = pair(rng, 7)
    observations = observations[:1] + 0.01 * observations  # near each other: all of them are looked at
    tokens = make_tokens([(observations, actions)], ENCODER)
    state = torch.from_numpy(observations[3:4])
    late = 10_000
    tokens = dataclasses.replace(tokens, times=tokens.times + late)
    found = context.weights(state, context.encode(torch.randn(1, D), tokens), torch.tensor([late + 3]))[0, 0]
    geometry = context.features.geometry(torch.from_numpy(observations)).double()
    away = (geometry - geometry[3]).square().sum(-1) + ((torch.arange(7) - 3) / 50.0).double().square()
    expected = (-(torch.tensor(3.0).exp().double()) * away).softmax(-1)
    torch.testing.assert_close(found[:-1].double(), expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_an_example_that_is_left_out_leaves_no_trace(rng: np.random.Generator) -> None:
    context = make(text_dropout=0.1, trajectory_dropout=0.1)
    text, state, time = torch.randn(2, D), states(rng, 6), torch.arange(6)
    keep = Keep(trajectory=torch.tensor([[0.0], [1.0]]))
    given = pair(rng, 10)
    first, second, other = (
        context.condition(state, context.encode(text, make_tokens([pair(rng, 9), kept], ENCODER), keep), None, time)
        for kept in (given, given, pair(rng, 10))
    )
    assert torch.equal(first.state, second.state), "the first prompt's demonstration differs, and is left out"
    assert (other.state[3:] != first.state[3:]).any(1).all()
    # Acting without an example is the same.
    alone = context.condition(state[:3], context.encode(text[:1], None), None, time[:3])
    torch.testing.assert_close(alone.state, first.state[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.prompt.expand(3, -1), first.prompt[:3])


@torch.no_grad()
def test_padding_is_never_looked_at(rng: np.random.Generator) -> None:
    context, text = make(), torch.randn(2, D)
    tokens = make_tokens([pair(rng, 3), pair(rng, 10)], ENCODER)
    state, time = states(rng, 6), torch.arange(6)
    before = context.condition(state, context.encode(text, tokens), None, time).state
    junk = {
        name: torch.where(tokens.mask.view(2, 10, *[1] * (part.dim() - 2)), part, torch.full_like(part, 1e3))
        for name, part in (("states", tokens.states), ("actions", tokens.actions), ("times", tokens.times))
    }
    after = context.condition(state, context.encode(text, dataclasses.replace(tokens, **junk)), None, time).state
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_weights_are_those_of_the_retrieval(rng: np.random.Generator) -> None:
    context = make()
    observations, actions = pair(rng, 7)
    prompts = encoded(context, (observations, actions))
    state, time = states(rng, 5), torch.arange(5)
    weights = context.weights(state, prompts, time)
    assert weights.shape == (5, HEADS, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, HEADS))
    parts = context.condition(state, prompts, None, time).state[:, FEATURES + CLOCK + W :].unflatten(1, (HEADS, -1))
    expected = weights[..., :-1] @ torch.from_numpy(actions)
    torch.testing.assert_close(parts[..., :A], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="waypoints"):
        make({"waypoints": False}).weights(state, prompts, time)


def test_gradients_reach_every_parameter(rng: np.random.Generator) -> None:
    context = make().train()
    prompts = encoded(context, pair(rng, 4), pair(rng, 10))
    condition = context.condition(states(rng, 6), prompts, None, torch.arange(6))
    (condition.state.square().sum() + condition.prompt.square().sum()).backward()
    for name, parameter in context.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias moves all scores alike, and a softmax does not see that.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 0, name
