"""What native code is given wrongly: users get an `InputError` before it is reached; who goes round that gets an
exception, never a read or write elsewhere. Run it under `.ci/sanitize` to see the latter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safety_entries import ENTRIES, A, B, H, K, N, S, T, Z
from torch import nn

from llmdpd.diffusion import BackendUnavailableError, NoiseMLP, reverse_diffusion, sampler_coefficients
from llmdpd.errors import InputError

PLAN = sampler_coefficients("ddpm", steps=K)


def good_options() -> dict[str, Any]:
    return {
        "net": NoiseMLP(S, A, Z, H, T),
        "state": torch.ones(B, S),
        "prompt": torch.ones(B, Z),
        "plan": PLAN,
        "samples": N,
        "seed": 1,
        "backend": "cpp",
    }


WRONG_KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bool": lambda t: t.bool(),
    "int64": lambda t: t.long(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.double(),
    "complex64": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "a dimension more": lambda t: t[None],
    "nothing": lambda t: t.new_zeros(0),
    "a scalar": lambda t: t.new_zeros(()),
    "transposed": lambda t: t.mT if t.ndim > 1 else t[None],
}


@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("name", ["state", "prompt", "noise"])
def test_wrong_tensors_are_refused(name: str, kind: str) -> None:
    options = good_options() | {"seed": None, "noise": torch.ones(K + 1, B, N, A), "prompt": torch.ones(Z)}
    wrong = WRONG_KINDS[kind](options[name])
    with torch.no_grad():
        reverse_diffusion(**options)  # the network is packed: the next call takes the quick path where it can
    options[name] = wrong
    if name != "noise" and kind != "meta":
        options |= {"seed": 1, "noise": None}
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(InputError) as caught:
            reverse_diffusion(**options)
        assert caught.value.field in (name, "noise", "state")


@pytest.mark.parametrize("samples", [0, -1, 2**31, 2**32, 2**40, 2**62, 2**64])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_absurd_numbers_of_samples_are_refused(samples: int, batch: int) -> None:
    """Before memory is asked for, and where the product overflows 32 or 64 bits."""
    options = good_options() | {"samples": samples, "state": torch.ones(batch, S), "prompt": torch.ones(Z)}
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(InputError):
            reverse_diffusion(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_a_net_in_another_precision_is_refused(dtype: torch.dtype) -> None:
    options = good_options()
    options["net"].to(dtype)
    with pytest.raises(InputError):
        reverse_diffusion(**options)
    with pytest.raises(BackendUnavailableError):
        reverse_diffusion(**(options | {name: options[name].to(dtype) for name in ("state", "prompt")}))


def test_results_do_not_ask_for_gradients_where_nothing_does() -> None:
    options = good_options()
    assert reverse_diffusion(**options).requires_grad
    options["net"].requires_grad_(False)
    result = reverse_diffusion(**options)
    assert not result.requires_grad
    result.resize_(3)  # its memory is its own


@torch.no_grad()
def test_tensors_that_are_not_aligned() -> None:
    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        memory = bytearray(4 * tensor.numel() + 1)
        return torch.frombuffer(memory, dtype=torch.float32, offset=1).view(tensor.shape).copy_(tensor)

    options = good_options() | {"seed": None, "noise": torch.randn(K + 1, B, N, A), "state": torch.randn(B, S)}
    expected = reverse_diffusion(**options)
    for name in ("state", "prompt", "noise"):
        assert torch.equal(reverse_diffusion(**(options | {name: shifted(options[name])})), expected)
    options["net"].layers[1].weight = nn.Parameter(shifted(options["net"].layers[1].weight))
    assert torch.equal(reverse_diffusion(**options), expected)


@torch.no_grad()
def test_weights_that_are_not_contiguous_are_kept_or_copied() -> None:
    """A packed network must not look at a temporary copy of the weights in later calls."""
    options = good_options()
    net = options["net"]
    for layer in net.layers:
        wide = torch.randn(layer.in_features, 2 * layer.out_features)
        layer.weight = nn.Parameter(wide[:, ::2].T)
    for _ in range(3):
        expected = reverse_diffusion(**(options | {"backend": "reference"}))
        for _ in range(3):
            torch.testing.assert_close(reverse_diffusion(**options), expected, rtol=1e-3, atol=1e-5)
            gc.collect()
            torch.full((H, H), float("nan")), torch.full((H, S + A + Z + T), float("nan"))  # over freed memory
        net.layers[1].weight.mul_(0.5)


# Native code itself, past the checks in Python.


def wrong_arrays(array: np.ndarray, written: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays that must not be taken for this one."""
    for dim, size in enumerate(array.shape):
        for other in (size + 1, size - 1, 0):
            yield (
                f"{other} in dimension {dim}",
                np.ones([*array.shape[:dim], other, *array.shape[dim + 1 :]], array.dtype),
            )
    yield "a dimension more", array[None]
    yield "flat" if array.ndim > 1 else "a scalar", array.reshape(-1) if array.ndim > 1 else array[0].reshape(())
    for dtype in (np.float64, np.float16, np.int32, np.int64, array.dtype.newbyteorder()):
        yield f"in {np.dtype(dtype).str}", array.astype(dtype)
    if array.ndim > 1:
        if min(array.shape) > 1:
            yield "Fortran order", np.asfortranarray(array)
        yield "every other", np.ones([*array.shape[:-1], 2 * array.shape[-1]], array.dtype)[..., ::2]
    memory = bytearray(array.nbytes + 1)
    yield "not aligned", np.frombuffer(memory, array.dtype, offset=1).reshape(array.shape)
    if written:
        frozen = array.copy()
        frozen.flags.writeable = False
        yield "read-only", frozen


