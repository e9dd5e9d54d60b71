"""Where things run: the CPU and how many of its cores, or a CUDA device that is there."""

from __future__ import annotations

import re

import torch

from llmdpd.cores import usable_cores
from llmdpd.diffusion import native
from llmdpd.errors import InputError


def use_threads(count: int) -> None:
    """Take `count` CPU threads from here on for the C++ kernels (0: one a core), and one for torch.

    torch's second thread would save little of these small operations, and on a busy machine costs many times what they
    take: it waits for its partner at each of them.
    """
    torch.set_num_threads(1)
    native.set_threads(count or usable_cores())


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
