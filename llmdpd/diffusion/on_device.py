"""A sampler's coefficients where its network is: copied there once, as a copy from the host is waited for."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from llmdpd.ops.arguments import SamplerCoefficients
from llmdpd.ops.compiling import constant_when_compiled


@constant_when_compiled
def coefficient_tensors(content: bytes, device: torch.device) -> tuple[Tensor, Tensor]:
    """The time indices int64 [K] and the table float32 [K, 6] of `SamplerCoefficients.content` on a device."""
    return _kept(content, device)


@cache  # a captured CUDA graph may read them as long as the process lives
def _kept(content: bytes, device: torch.device) -> tuple[Tensor, Tensor]:
    # Plain tensors, whatever mode the first caller was in: they serve all.
    with torch.inference_mode(False), _disable_current_modes():
        timesteps, table = map(torch.tensor, SamplerCoefficients.read(content))
        return timesteps.to(device), table.to(device)
