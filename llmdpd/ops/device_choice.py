"""The soft choice among samples on a CUDA device, in one launch.

`llmdpd.methods.llmdpd.network.sample_actions` defines it in PyTorch, and the tests hold this to it; a number that lies
within 2e-6 of two samples' border may fall to the other one, as the kernels' noise is of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops import triton

MOST_SAMPLES = 1024
"""Of a state: what a program holds in registers."""


def may_choose(values: Tensor) -> bool:
    """Whether values are on a device that has the kernel: what is asked first, and costs nothing."""
    return values.is_cuda


def chooses(values: Tensor, actions: Tensor, seeds: Tensor) -> bool:
    """Whether the kernel chooses by such values [B, N]: float32 on a CUDA device, under no mode or compiler."""
    return (
        may_choose(values)
        and values.dtype is actions.dtype is torch.float32
        and values.device == actions.device == seeds.device
        and values.shape[1] <= MOST_SAMPLES
        and triton.unavailable() is None
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
    )


def chosen(values: Tensor, actions: Tensor, seeds: Tensor, draw: int, temperature: float) -> Tensor:
    """Of actions [B, N, A] one a state, [B, A]: by a softmax of values [B, N] / temperature, without gradient.

    Its random number is that of the seed, int64 [B], and the draw.
    """
    from llmdpd.kernels import choice as kernel

    found = actions.new_empty(actions.shape[0], actions.shape[2])
    with triton.on_device(values.device):
        values, actions, seeds = values.contiguous(), actions.contiguous(), seeds.contiguous()
        kernel.launch(values, actions, seeds, found, draw, temperature).run()
    return found
