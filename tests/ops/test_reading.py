"""Prompts and states read in one node each: where that is done, and that it is what PyTorch computes in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmdpd.nn.context import ContextConfig, Keep, RetrievalConfig, RetrievalContext, make_context
from llmdpd.nn.context import retrieval as module
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import layers, native, passes
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.metaworld.layout import LAYOUT

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")

S, A, D = 39, 4, 9
ENCODER = TrajectoryEncoderConfig(layers=2, width=20, heads=4, inner=27, steps=30, dropout=0.0)
CONFIG = ContextConfig(
    "retrieval",
    text_dim=5,
    text_hidden=8,
    trajectory_dim=6,
    text_dropout=0.2,
    trajectory_dropout=0.2,
    features="relative",
    encoder=ENCODER,
    retrieval=RetrievalConfig(width=24, heads=3),
)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    native.set_threads(None)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nodes that were computed."""
    seen: list[str] = []
    for name in ("read_prompts", "read_states"):
        original = getattr(module, name)

        def noted(*arguments: Any, of: Any = original, name: str = name) -> Any:
            seen.append(name)
            return of(*arguments)

        monkeypatch.setattr(module, name, noted)
    return seen


def made(**changes: Any) -> RetrievalContext:
    context = make_context(Spaces(S, A, D, LAYOUT), dataclasses.replace(CONFIG, **changes))
    assert isinstance(context, RetrievalContext)
    with torch.no_grad():
        for parameter in context.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        context.likeness -= 3
    context.features.fit(0.3 * torch.randn(60, S))
    return context


def shown(rng: np.random.Generator, lengths: tuple[int, ...] = (30, 6, 17), **options: Any) -> Any:
    pairs = [
        ((0.3 * rng.normal(size=(n, S))).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32))
        for n in lengths
    ]
    return make_tokens(pairs, ENCODER, **options)


