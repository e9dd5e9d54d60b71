"""Prompts and states read in one node each: where that is done, and that it is what PyTorch computes in float64."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from llmdpd.nn.context import ContextConfig, Keep, RetrievalConfig, RetrievalContext, make_context
from llmdpd.nn.context import retrieval as module
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import layers, native
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


@pytest.mark.parametrize("name", ["bias", "waypoint_bias", "there", "waypoints", "keep", "text"])
def test_what_the_pass_backward_reads_and_was_written_is_refused(rng: np.random.Generator, name: str) -> None:
    context, text, keep = made(), torch.randn(3, D), Keep(torch.ones(3, 1), torch.ones(3, 1))
    prompts = context.encode(text, shown(rng), keep)
    found = context.condition(0.3 * torch.randn(12, S), prompts, None, torch.arange(12))
    {**prompts.memory, "keep": keep.trajectory, "text": text}[name].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found[0].sum().backward()


def test_what_is_kept_for_the_pass_backward_goes_with_it(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Though the results and the loss live on; a pass that retains the graph may be repeated, another may not."""
    tapes: list[weakref.ref[Any]] = []
    pooled = native.module().pooled_buffer

    def noted(floats: int) -> Any:
        tape = pooled(floats)
        tapes.append(weakref.ref(tape))
        return tape

    context = made()
    with monkeypatch.context() as patch:
        patch.setattr(native.module(), "pooled_buffer", noted)
        prompts = context.encode(torch.randn(3, D), shown(rng))
        found = context.condition(0.3 * torch.randn(12, S), prompts, None, torch.arange(12))
    loss = found[0].square().sum() + prompts.pooled.square().sum()
    assert len(tapes) == 2, "the prompts' and the states'"
    assert all(tape() is not None for tape in tapes)
    gradients = []
    for retain in (True, False):
        loss.backward(retain_graph=retain)
        gradients.append({name: p.grad for name, p in context.named_parameters() if p.grad is not None})
        context.zero_grad()
    assert len(gradients[0]) > 30
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert not any(tape() is not None for tape in tapes)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def _hook(context: RetrievalContext) -> None:
    context.text_head[2].register_forward_hook(lambda *given: 2.0 * given[-1])  # type: ignore[index]


def _hook_before(context: RetrievalContext) -> None:
    context.text_head[2].register_forward_pre_hook(lambda _, given: (2.0 * given[0],))  # type: ignore[index]


def _subclass(context: RetrievalContext) -> None:
    context.text_head[2].__class__ = Doubled  # type: ignore[index]


def _own_forward(context: RetrievalContext) -> None:
    context.text_head[2].forward = lambda x: 3.0 * x  # type: ignore[index]


def _activation(context: RetrievalContext) -> None:
    context.text_head[1] = nn.GELU()  # type: ignore[index, operator]


def _epsilon(context: RetrievalContext) -> None:
    context.norm.eps = 0.5


@pytest.mark.parametrize("change", [_hook, _hook_before, _subclass, _own_forward, _activation, _epsilon])
def test_parts_that_compute_something_else_are_asked(
    rng: np.random.Generator, nodes: list[str], change: Callable[[RetrievalContext], None]
) -> None:
    context, tokens, text = made(), shown(rng), torch.randn(3, D)
    state, times = 0.3 * torch.randn(12, S), torch.arange(12)

    def results() -> list[Tensor]:
        return list(context.condition(state, context.encode(text, tokens), None, times))

    change(context)
    with torch.no_grad():
        expected = results()
    found = results()
    assert nodes == []
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-4, atol=1e-5)


def test_hooks_and_an_epsilon_that_come_and_go_are_followed(rng: np.random.Generator, nodes: list[str]) -> None:
    context, tokens, text = made(), shown(rng), torch.randn(3, D)
    context.encode(text, tokens)
    handle = context.step.register_forward_hook(lambda *_: None)
    context.encode(text, tokens)
    assert len(nodes) == 1
    handle.remove()
    context.norm.eps = 1e-3
    context.encode(text, tokens)
    assert len(nodes) == 1
    context.norm.eps = 1e-5
    context.encode(text, tokens)
    assert len(nodes) == 2


