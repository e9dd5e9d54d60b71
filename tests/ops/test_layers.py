"""The layers in C++ against PyTorch in float64: results and every gradient; the same bits on any number of threads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmdpd.nn.context import Context, ContextConfig, RetrievalConfig, make_context
from llmdpd.nn.context.retrieval import AttentionLayer
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import layers, native
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.layout import Layout, Point
from llmdpd.tasks.metaworld.layout import LAYOUT

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")

RESULT, GRADIENT = 2e-5, 1e-4  # relative to float64, as of the sampler
S, A, D = 39, 4, 9


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    native.set_threads(None)


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "computes", lambda *_: False)


def apart(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


def gradients(module: nn.Module, inputs: dict[str, Tensor], results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of everything, by random gradients of the results (the same ones for the same shapes)."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    torch.autograd.backward(results, given)
    named = dict(module.named_parameters()) | inputs
    return {name: tensor.grad.clone() for name, tensor in named.items() if tensor.grad is not None}


def leaves(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], single: float = GRADIENT) -> None:
    """All gradients within the tolerance in the mean, and each within `single`."""
    assert set(found) == set(expected)
    largest, errors = max(float(gradient.abs().max()) for gradient in expected.values()), {}
    for name, gradient in expected.items():
        # A softmax takes no notice of what is added to all its scores: zero but for rounding.
        if float(gradient.abs().max()) < 1e-9 * largest:
            assert float(found[name].abs().max()) <= 1e-4 * largest, name
        else:
            errors[name] = apart(found[name], gradient)
    assert max(errors.values()) <= single, max(errors, key=errors.__getitem__)
    assert np.sqrt(np.mean(np.square(list(errors.values())))) <= GRADIENT


@pytest.mark.parametrize(
    ("groups", "rows", "steps", "width", "heads"),
    [(3, 40, 33, 128, 4), (1, 4, 1, 8, 8), (5, 7, 50, 21, 3), (2, 13, 16, 48, 1), (2, 5, 130, 35, 5)],
)
def test_an_attention_layer(
    monkeypatch: pytest.MonkeyPatch, isa: str, groups: int, rows: int, steps: int, width: int, heads: int
) -> None:
    layer = AttentionLayer(width, heads)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    hidden, memory = torch.randn(groups, rows, width), torch.randn(groups, steps, width)
    bias = torch.zeros(groups, 1, 1, steps)
    bias[0, ..., 1:] = torch.where(torch.rand(steps - 1) < 0.3, -torch.inf, 0.0)

    def run(of: AttentionLayer, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        given = leaves(hidden=hidden.to(dtype), memory=memory.to(dtype))
        result = of(given["hidden"], *of.read(given["memory"]), bias.to(dtype))
        return result.detach(), gradients(of, given, (result,))

    found = []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        found.append(run(copy.deepcopy(layer), torch.float32))
    exact = copy.deepcopy(layer).double()
    in_torch(monkeypatch)
    result, expected = run(exact, torch.float64)
    assert apart(found[0][0], result) <= RESULT
    check(found[0][1], expected)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert all(torch.equal(other[1][name], gradient) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(396, 128, (128, 128)), (1, 1, (1,)), (50, 37, (5, 19, 130))])
def test_linear_layers(isa: str, rows: int, inputs: int, outputs: tuple[int, ...], norm: bool) -> None:
    module = nn.ModuleList([nn.LayerNorm(inputs), *(nn.Linear(inputs, count) for count in outputs)])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, rows, inputs)

    def run(of: nn.ModuleList, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        given = leaves(x=x.to(dtype))
        first, *linears = of
        if dtype is torch.float32:
            results = layers.linears(given["x"], first if norm else None, linears)  # type: ignore[arg-type]
        else:
            normed = first(given["x"]) if norm else given["x"]
            results = [layer(normed) for layer in linears]
        return tuple(results), gradients(of, given, tuple(results))

    found = []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        found.append(run(copy.deepcopy(module), torch.float32))
    results, expected = run(copy.deepcopy(module).double(), torch.float64)
    for one, exact in zip(found[0][0], results, strict=True):
        assert one.shape == exact.shape
        assert apart(one, exact) <= RESULT
    check(found[0][1], expected)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[0], found[0][0], strict=True))
        assert all(torch.equal(other[1][name], gradient) for name, gradient in found[0][1].items())


def test_a_linear_layer_whose_input_has_no_gradient() -> None:
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    layers.linears(x, None, (layer,))[0].sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


CASES: list[dict[str, Any]] = [
    {},
    {"geometric_similarity": False},
    {"timestep_embedding": False},
    {"waypoints": False},
    {"attention": False},
    {"width": 21, "heads": 3, "lookahead": (0,)},
    {"width": 40, "heads": 5, "lookahead": (0, 1, 4), "layers": 1},
]


def made(sizes: dict[str, Any], text: bool) -> Context:
    encoder = TrajectoryEncoderConfig(layers=2, width=20, heads=4, inner=27, steps=30, dropout=0.0)
    retrieval = dataclasses.replace(RetrievalConfig(width=32, heads=4), **sizes)
    config = ContextConfig("retrieval", text, text_dim=5, text_hidden=8, trajectory_dim=6, trajectory_dropout=0.1)
    config = dataclasses.replace(config, features="relative", encoder=encoder, retrieval=retrieval)
    context = make_context(Spaces(S, A, D, LAYOUT), config)
    with torch.no_grad():
        for parameter in context.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(context, "likeness"):
            context.likeness -= 3
    return context


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_the_whole_context(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, isa: str, sizes: dict[str, Any], text: bool
) -> None:
    """Encoder, memory, attention and waypoints together, from observations to gradients of every weight."""
    context = made(sizes, text)
    pairs = [
        ((0.3 * rng.normal(size=(n, S))).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32))
        for n in (30, 6, 17)
    ]
    embedding, state = torch.randn(3, D), 0.3 * torch.randn(3 * 9, S)
    times = torch.from_numpy(rng.integers(0, 400, 27))

    def run(of: Context, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        tokens = make_tokens(pairs, of.config.encoder)
        exact = {
            name: part.to(dtype)
            for name, part in vars(tokens).items()
            if torch.is_tensor(part) and part.is_floating_point()
        }
        prompts = of.encode(embedding.to(dtype) if text else None, dataclasses.replace(tokens, **exact))
        results = of.condition(state.to(dtype), prompts, None, times)
        return tuple(results), gradients(of, {}, tuple(results))

    found = []
    for threads in (1, 5):
        native.set_threads(threads)
        found.append(run(copy.deepcopy(context), torch.float32))
    in_torch(monkeypatch)
    results, expected = run(copy.deepcopy(context).double(), torch.float64)
    for one, exact in zip(found[0][0], results, strict=True):
        assert apart(one, exact) <= RESULT
    # Of seven layers in a row, rounding brings one of 50 tensors further away now and then, PyTorch's as well.
    check(found[0][1], expected, 10 * GRADIENT)
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


def test_what_is_not_for_cpp_is_computed_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 7)
    assert layers.computes(x)
    assert not layers.computes(x.double())
    assert not layers.computes(x, x.to("meta"))
    assert not layers.computes_groups(torch.randn(9, 3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert not layers.computes(x)
    assert not torch.compile(lambda of: torch.tensor(layers.computes(of)), backend="eager")(x)
    monkeypatch.setattr(native, "available", lambda: (False, "not there"))
    assert not layers.computes(x)


def test_a_second_derivative_is_refused() -> None:
    layer = nn.Linear(7, 3)
    x = torch.randn(5, 7, requires_grad=True)
    first = torch.autograd.grad(layers.linears(x, None, (layer,))[0].square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_the_gradient_of_observations_is_not_lost(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    context = made({}, True)
    pairs = [((0.3 * rng.normal(size=(9, S))).astype(np.float32), rng.normal(size=(9, A)).astype(np.float32))]
    embedding, state, times = torch.randn(1, D), 0.3 * torch.randn(8, S), torch.arange(8)

    def gradient(of: Context) -> Tensor:
        given = state.clone().requires_grad_()
        prompts = of.encode(embedding, make_tokens(pairs, of.config.encoder))
        return torch.autograd.grad(of.condition(given, prompts, None, times).state.square().sum(), given)[0]

    found = gradient(context)
    in_torch(monkeypatch)
    assert apart(found, gradient(context)) < 1e-3


def test_observations_without_geometry() -> None:
    context = make_context(
        Spaces(4, 2, D, Layout((Point("body", (0, 1)),))), ContextConfig("retrieval", features="combined")
    )
    pairs = [(torch.randn(9, 4).numpy(), torch.randn(9, 2).numpy())] * 2
    prompts = context.encode(torch.randn(2, D), make_tokens(pairs, context.config.encoder))
    context.condition(torch.randn(16, 4), prompts, None, torch.arange(16)).state.sum().backward()


def test_what_another_instruction_set_kept_is_refused() -> None:
    isas = native.module().runnable_isas()
    if len(isas) < 2:
        pytest.skip("one instruction set alone")
    layer, hidden, memory = AttentionLayer(16, 1), torch.randn(1, 5, 16), torch.randn(1, 3, 16)
    try:
        native.module().set_isa(isas[-1])
        result = layer(hidden, *layer.read(memory), torch.zeros(1, 1, 1, 3))
        native.module().set_isa(isas[0])
        with pytest.raises(ValueError, match="tape"):
            result.sum().backward()
    finally:
        native.module().set_isa("")