def apart(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("encoder", [ENCODER, dataclasses.replace(ENCODER, width=120, inner=3)])
def test_left_out_prompts_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    isa: str,
    nodes: list[str],
    encoder: TrajectoryEncoderConfig,
) -> None:
    """Of four prompts one lacks its text, one its demonstration, one both."""
    context, tokens = made(encoder=encoder), shown(rng, (30, 6, 17, 30))
    text, state, times = torch.randn(4, D), 0.3 * torch.randn(20, S), torch.from_numpy(rng.integers(0, 400, 20))
    given = [torch.tensor(one, dtype=torch.float32)[:, None] for one in ([1, 0, 1, 0], [1, 1, 0, 0])]

    def run(of: RetrievalContext, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        exact: dict[str, Any] = {
            name: part.to(dtype)
            for name, part in vars(tokens).items()
            if torch.is_tensor(part) and part.is_floating_point()
        }
        keep = Keep(*(part.to(dtype) for part in given))
        prompts = of.encode(text.to(dtype), dataclasses.replace(tokens, **exact), keep)
        results = list(of.condition(state.to(dtype), prompts, None, times))
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(results, [torch.randn(r.shape, generator=generator).to(r) for r in results])
        return results, {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}

    found = []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        found.append(run(copy.deepcopy(context), torch.float32))
    assert nodes == 3 * ["read_prompts", "read_states"]
    monkeypatch.setattr(layers, "computes", lambda *_: False)
    results, expected = run(copy.deepcopy(context).double(), torch.float64)
    assert nodes == 3 * ["read_prompts", "read_states"]
    for one, exact in zip(found[0][0], results, strict=True):
        assert apart(one, exact) <= 2e-5
    assert set(found[0][1]) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        if float(gradient.abs().max()) < 1e-9 * largest:  # a softmax ignores what is added to all its scores
            assert float(found[0][1][name].abs().max()) <= 1e-4 * largest, name
        else:
            assert apart(found[0][1][name], gradient) <= 1e-3, name
    for results, gradients in found[1:]:
        assert all(map(torch.equal, results, found[0][0]))
        assert all(torch.equal(gradients[name], gradient) for name, gradient in found[0][1].items())


def test_where_nodes_read(rng: np.random.Generator, nodes: list[str]) -> None:
    """In training, of one demonstration a prompt, states in groups, by plain parameters: elsewhere layer by layer."""
    context, tokens, text = made(), shown(rng), torch.randn(3, D)
    state, times = 0.3 * torch.randn(12, S), torch.arange(12)

    def seen() -> list[str]:
        found = list(nodes)
        nodes.clear()
        return found

    prompts = context.encode(text, tokens)
    assert seen() == ["read_prompts"]
    context.condition(state, prompts, None, times)
    context.condition(
        state[:8], context.encode(text[:1], shown(rng, (9,))), torch.zeros(8, dtype=torch.long), times[:8]
    )
    assert seen() == ["read_states", "read_prompts", "read_states"]
    context.condition(state[:6], prompts, None, times[:6])  # two states a group
    context.condition(state, prompts, torch.arange(3).repeat(4), times)
    context.condition(state.clone().requires_grad_(), prompts, None, times)
    context.encode(text[:2], shown(rng, counts=(2, 1)))
    context.encode(text, shown(rng, (2, 3, 1)))
    context.encode(None, tokens)
    context.encode(text, None)
    with torch.no_grad():
        context.condition(state, context.encode(text, tokens), None, times)
    with torch.autocast("cpu", torch.bfloat16):
        context.encode(text, tokens)
    assert seen() == []
    parametrize.register_parametrization(context.step, "weight", nn.Identity())
    parametrize.register_parametrization(context.waypoint_query, "weight", nn.Identity())
    context.condition(state, context.encode(text, tokens), None, times)
    assert seen() == []


def test_weights_that_are_exchanged_are_followed(rng: np.random.Generator, nodes: list[str]) -> None:
    context, tokens, text = made(features="combined"), shown(rng), torch.randn(3, D)
    first = context.encode(text, tokens)
    context.step = copy.deepcopy(context.step)
    with torch.no_grad():
        context.step.weight.mul_(2.0)
    context.trajectory_encoder.head[0].weight = nn.Parameter(
        torch.zeros_like(context.trajectory_encoder.head[0].weight)
    )
    context.features.mean.add_(0.1)
    second = context.encode(text, tokens)
    assert nodes == ["read_prompts", "read_prompts"]
    with torch.no_grad():
        expected = context.encode(text, tokens)
    for name, part in expected.memory.items():
        torch.testing.assert_close(second.memory[name].detach(), part, rtol=1e-4, atol=1e-5)
        if name.startswith(("key", "value", "waypoint_key")):
            assert not torch.equal(first.memory[name].detach(), part), name
    torch.testing.assert_close(second.pooled.detach(), expected.pooled, rtol=1e-4, atol=1e-5)


def test_weights_that_were_written_are_refused(rng: np.random.Generator) -> None:
    context = made()
    prompts = context.encode(torch.randn(3, D), shown(rng))
    with torch.no_grad():
        context.step.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        prompts.pooled.sum().backward()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (50, 37), (396, 128)])
def test_a_norm_alone(isa: str, rows: int, width: int) -> None:
    norm, x, grad = nn.LayerNorm(width), torch.randn(rows, width) + 0.5, torch.randn(rows, width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {f"norm.{name}": parameter.detach().numpy() for name, parameter in norm.named_parameters()}
    found = []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        gradients = {name: np.full_like(part, np.nan) for name, part in weights.items()}
        out, backward = passes.norm(x.numpy(), weights, "norm")
        found.append([out, backward(grad.numpy(), gradients), gradients["norm.weight"], gradients["norm.bias"]])
    exact, given = copy.deepcopy(norm).double(), x.double().requires_grad_()
    result = exact(given)
    result.backward(grad.double())
    expected = [result.detach(), given.grad, exact.weight.grad, exact.bias.grad]
    scale = 1.0 if width > 1 else 100.0  # of one number nothing is left but rounding, and its gradient is none
    for one, other in zip(found[0], expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one).double(), other, rtol=1e-4, atol=2e-5 * scale)
    for other in found[1:]:
        assert all(map(np.array_equal, other, found[0]))