def test_under_a_checkpoint(rng: np.random.Generator, nodes: list[str]) -> None:
    """Hooks that take what autograd saves have it from the layers."""
    context, tokens, text = made(), shown(rng), torch.randn(3, D)

    def run() -> Tensor:
        return context.encode(text, tokens).pooled.square().sum()

    run().backward()
    assert nodes == ["read_prompts"]
    expected = {name: p.grad for name, p in context.named_parameters() if p.grad is not None}
    context.zero_grad()
    checkpoint(run, use_reentrant=False).backward()
    found = [{name: p.grad for name, p in context.named_parameters() if p.grad is not None}]
    context.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda kept: kept):
        run().backward()
    found.append({name: p.grad for name, p in context.named_parameters() if p.grad is not None})
    assert nodes == ["read_prompts"]
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for gradients in found:
        for name, gradient in expected.items():
            one = gradients.get(name, torch.zeros_like(gradient))  # not of what the result is not made of
            torch.testing.assert_close(one, gradient, rtol=1e-3, atol=1e-5 * scale)


def test_other_dtypes_and_no_prompts_as_without_gradient(rng: np.random.Generator, nodes: list[str]) -> None:
    """Float64 weights with float32 observations; what is left out as truth values; whole numbers as times."""
    tokens, text, state = shown(rng), torch.randn(3, D), 0.3 * torch.randn(12, S)
    exact, context = made(text=False).double(), made()
    prompts, truths = exact.encode(None, tokens), torch.tensor([[True], [False], [True]])
    assert prompts.pooled.dtype is torch.float64
    assert nodes == []
    whole = dataclasses.replace(tokens, times=tokens.times.long())
    found = context.encode(text, whole, Keep(truths, truths))
    assert nodes == ["read_prompts"]
    with torch.no_grad():
        expected = context.encode(text, whole, Keep(truths, truths))
    torch.testing.assert_close(found.pooled.detach(), expected.pooled, rtol=1e-4, atol=1e-5)
    none = dataclasses.replace(tokens, **{n: part[:0] for n, part in vars(tokens).items() if torch.is_tensor(part)})
    empty = context.encode(text[:0], none)
    assert empty.pooled.shape == (0, expected.pooled.shape[1])
    assert nodes == ["read_prompts"]
    with torch.no_grad():
        wanted = _outcome(lambda: context.condition(state[:0], empty, None, torch.arange(0))[0].shape)
    assert _outcome(lambda: context.condition(state[:0], empty, None, torch.arange(0))[0].shape) == wanted


def _outcome(compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (50, 37), (396, 128)])
def test_a_norm_alone(isa: str, rows: int, width: int) -> None:
    norm, x, grad = nn.LayerNorm(width), torch.randn(rows, width) + 0.5, torch.randn(rows, width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    of_norm, found = [norm.weight, norm.bias], []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        out, d_x, *gradients = (torch.full_like(one, torch.nan) for one in (x, x, *of_norm))
        tape = native.linear_forward(x, of_norm, [], [out])
        native.linear_backward(x, of_norm, [], [grad], tape, d_x, gradients)
        found.append([part.numpy() for part in (out, d_x, *gradients)])
    exact, given = copy.deepcopy(norm).double(), x.double().requires_grad_()
    result = exact(given)
    result.backward(grad.double())
    expected = [result.detach(), given.grad, exact.weight.grad, exact.bias.grad]
    scale = 1.0 if width > 1 else 100.0  # of one number nothing is left but rounding, and its gradient is none
    for one, other in zip(found[0], expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one).double(), other, rtol=1e-4, atol=2e-5 * scale)
    for other in found[1:]:
        assert all(map(np.array_equal, other, found[0]))
