"""Devices by name, and the precision of torch's own matrix products."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Literal

import torch

from llmdpd.errors import InputError


def matmul_settings() -> tuple[str, str]:
    """How torch rounds the operands of its float32 matrix products, on CUDA and on the CPU.

    Each is one of none, ieee, tf32 and, on the CPU, bf16. It is known however it was set; torch's older function,
    `torch.get_float32_matmul_precision`, raises an error after settings by `torch.backends`.
    """
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def bfloat16_products() -> bool:
    """Whether torch's own float32 matrix products may have bfloat16 operands, as in `matmul_precision`."""
    return matmul_settings()[1] == "bf16"


@contextmanager
def matmul_precision(precision: Literal["fp32", "bf16"]) -> Iterator[None]:
    """With `bf16`, allow bfloat16 operands in torch's own float32 matrix products while the block runs.

    The library that computes a product may use them or not. On the CPUs that were tried the results are in float32 all
    the same, and several times as fast, since torch calls another library.
    """
    if precision == "fp32":
        yield
        return
    settings, named = matmul_settings(), "highest"
    with suppress(RuntimeError):  # it has no name where it was set by `torch.backends`
        named = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(named)
        backends: Any = torch.backends
        backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = settings


@cache
def automatic_device() -> tuple[str, str]:
    """The device for `auto`, and in words why: cuda where a GPU computes what it is asked for, else cpu."""
    if not torch.cuda.is_available():
        without = "" if torch.version.cuda else ", and torch is a build without CUDA"
        return "cpu", f"torch finds no GPU{without}"
    try:
        found = float((torch.arange(8.0, device="cuda") @ torch.ones(8, device="cuda")).cpu())
        name = torch.cuda.get_device_name()
    # A driver that is too old, a GPU of a kind that torch has no code for, one in use; what torch does late.
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        return "cpu", f"the GPU does not work: {(str(error) or repr(error)).splitlines()[0]}"
    return ("cuda", name) if found == 28.0 else ("cpu", f"the GPU computes wrongly: 28 is {found:g} on it")


def usable_gpus() -> int:
    """The number of GPUs that torch can use: with a driver that it can't use it counts those that it sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def seen_device() -> str:
    """cuda where torch sees a GPU, else cpu: as `automatic_device`, without starting CUDA to try it."""
    return "cuda" if usable_gpus() else "cpu"


def check_device(name: str | torch.device) -> torch.device:
    """The device of this name: cpu, cuda, cuda:N, or auto (see `automatic_device`).

    Raises:
        InputError: another kind of device, or a GPU that is absent.
    """
    if name == "auto":
        return torch.device(automatic_device()[0])
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if found is None:
        raise InputError("no such device", field="device", found=name, expected="auto, cpu, cuda or cuda:N")
    if str(name) == "cpu":
        return torch.device("cpu")
    count = usable_gpus()
    if int(found[1] or 0) >= count:
        found_here = f"{count} GPUs; torch has {torch.version.cuda or 'no CUDA (a CPU build)'}"
        hint = "use --device cpu, or install a CUDA build of torch"
        raise InputError(
            "the GPU that was asked for is absent", field="device", found=found_here, expected=name, hint=hint
        )
    return torch.device("cuda" if found[1] is None else f"cuda:{int(found[1])}")
