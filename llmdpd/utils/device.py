"""The torch device that a run computes on, and the precision of torch's own matrix products."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from llmdpd.errors import InputError


@contextmanager
def matmul_precision(precision: Literal["fp32", "bf16"]) -> Iterator[None]:
    """While the block runs, allow torch's own float32 matrix products bfloat16 operands, where `bf16`.

    Allowed, not made: what a product does with it is its library's choice. On the CPUs that were tried they come out in
    float32 all the same, and several times as fast, since torch asks another library for them.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bf16" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_device(name: str | torch.device) -> torch.device:
    """The device of this name: cpu, cuda or cuda:N.

    Raises:
        InputError: another kind of device, or a GPU that is absent.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if found is None:
        raise InputError("no such device", field="device", found=name, expected="cpu, cuda or cuda:N")
    if str(name) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if int(found[1] or 0) >= count:
        built = torch.version.cuda or "no CUDA (a CPU build)"
        raise InputError(
            "the GPU that was asked for is absent", field="device", found=f"{count} GPUs; torch has {built}",
            expected=name, hint="use --device cpu, or install a CUDA build of torch",
        )  # fmt: skip
    return torch.device("cuda" if found[1] is None else f"cuda:{int(found[1])}")
