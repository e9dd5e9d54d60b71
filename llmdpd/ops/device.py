"""Where things run: the CPU and how many of its cores, or a CUDA device that is there."""

from __future__ import annotations

import torch

from llmdpd.ops import native
from llmdpd.utils.cores import usable_cores
from llmdpd.utils.device import check_device, matmul_precision

__all__ = ["check_device", "matmul_precision", "use_threads"]


def use_threads(count: int) -> None:
    """Take `count` CPU threads from here on for the C++ kernels (0: one a core), and one for torch.

    torch's second thread would save little of these small operations, and on a busy machine costs many times what they
    take: it waits for its partner at each of them.
    """
    torch.set_num_threads(1)
    native.set_threads(count or usable_cores())
