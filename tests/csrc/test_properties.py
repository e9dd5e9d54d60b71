"""What holds for every native operation whatever its sizes: hypothesis draws sizes, memory layouts, threads and faults.

Numbers come from numpy with a drawn seed; a failing example prints the line that repeats it. A new entry point is a
function that makes a `Call`, and a line in `ENTRIES`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmdpd.diffusion import NoiseMLP, SamplerCoefficients, philox_normal, reverse_diffusion, sampler_coefficients
from llmdpd.ops import native
from llmdpd.ops.mish_mlp import mish_mlp, mish_mlp_reference

Inputs = dict[str, Tensor]
Run = Callable[[Any, Inputs], Tensor]


@dataclasses.dataclass(frozen=True, repr=False)
class Call:
    """An operation with all that it is given, and the same in PyTorch on any dtype."""

    weights: nn.Module
    rows: Inputs  # row b of each belongs to row b of the result
    shared: Inputs
    run: Run
    reference: Run
    tolerance: float  # relative L2
    gradient_tolerance: float

    def __repr__(self) -> str:
        shapes = {
            name: tuple(tensor.shape) for name, tensor in [*self.inputs.items(), *self.weights.named_parameters()]
        }
        return f"Call(tolerance={self.tolerance}, {shapes})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis would print every number
        printer.text(repr(self))

    @property
    def inputs(self) -> Inputs:
        return {**self.rows, **self.shared}

    def part(self, rows: slice) -> Tensor:
        return self.run(self.weights, {name: tensor[rows] for name, tensor in self.rows.items()} | self.shared)

    def __call__(self, **changed: Tensor) -> Tensor:
        return self.run(self.weights, self.inputs | changed)


def floats(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def randomise(module: nn.Module, rng: np.random.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1.2 * floats(rng, *parameter.shape) / max(parameter.shape[-1], 1) ** 0.5)


def random_plan(rng: np.random.Generator, steps: int, clipped: bool) -> SamplerCoefficients:
    """A sampler's own table; or, for few steps, one in which every coefficient matters."""
    clip = [0.7, 3.0, None][rng.integers(3)] if clipped else None
    if steps > 5 or rng.integers(2):
        return sampler_coefficients(rng.choice(["ddpm", "ddim", "dpm++2m"]), steps=steps, clip=clip)
    table = {name: rng.uniform(0.2, 0.8, steps) * rng.choice([-1, 1], steps) for name in "peABCS"}
    table["S"] = np.abs(table["S"])  # a deviation
    return dataclasses.replace(sampler_coefficients("ddpm", steps=steps), clip=clip, **table)


def chain(
    rng: np.random.Generator, B: int, S: int, A: int, Z: int, H: int, N: int, K: int, clipped: bool, precision: Any
) -> Call:
    net, plan = NoiseMLP(S, A, Z, H, 4), random_plan(rng, K, clipped)
    randomise(net, rng)
    rows, shared = {"state": floats(rng, B, S)}, {}
    if rng.integers(2):
        rows["prompt"] = floats(rng, B, Z)
    else:
        shared["prompt"] = floats(rng, Z)
    if rng.integers(2):
        rows["noise"] = floats(rng, B, K + 1, N, A)
    else:
        rows["seed"] = torch.from_numpy(rng.integers(-(2**63), 2**63, B))

    def native_run(net: NoiseMLP, given: Inputs) -> Tensor:
        noise = given["noise"].transpose(0, 1) if "noise" in given else None
        state, prompt, seed = given["state"], given["prompt"], given.get("seed")
        return reverse_diffusion(net, state, prompt, plan, N, seed, noise, backend="cpp", precision=precision)

    def reference(net: NoiseMLP, given: Inputs, precision: Any = precision) -> Tensor:
        state = given["state"]
        if "noise" in given:
            noise = given["noise"].transpose(0, 1)
        else:
            noise = philox_normal(given["seed"], B, N, K + 1, A).to(state.dtype)
        if state.dtype == torch.float64:
            precision = "fp32"
        prompt = given["prompt"]
        return reverse_diffusion(net, state, prompt, plan, N, noise=noise, backend="reference", precision=precision)

    return Call(net, rows, shared, native_run, reference, *tolerances(precision, H))


