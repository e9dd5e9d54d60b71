"""The registered operators: gradients against float64 autograd of the reference, opcheck, torch.compile."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, SamplerCoefficients, reverse_diffusion, sampler_coefficients
from llmdpd.ops import autograd, native, operators
from llmdpd.ops.arguments import ChainArguments, MlpArguments
from llmdpd.ops.compiling import constant_when_compiled
from llmdpd.ops.mish_mlp import mish_mlp, mish_mlp_reference, mish_mlps

ACTIONS = {"fp32": 2e-5, "bf16": 2e-2}
GRADIENTS = {"fp32": 1e-4, "bf16": 5e-2}
MakeCase = Callable[..., "Case"]


def relative(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """L2 distance relative to the expected norm, or to `least` for each number where that is larger."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    size = max(float(expected.norm()), least * expected.numel() ** 0.5)
    return float((found - expected).norm()) / (size or 1.0)


@dataclasses.dataclass
class Case:
    """The operator and its float64 oracle on the same draws."""

    net: NoiseMLP
    plan: SamplerCoefficients
    state: Tensor
    prompt: Tensor
    samples: int
    noise: Tensor
    weight: Tensor  # of the scalar that is differentiated

    def gradients(self, dtype: torch.dtype, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        net = copy.deepcopy(self.net).to(dtype)
        state, prompt = (t.detach().to(dtype).requires_grad_() for t in (self.state, self.prompt))
        actions = reverse_diffusion(net, state, prompt, self.plan, self.samples, noise=self.noise.to(dtype), **options)
        (actions * self.weight.to(dtype).reshape(actions.shape)).sum().backward()
        found = {name: parameter.grad for name, parameter in net.named_parameters()}
        return actions, {**found, "state": state.grad, "prompt": prompt.grad}

    def settled(self) -> bool:
        """Whether no value lies so near to the bound that rounding decides whether it is clipped."""
        _, expected = self.gradients(torch.float64, backend="reference")
        for nudge in (1 - 1e-5, 1 + 1e-5):
            near = dataclasses.replace(self, plan=dataclasses.replace(self.plan, clip=self.plan.clip * nudge))
            _, found = near.gradients(torch.float64, backend="reference")
            if any(relative(found[name], expected[name]) > GRADIENTS["fp32"] / 2 for name in expected):
                return False
        return True

    def check(self, precision: str) -> None:
        expected, wanted = self.gradients(torch.float64, backend="reference")
        actions, gradients = self.gradients(torch.float32, backend="cpp", precision=precision)
        # A single action may lie near 0, where no relative error holds.
        assert relative(actions, expected, least=0.3) <= ACTIONS[precision]
        # Where the terms of a small tensor cancel, PyTorch's own in that precision are as far off.
        _, theirs = self.gradients(torch.float32, backend="reference", precision=precision)
        for name, gradient in gradients.items():
            bound = max(GRADIENTS[precision], 3 * relative(theirs[name], wanted[name]))
            assert relative(gradient, wanted[name]) <= bound, name


@pytest.fixture
def make_case(rng: np.random.Generator, make_net: Any, random_coefficients: Any) -> Callable[..., Case]:
    def make(S: int, A: int, Z: int, H: int, B: int, N: int, K: int, clip: float | None = 0.9) -> Case:
        prompt_shape = (B, Z) if rng.random() < 0.5 else (Z,)
        state, prompt, noise, weight = (
            torch.randn(shape) for shape in ((B, S), prompt_shape, (K + 1, B, N, A), (B, N, A))
        )
        return Case(make_net(S, A, Z, H), random_coefficients(K, clip), state, prompt, N, noise, weight)

    return make


SIZES = [
    (39, 4, 24, 256, 37, 1, 5),
    (7, 3, 6, 33, 5, 4, 5),
    (3, 1, 5, 7, 1, 1, 15),
    (2, 9, 12, 70, 23, 3, 3),
    (4, 20, 3, 24, 301, 1, 2),
]


@pytest.mark.parametrize("size", SIZES)
def test_gradients(make_case: MakeCase, isa: str, size: tuple[int, ...]) -> None:
    # A bound that some values of x0 meet and others do not.
    cases = (make_case(*size) for _ in range(20))
    next(case for case in cases if case.settled()).check("fp32")


@pytest.mark.parametrize("size", [size for size in SIZES if size[4] > 1])  # one number alone may lie near 0
def test_gradients_in_bf16(make_case: MakeCase, isa: str, size: tuple[int, ...]) -> None:
    # Without a bound: where rounding crosses one, the gradient changes by more than any tolerance.
    make_case(*size, clip=None).check("bf16")


def test_the_gradient_passes_on_the_bound_and_stops_beyond(make_net: Any) -> None:
    net = make_net(2, 1, 3)
    with torch.no_grad():
        net.layers[3].weight.zero_()
        net.layers[3].bias.zero_()
    one = np.ones(1)
    table = {"p": one, "e": one, "A": 0 * one, "B": one, "C": 0 * one, "S": 0 * one}
    plan = dataclasses.replace(sampler_coefficients("ddim", 1, train_steps=5), start=1.0, clip=1.0, **table)
    noise = torch.tensor([0.5, 1.0, -1.0, 1.5]).reshape(1, 4, 1)
    noise = torch.cat([noise, torch.zeros_like(noise)])
    state, prompt = torch.zeros(4, 2), torch.zeros(3)
    actions = reverse_diffusion(net, state, prompt, plan, noise=noise)
    # d action / d (output bias) is e B where x0 is within the bound: each row by itself.
    rows = [torch.autograd.grad(actions[row, 0], net.layers[3].bias, retain_graph=True)[0].item() for row in range(4)]
    assert rows == [1.0, 1.0, 1.0, 0.0]


def test_without_a_tape_the_chain_is_computed_again(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in SIZES:
        case = make_case(*size)
        kept = case.gradients(torch.float32)
        monkeypatch.setattr(operators, "TAPE_LIMIT", 0)
        again = case.gradients(torch.float32)
        monkeypatch.undo()
        assert torch.equal(kept[0], again[0])
        for name, gradient in kept[1].items():
            assert torch.equal(gradient, again[1][name]), name


def test_same_bits_for_any_thread_count(rng: np.random.Generator, make_net: Any, isa: str) -> None:
    S, A, Z, H, B, N, K = 7, 3, 6, 40, 701, 2, 5  # several row blocks, the last one odd
    arguments = operator_arguments(rng, make_net, S, A, Z, H, B, N, K)
    leaves = [*arguments[:5], *arguments[5]]
    weight = torch.from_numpy(rng.normal(size=(B, N, A)).astype(np.float32))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            actions = torch.ops.llmdpd.reverse_diffusion(*arguments)[0]
            results.append([actions.detach(), *torch.autograd.grad((actions * weight).sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


def test_a_second_backward_pass_gives_the_same(rng: np.random.Generator, make_net: Any) -> None:
    net = make_net(3, 2, 4)
    actions = reverse_diffusion(net, torch.randn(9, 3), torch.randn(4), sampler_coefficients(), seed=1).sum()
    first = torch.autograd.grad(actions, list(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(actions, list(net.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_two_tapes_at_once_do_not_share_memory(make_case: MakeCase) -> None:
    cases = [make_case(3, 2, 4, 33, 9, 1, 5) for _ in range(2)]
    alone = [case.gradients(torch.float32)[1] for case in cases]
    nets = [copy.deepcopy(case.net) for case in cases]
    both = [
        reverse_diffusion(net, case.state, case.prompt, case.plan, noise=case.noise)
        for net, case in zip(nets, cases, strict=True)
    ]
    for actions, case in zip(both, cases, strict=True):
        (actions * case.weight.reshape(actions.shape)).sum().backward()
    for net, gradients in zip(nets, alone, strict=True):
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter.grad, gradients[name]), name


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


def outputs(make_net: Any, state: Tensor) -> list[Tensor]:
    """Of the chain and of the net."""
    _, weight, init, *trunk = net_case(np.random.default_rng(0), 4, 3, 8, 1, False)
    return [
        reverse_diffusion(make_net(3, 2, 4), state, torch.randn(4), sampler_coefficients(clip=None), seed=1),
        mish_mlp(state, weight, init, linear_layers(trunk)),
    ]


def test_a_gradient_that_is_not_there(make_net: Any) -> None:
    for output in outputs(make_net, torch.randn(4, 3, requires_grad=True)):
        NoGradient.apply(output).sum().backward()


def test_a_second_derivative_is_refused(make_net: Any) -> None:
    state = torch.randn(4, 3, requires_grad=True)
    for output in outputs(make_net, state):
        (gradient,) = torch.autograd.grad(output.square().sum(), state, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative|differentiate twice"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("mode", ["inference", "fake"])
def test_a_plan_first_used_in_a_mode_serves_all(make_net: Any, mode: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from llmdpd.diffusion.on_device import coefficient_tensors

    net = make_net(3, 2, 4)
    plan = sampler_coefficients(noise_scale=0.731 if mode == "fake" else 0.732)  # nobody else's
    if mode == "inference":
        with torch.inference_mode():
            reverse_diffusion(net, torch.randn(4, 3), torch.randn(4), plan, seed=1)
            coefficient_tensors(plan.content, torch.device("cpu"))
    else:
        with FakeTensorMode():
            coefficient_tensors(plan.content, torch.device("cpu"))
    reverse_diffusion(net, torch.randn(4, 3), torch.randn(4), plan, seed=1).sum().backward()
    assert type(net.layers[1].weight.grad) is Tensor


def test_the_operators_and_the_way_round_them_are_the_same(rng: np.random.Generator, make_net: Any) -> None:
    arguments = operator_arguments(rng, make_net)
    *inputs, trunk = arguments[:6]
    leaves = [*inputs, *trunk]
    weight = torch.from_numpy(rng.normal(size=(6, 2, 3)).astype(np.float32))
    chain = ChainArguments(*arguments[:-1])
    ways = [torch.ops.llmdpd.reverse_diffusion(*arguments)[0], autograd.reverse_diffusion(chain, True)]
    for one, other in zip(*(torch.autograd.grad((way * weight).sum(), leaves) for way in ways), strict=True):
        assert torch.equal(one, other)
    state, _, bias, *_ = inputs
    first = torch.randn(18, 5, requires_grad=True)
    ways = [
        torch.ops.llmdpd.mish_mlp(state, first, bias, trunk, False, True)[0],
        autograd.mish_mlps([MlpArguments(state, first, bias, trunk, False)], True)[0],
    ]
    leaves = [state, first, bias, *trunk]
    for one, other in zip(*(torch.autograd.grad(way.square().sum(), leaves) for way in ways), strict=True):
        assert torch.equal(one, other)


def test_a_frozen_net_gets_no_weight_gradients(rng: np.random.Generator) -> None:
    tensors = net_case(rng, 37, 5, 16, 3, False)
    layers = linear_layers(tensors[3:])
    learning = mish_mlp(tensors[0], tensors[1], tensors[2], layers).sum()
    (expected,) = torch.autograd.grad(learning, tensors[0])
    frozen = [layer.requires_grad_(False) for layer in layers]
    x = tensors[0].detach().clone().requires_grad_()
    mish_mlp(x, tensors[1].detach(), tensors[2].detach(), frozen).sum().backward()
    assert torch.equal(x.grad, expected)
    assert all(part.grad is None for layer in frozen for part in layer.parameters())


def test_nets_together_are_those_alone(rng: np.random.Generator, isa: str) -> None:
    """Same bits, for any number of threads; no gradient where none is wanted."""
    (x, *first), (_, *second) = (net_case(rng, 701, 5, 33, 1, False) for _ in range(2))
    members = [(weight, init, linear_layers(trunk)) for weight, init, *trunk in (first, second)]
    wanted, found = torch.randn(2, 701, 1), []
    for together in (False, True):
        for threads in (1, 2, 5):
            native.set_threads(threads)
            outs = mish_mlps(x, members) if together else [mish_mlp(x, *member) for member in members]
            loss = sum((out * weight).sum() for out, weight in zip(outs, wanted, strict=True))
            leaves = [
                x,
                *first[:2],
                *second[:2],
                *(p for _, _, layers in members for one in layers for p in (one.weight, one.bias)),
            ]
            found.append([*outs, *torch.autograd.grad(loss, leaves, retain_graph=True)])
            alone = torch.autograd.grad(outs[1].sum(), leaves, allow_unused=True)
            assert [gradient is None for gradient in alone] == [
                False,
                True,
                True,
                False,
                False,
                *[True] * 6,
                *[False] * 6,
            ]
            found[-1] += [gradient for gradient in alone if gradient is not None]
    native.set_threads(None)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@torch.no_grad()
def test_autocast_does_not_reach_into_the_sampler(make_net: Any) -> None:
    for precision in ("fp32", "bf16"):
        net, state, prompt = make_net(3, 2, 4), torch.randn(4, 3), torch.randn(4)
        expected = reverse_diffusion(
            copy.deepcopy(net), state, prompt, sampler_coefficients(), seed=1, precision=precision
        )
        with torch.autocast("cpu"):
            found = reverse_diffusion(net, state, prompt, sampler_coefficients(), seed=1, precision=precision)
        assert torch.equal(found, expected)


def test_impossible_sizes_are_refused() -> None:
    module = native.module()
    for sizes in ((0, 1, 1, 1, 1), (8, 0, 1, 1, 1), (8, 1, -1, 1, 1), (8, 1, 1, 0, 1), (8, 1, 1, 1, 0)):
        with pytest.raises(ValueError, match="start at 1"):
            module.tape_sizes(*sizes, False)


def test_empty_batch_has_zero_gradients(make_net: Any) -> None:
    net = make_net(3, 2, 4)
    reverse_diffusion(net, torch.zeros(0, 3), torch.zeros(4), sampler_coefficients(), seed=1).sum().backward()
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in net.parameters())


def operator_arguments(
    rng: np.random.Generator,
    make_net: Any,
    S: int = 5,
    A: int = 3,
    Z: int = 4,
    H: int = 18,
    B: int = 6,
    N: int = 2,
    K: int = 4,
    keep: bool = True,
    noise: bool = False,
) -> tuple[Any, ...]:
    """Those of the operator itself, each of its own memory."""
    net = make_net(S, A, Z, H)
    action_weight, _, state_weight, _, bias = net.first_layer()
    numbers = [
        torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((B, S), (K, H), (K, 6), (K + 1, B, N, A))
    ]
    trunk = [part.detach().requires_grad_() for layer in net.layers[1:] for part in (layer.weight, layer.bias)]
    leaves = [t.detach().clone().requires_grad_() for t in (numbers[0], state_weight, bias, numbers[1], action_weight)]
    key = torch.tensor([5], dtype=torch.int64)
    return (*leaves, trunk, numbers[2], key, numbers[3] if noise else None, 1.0, 1.5, N, False, keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("noise", [True, False])
def test_opcheck_of_the_chain(rng: np.random.Generator, make_net: Any, keep: bool, noise: bool) -> None:
    # The tape comes from a pool: what it holds in the padding of its parts is whatever was there, and no result.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = operator_arguments(rng, make_net, keep=keep, noise=noise)
    torch.library.opcheck(torch.ops.llmdpd.reverse_diffusion, arguments, test_utils=tests if not keep else tests[:3])


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_the_net(rng: np.random.Generator, make_net: Any, keep: bool) -> None:
    state, _, bias, _, _, trunk = operator_arguments(rng, make_net)[:6]
    weight = torch.randn(18, 5, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (state, weight, bias, trunk, False, keep)
    torch.library.opcheck(torch.ops.llmdpd.mish_mlp, arguments, test_utils=tests if not keep else tests[:3])


def test_the_compilers_mark_is_that_of_torch() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@pytest.mark.slow
def test_compiles_without_a_graph_break(rng: np.random.Generator, make_net: Any) -> None:
    net, plan = make_net(3, 2, 4), sampler_coefficients()
    state, prompt = torch.randn(6, 3), torch.randn(4)

    def step(state: Tensor, prompt: Tensor) -> Tensor:
        return 2.0 * reverse_diffusion(net, state + 1.0, prompt, plan, seed=7)

    # What is traced is what matters here; aot_eager runs the traced graphs, forward and backward, without a C compiler.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (6, 9):
        state = torch.randn(batch, 3)
        expected, found = step(state, prompt), compiled(state, prompt)
        assert relative(found, expected) <= 1e-6
        wanted, gradients = (
            torch.autograd.grad(out.square().sum(), list(net.parameters())) for out in (expected, found)
        )
        for one, other in zip(gradients, wanted, strict=True):
            assert relative(one, other) <= 1e-5
    with torch.no_grad():
        assert relative(compiled(state, prompt), step(state, prompt)) <= 1e-6


# The three-layer net


def net_case(rng: np.random.Generator, B: int, inputs: int, H: int, outputs: int, per_row: bool) -> list[Tensor]:
    first = [(B, inputs), (H, inputs), (B, H) if per_row else (H,)]
    shapes = [*first, (H, H), (H,), (H, H), (H,), (outputs, H), (outputs,)]
    return [
        torch.from_numpy((rng.normal(size=shape) * 1.3 / np.sqrt(shape[-1])).astype(np.float32)).requires_grad_()
        for shape in shapes
    ]


def linear_layers(trunk: list[Tensor]) -> list[torch.nn.Linear]:
    layers = []
    for weight, bias in zip(trunk[::2], trunk[1::2], strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight, layer.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
        layers.append(layer)
    return layers


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("size", "precision"),
    [
        *(
            (size, "fp32")
            for size in [(256, 43, 256, 1), (37, 7, 33, 4), (1, 1, 1, 1), (1301, 5, 24, 20), (12, 0, 9, 3)]
        ),
        *((size, "bf16") for size in [(256, 43, 256, 1), (37, 7, 65, 4)]),
    ],
)
def test_the_net_and_its_gradients(
    rng: np.random.Generator, isa: str, size: tuple[int, int, int, int], per_row: bool, precision: Any
) -> None:
    tensors = net_case(rng, *size, per_row)
    layers = linear_layers(tensors[3:])
    out = mish_mlp(*tensors[:3], layers, precision)
    assert precision == "fp32" or not torch.equal(out, mish_mlp(*tensors[:3], layers))
    # Of one sign: nowhere do the terms of a sum cancel, of which bfloat16 would leave nothing.
    weight = torch.from_numpy(rng.uniform(0.5, 1.5, size=out.shape).astype(np.float32))
    inputs = [*tensors[:3], *(part for layer in layers for part in (layer.weight, layer.bias))]
    found = torch.autograd.grad((out * weight).sum(), inputs)
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = mish_mlp_reference(*double[:3], double[3:])
    wanted = torch.autograd.grad((expected * weight.double()).sum(), double)
    assert relative(out, expected) <= ACTIONS[precision]
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other, least=1e-2) <= GRADIENTS[precision]


def test_the_net_takes_slices_of_columns_and_leading_axes(rng: np.random.Generator) -> None:
    x, weight, init, *trunk = net_case(rng, 12, 5, 16, 3, False)
    wide = torch.randn(16, 11)
    wide[:, 2:7] = weight.detach()
    layers = linear_layers(trunk)
    plain = mish_mlp(x, weight, init, layers)
    assert torch.equal(mish_mlp(x, wide[:, 2:7], init, layers), plain)
    assert torch.equal(mish_mlp(x.reshape(3, 4, 5), weight, init, layers), plain.reshape(3, 4, 3))


def test_device_and_dtype_alone_choose_who_computes_the_net(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the C++ module float32 on the CPU is an error, and not PyTorch in silence."""
    x, weight, init, *trunk = (tensor.detach() for tensor in net_case(rng, 6, 5, 16, 3, False))
    layers = linear_layers(trunk)
    monkeypatch.setattr("llmdpd.ops.native.available", lambda: (False, "no module; pip install ."))
    for precision in ("fp32", "bf16"):
        with pytest.raises(RuntimeError, match=r"no module; pip install \."):
            mish_mlp(x, weight, init, layers, precision)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mish_mlp(x, weight, init, layers)
        assert torch.equal(mixed, mish_mlp_reference(x, weight, init, trunk))
    double = [tensor.double() for tensor in (x, weight, init, *trunk)]
    expected = mish_mlp_reference(double[0], double[1], double[2], double[3:])
    assert torch.equal(mish_mlp(double[0], double[1], double[2], linear_layers(double[3:])), expected)