def wrong_arguments(arguments: dict[str, Any], written: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            for what, wrong in wrong_arrays(value, name in written):
                yield f"{name}: {what}", {name: wrong}
        elif isinstance(value, list):
            yield f"{name}: one less", {name: value[:-1]}
            yield f"{name}: one more", {name: [*value, value[0]]}
            for i, part in enumerate(value):
                for what, wrong in wrong_arrays(part, name in written):
                    yield f"{name}[{i}]: {what}", {name: [*value[:i], wrong, *value[i + 1 :]]}
        elif name.removeprefix("in_") in ("samples", "threads"):
            for number in (0, -1, 2**31, 2**32, 2**63, 1.5):
                yield f"{name} = {number}", {name: number}


def allowed(entry: str, what: str) -> bool:
    """What is none of the wrong arguments after all."""
    name, how = what.split(": ")
    if name == "tape":  # room for at least so much, which is an upper bound; or none: then none is kept or read
        return how.endswith("in dimension 0")
    if name in ("settings", "rate", "average_rate") and how == f"in {np.dtype(np.float64).str}":
        return True  # which is what they are in
    if name in ("times", "prompt_of", "place") and how == f"in {np.dtype(np.int64).str}":
        return True  # which is what they are in
    if entry == "add_up":  # tensors of any shape, of as many numbers together as each of any number of rows has
        return how in ("a dimension more", "flat") if name != "rows" else how in ("one less", "one more")
    if name == "pooled":
        return how.endswith("in dimension 1")  # of any width
    # Its columns beyond the others are the prompt's.
    return name == "first_weight" and how.endswith("in dimension 1") and not how.startswith("0")


@pytest.fixture
def shortened_arrays() -> Iterator[None]:
    """pybind11's messages print all arguments: whole arrays take most of a refusal's time."""
    with np.printoptions(threshold=0, edgeitems=1):
        yield


@pytest.mark.usefixtures("shortened_arrays")
@pytest.mark.parametrize("entry", ENTRIES)
def test_native_code_refuses_what_does_not_fit(entry: str) -> None:
    call, arguments, written = ENTRIES[entry]
    call(**arguments)
    taken = []
    for what, change in wrong_arguments(arguments, written):
        try:
            call(**(arguments | change))
        except (ValueError, TypeError):
            continue
        if ": " not in what or not allowed(entry, what):
            taken.append(what)
    assert taken == []
    if "tape" in arguments:
        with pytest.raises(ValueError, match="tape"):
            call(**(arguments | {"tape": arguments["tape"][: len(arguments["tape"]) // 2]}))


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs address space")
def test_a_process_without_room_for_threads_works_alone() -> None:
    """A thread's stack is 8 MB of address space; with less left, starting one fails."""
    code = """
        import resource
        import torch
        from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_coefficients
        torch.set_grad_enabled(False)
        torch.set_num_threads(1)
        net, state, prompt = NoiseMLP(3, 2, 5, 64), torch.randn(200, 3), torch.randn(5)
        def draw():
            return reverse_diffusion(net, state, prompt, sampler_coefficients("ddpm"), seed=1, backend="cpp")
        expected = draw()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4_000_000, used + 4_000_000))
        torch.get_num_threads = lambda: 8  # torch's own threads are not the matter
        assert torch.equal(draw(), expected)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