class Trunk(nn.Module):
    """The three layers that follow the first, whose weights are slices of the columns of `first`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, steps: int = 0) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(hidden, inputs + 2))
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)])
        if steps:
            self.tau = nn.Parameter(torch.empty(steps, hidden))

    def parts(self) -> list[Tensor]:
        return [part for layer in self.layers for part in (layer.weight, layer.bias)]


def operator(
    rng: np.random.Generator, B: int, S: int, A: int, Z: int, H: int, N: int, K: int, clipped: bool, bf16: bool
) -> Call:
    """The registered operator alone: the chain without what torch computes before it."""
    trunk, plan = Trunk(A + S, H, A, K), random_plan(rng, K, clipped)
    randomise(trunk, rng)
    own, keep, start = bool(rng.integers(2)), bool(rng.integers(2)), float(rng.uniform(0.5, 1.5))
    rows = {"state": floats(rng, B, S), "seed": torch.from_numpy(rng.integers(-(2**63), 2**63, B))}
    shared = {}
    (rows if own else shared)["u_z"] = floats(rng, B, H) if own else floats(rng, H)
    table = plan.table()

    def native_run(trunk: Trunk, given: Inputs) -> Tensor:
        W_a, W_s = trunk.first[:, 1 : A + 1], trunk.first[:, A + 1 : -1]
        return torch.ops.llmdpd.reverse_diffusion(
            given["state"], W_s, given["u_z"], trunk.tau, W_a, trunk.parts(), torch.from_numpy(table),
            given["seed"], None, start, plan.bound, N, bf16, keep,
        )[0]  # fmt: skip

    def reference(trunk: Trunk, given: Inputs) -> Tensor:
        W_a, W_s = trunk.first[:, 1 : A + 1], trunk.first[:, A + 1 : -1]
        double = trunk.first.dtype == torch.float64
        noise = philox_normal(given["seed"], B, N, K + 1, A).to(trunk.first.dtype)
        u = (F.linear(given["state"], W_s) + given["u_z"])[:, None, :]
        a, previous = start * noise[0], torch.zeros_like(noise[0])
        for k, (p_k, e_k, A_k, B_k, C_k, S_k) in enumerate(table.tolist()):
            h = F.mish(F.linear(a, W_a) + u + trunk.tau[k])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16 and not double):
                for layer in trunk.layers[:-1]:
                    h = F.mish(layer(h))
                x0 = (p_k * a + e_k * trunk.layers[-1](h)).clamp(-plan.bound, plan.bound)
            a, previous = A_k * a + B_k * x0 + C_k * previous + S_k * noise[k + 1], x0
        return a.clamp(-plan.bound, plan.bound)

    return Call(trunk, rows, shared, native_run, reference, *tolerances("bf16" if bf16 else "fp32", H))


def mlp(rng: np.random.Generator, B: int, S: int, A: int, Z: int, H: int, N: int, K: int, clipped: bool) -> Call:
    trunk = Trunk(S + Z, H, A)
    randomise(trunk, rng)
    rows, shared = {"x": floats(rng, B, S + Z)}, {}
    if rng.integers(2):
        rows["init"] = floats(rng, B, H)
    else:
        shared["init"] = floats(rng, H)

    def native_run(trunk: Trunk, given: Inputs) -> Tensor:
        return mish_mlp(given["x"], trunk.first[:, 1:-1], given["init"], list(trunk.layers))

    def reference(trunk: Trunk, given: Inputs) -> Tensor:
        return mish_mlp_reference(given["x"], trunk.first[:, 1:-1], given["init"], trunk.parts())

    return Call(trunk, rows, shared, native_run, reference, *tolerances("fp32", H))


def tolerances(precision: str, H: int) -> tuple[float, float]:
    """Of results and of gradients. Between a few bfloat16 numbers nothing averages out."""
    if precision == "fp32":
        return 2e-5, 1e-4
    return (2e-2, 5e-2) if H >= 64 else (0.1, 0.25)


ENTRIES: dict[str, Callable[..., Call]] = {
    "chain": functools.partial(chain, precision="fp32"),
    "chain, bf16": functools.partial(chain, precision="bf16"),
    "operator": functools.partial(operator, bf16=False),
    "operator, bf16": functools.partial(operator, bf16=True),
    "mish_mlp": mlp,
}
NATIVE = ("operator", "operator, bf16", "mish_mlp")  # no part in torch, whose sums may depend on its own threads
SIZES = {"B": (0, 70), "S": (0, 50), "A": (1, 40), "Z": (0, 40), "H": (1, 300), "N": (1, 60), "K": (1, 20)}
# Too small for torch's own threads, which don't survive a fork, and large enough for ours.
SMALL = {"B": (12, 40), "A": (1, 8), "H": (1, 100), "N": (1, 3), "K": (1, 5)}
WORK = 60_000_000  # multiply-adds: an example takes milliseconds


@st.composite
def calls(
    draw: st.DrawFn, entries: tuple[str, ...] = tuple(ENTRIES), smooth: bool = False, **ranges: tuple[int, int]
) -> Call:
    """With `smooth`, a bfloat16 chain is short and has no clips: where rounding decides one, gradients jump."""
    sizes = {name: draw(st.integers(*bounds), label=name) for name, bounds in (SIZES | ranges).items()}
    while sizes["B"] * sizes["N"] * sizes["K"] * sizes["H"] * (2 * sizes["H"] + 80) > WORK:
        largest = max(("B", "N", "K"), key=lambda name: sizes[name])
        sizes[largest] = max(sizes[largest] // 2, ranges.get(largest, SIZES[largest])[0])
    entry = draw(st.sampled_from(entries), label="entry")
    clipped = not (smooth and "bf16" in entry)
    if not clipped:
        sizes["K"] = min(sizes["K"], 5)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    return ENTRIES[entry](rng, **sizes, clipped=clipped)


# Under sanitizers, which are slow, and look at the memory and not at the numbers.
FEWER = int(os.environ.get("LLMDPD_FEWER_EXAMPLES", "1"))


def examples(count: int) -> Any:
    """Fresh examples each run; the blob that a failure prints repeats it."""
    unchecked = list(HealthCheck)
    return settings(max_examples=count // FEWER, deadline=None, print_blob=True, suppress_health_check=unchecked)


ISAS = st.sampled_from(native.module().runnable_isas())
ROW_SPLITS = st.lists(st.integers(0, 70), max_size=4)


@contextlib.contextmanager
def on(isa: str = "", threads: int = 1) -> Iterator[None]:
    """This instruction set and number of threads, the best one and one thread afterwards."""
    native.module().set_isa(isa)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        native.module().set_isa("")
        torch.set_num_threads(1)


def double(call: Call) -> tuple[nn.Module, Inputs]:
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in call.inputs.items()}
    return copy.deepcopy(call.weights).double(), inputs


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2; of a handful of numbers all may happen to lie near 0, where no relative error holds."""
    assert found.shape == expected.shape
    size = max(float(expected.norm()), 0.3 * expected.numel() ** 0.5)
    return float((found.double() - expected).norm()) / size if size else 0.0


