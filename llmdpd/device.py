"""Where things run: the CPU, or a CUDA device that is there."""

from __future__ import annotations

import re

import torch

from llmdpd.errors import InputError


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
            "the GPU that was asked for is absent",
            field="device",
            found=f"{count} GPUs; torch has {built}",
            expected=name,
            hint="use --device cpu, or install a CUDA build of torch",
        )
    return torch.device("cuda" if found[1] is None else f"cuda:{int(found[1])}")