def same(found: Tensor, expected: Tensor) -> bool:
    """The same bits; NaNs equal each other."""
    return np.array_equal(found.detach().numpy(), expected.detach().numpy(), equal_nan=True)


def strided(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in other layouts."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]  # 4 bytes off any wider alignment
    yield flat.view(tensor.shape).copy_(tensor)
    for dim in range(tensor.ndim):
        wide = torch.full([n + 2 if d == dim else n for d, n in enumerate(tensor.shape)], -7).to(tensor.dtype)
        yield wide.narrow(dim, 1, tensor.shape[dim]).copy_(tensor)
        wide = torch.full([2 * n if d == dim else n for d, n in enumerate(tensor.shape)], -7).to(tensor.dtype)
        yield wide[(slice(None),) * dim + (slice(None, None, 2),)].copy_(tensor)
    yield torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(*reversed(range(tensor.ndim))).copy_(tensor)


@examples(150)
@given(call=calls(), isa=ISAS, threads=st.integers(1, 8))
@torch.no_grad()
def test_agrees_with_the_reference_in_float64(call: Call, isa: str, threads: int) -> None:
    with on(isa, threads):
        found = call()
    assert found.dtype == torch.float32
    weights, inputs = double(call)
    expected = call.reference(weights, inputs)
    # Many steps can amplify rounding: then PyTorch's own in that precision is as far off.
    rounding = distance(call.reference(call.weights, call.inputs), expected)
    assert distance(found, expected) <= max(call.tolerance, 4 * rounding)


@examples(80)
@given(call=calls(B=(0, 20), N=(1, 10)), isa=ISAS)
@torch.no_grad()
def test_layout_in_memory_does_not_matter(call: Call, isa: str) -> None:
    with on(isa):
        expected = call()
        for name, tensor in call.inputs.items():
            for other in strided(tensor):
                assert torch.equal(other, tensor)
                assert same(call(**{name: other}), expected), (name, other.stride(), other.storage_offset())


@examples(40)
@given(call=calls(B=(1, 70)), isa=ISAS)
@torch.no_grad()
def test_expanded_rows_are_those_rows(call: Call, isa: str) -> None:
    with on(isa):
        for name, tensor in call.rows.items():
            expanded = tensor[:1].expand_as(tensor)
            assert same(call(**{name: expanded}), call(**{name: expanded.clone()}))


@examples(80)
@given(call=calls(), isa=ISAS, threads=st.integers(2, 8), cuts=ROW_SPLITS)
@torch.no_grad()
def test_threads_and_the_split_of_the_batch_do_not_matter(call: Call, isa: str, threads: int, cuts: list[int]) -> None:
    with on(isa):
        expected = call()
    with on(isa, threads):
        assert same(call(), expected)
        edges = sorted({0, len(expected), *(min(cut, len(expected)) for cut in cuts)})
        parts = [call.part(slice(first, last)) for first, last in itertools.pairwise(edges)]
        assert same(torch.cat([*parts, expected[:0]]), expected)


@examples(80)
@given(call=calls(B=(1, 70)), isa=ISAS, data=st.data(), value=st.sampled_from([np.nan, np.inf, -np.inf, 1e38, 1e-42]))
@torch.no_grad()
def test_a_poisoned_row_stays_alone(call: Call, isa: str, data: st.DataObject, value: float) -> None:
    choices = [name for name, tensor in call.rows.items() if tensor.is_floating_point() and tensor[0].numel()]
    if not choices:
        return
    name = data.draw(st.sampled_from(choices), label="poisoned")
    row = data.draw(st.integers(0, len(call.rows[name]) - 1), label="row")
    poisoned = call.rows[name].clone()
    poisoned[row].view(-1)[data.draw(st.integers(0, poisoned[row].numel() - 1), label="element")] = value
    with on(isa, 2):
        expected, found = call(), call(**{name: poisoned})
    others = torch.arange(len(expected)) != row
    assert same(found[others], expected[others])
    if name == "state" and np.isnan(value):
        assert found[row].isnan().all()


def gradients(call: Call, run: Run, weights: nn.Module, inputs: Inputs, grad: Tensor) -> Inputs:
    """Of sum(grad * result), by name; of noise there is none."""
    inputs = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point() and name != "noise")
        for name, tensor in inputs.items()
    }
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad and tensor.numel()}
    wanted |= dict(weights.named_parameters())
    found = torch.autograd.grad(run(weights, inputs), list(wanted.values()), grad.to(wanted[next(iter(wanted))].dtype))
    return dict(zip(wanted, found, strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2; of a tensor of zeros, whether it is one."""
    assert found.shape == expected.shape
    difference, size = float((found.double() - expected).norm()), float(expected.norm())
    return difference / size if size else float(difference > 0)


def settled(call: Call, weights: nn.Module, inputs: Inputs, grad: Tensor, expected: Inputs) -> bool:
    """Whether the gradients stay where they are when all numbers move by a few roundings: no clip hangs on one."""
    for nudge in (1 - 1e-6, 1 + 1e-6):
        moved = copy.deepcopy(weights)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(nudge)
        near = {name: tensor * nudge if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        found = gradients(call, call.reference, moved, near, grad)
        if any(error(found[name], expected[name]) > call.gradient_tolerance / 2 for name in expected):
            return False
    return True


@examples(120)
@given(call=calls(smooth=True), isa=ISAS, threads=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_gradients_agree_with_the_reference_in_float64(call: Call, isa: str, threads: int, seed: int) -> None:
    weights, inputs = double(call)
    with torch.no_grad():
        result = call.reference(weights, inputs)
    grad = floats(np.random.default_rng(seed), *result.shape)
    with on(isa, threads):
        found = gradients(call, call.run, call.weights, call.inputs, grad)
    expected = gradients(call, call.reference, weights, inputs, grad)
    assume(settled(call, weights, inputs, grad, expected))
    theirs = gradients(call, call.reference, call.weights, call.inputs, grad)
    # Where terms cancel, PyTorch's own in that precision are as far off.
    bound = max(call.gradient_tolerance, *(4 * error(theirs[name], expected[name]) for name in found))
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert error(tensor, expected[name]) <= bound, name


@examples(80)
@given(call=calls(entries=NATIVE), isa=ISAS, threads=st.integers(2, 8), seed=st.integers(0, 2**32 - 1))
def test_native_gradients_do_not_depend_on_threads(call: Call, isa: str, threads: int, seed: int) -> None:
    with on(isa):
        grad = floats(np.random.default_rng(seed), *call().shape)
        expected = gradients(call, call.run, call.weights, call.inputs, grad)
    with on(isa, threads):
        found = gradients(call, call.run, call.weights, call.inputs, grad)
    for name, tensor in found.items():
        assert same(tensor, expected[name]), name


@examples(12)
@given(several=st.lists(calls(), min_size=2, max_size=5), isa=ISAS)
def test_calls_from_several_python_threads(several: list[Call], isa: str) -> None:
    with on(isa, 3), torch.no_grad():
        expected = [call() for call in several]
        wrong: list[object] = []
        ready = threading.Barrier(len(several))

        def work(first: int) -> None:
            try:
                ready.wait(timeout=60)
                with torch.no_grad():  # each thread has a mode of its own
                    for i in range(3 * len(several)):
                        which = (first + i) % len(several)
                        if not same(several[which](), expected[which]):
                            wrong.append(which)
            except Exception as error:
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(first,)) for first in range(len(several))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
            assert not worker.is_alive()
    assert wrong == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 on: fork in a process with threads
@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@examples(12)
@given(before=calls(**SMALL), after=calls(**SMALL), isa=ISAS)
@torch.no_grad()
def test_a_forked_child_gets_the_same(before: Call, after: Call, isa: str) -> None:
    with on(isa, 3):
        before()
        expected = after()
        child = os.fork()
        if child == 0:  # whatever happens, it must not come back into pytest
            status = 1
            try:
                signal.alarm(30)
                status = 0 if same(after(), expected) and before() is not None else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert same(after(), expected)
