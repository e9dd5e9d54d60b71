"""State features on a CUDA device, in one launch; `llmdpd.nn.features` defines them, and the tests hold this to it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops import triton

if TYPE_CHECKING:
    from llmdpd.kernels.features import Tables
    from llmdpd.nn.features import StateFeatures

MOST_NUMBERS = 512
"""Of a state's features: what the kernel holds in registers."""
_tables: weakref.WeakKeyDictionary[nn.Module, tuple[torch.device, Tables]] = weakref.WeakKeyDictionary()


def may_read(state: Tensor) -> bool:
    """Whether states are on a device that has the kernels: what is asked first, and costs nothing."""
    return state.is_cuda


def reads(features: StateFeatures, state: Tensor) -> bool:
    """Whether the kernel reads such states: float32 on a CUDA device, without gradient, under no mode or compiler."""
    return (
        may_read(state)
        and state.dtype is torch.float32
        and features.mean.dtype is torch.float32
        and features.mean.device == state.device
        and not state.requires_grad
        and max(features.output_dim, features.geometry_dim) <= MOST_NUMBERS
        and triton.unavailable() is None
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch.is_autocast_enabled("cuda")
    )


def read(
    features: StateFeatures, state: Tensor, geometry: bool = False, times: tuple[Tensor, Tensor, float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Features of states [..., S], with `times` waves beside: [..., O]; and where asked for what is compared, [..., C].

    times: time steps [...], periods of the waves, and the time that counts as one in comparing.
    """
    from llmdpd.kernels import features as kernel

    leading, S = state.shape[:-1], state.shape[-1]
    rows = state.reshape(leading.numel(), S).contiguous()
    tables = _tables_of(features, state.device)
    waves, timed = (0, 0) if times is None else (2 * len(times[1]), 1)
    own = rows.new_empty(len(rows), len(tables.own) + waves)
    here = rows.new_empty(len(rows), len(tables.geometry) + timed) if geometry else None
    if times is not None:
        # Whole numbers are read as they are; of others the batch has float32.
        time = times[0] if times[0].dtype is torch.int64 else times[0].float()
        times = (time.reshape(-1).contiguous(), *times[1:])
    with triton.on_device(state.device):
        kernel.launch(rows, (features.mean, features.std), tables, own, here, times).run()
    place = None if here is None else here.view(*leading, here.shape[1])
    return own.view(*leading, own.shape[1]), place


def _tables_of(features: StateFeatures, device: torch.device) -> Tables:
    """The tables on a device, made once: they say nothing of the statistics, which the kernel reads itself."""
    from llmdpd.kernels.features import Tables
    from llmdpd.nn.feature_table import feature_tables

    kept = _tables.get(features)
    if kept is None or kept[0] != device:
        found = feature_tables(features)
        points = np.array(found.points, np.int32).reshape(len(found.points), -1) if found.points else np.zeros((0, 0))

        def moved(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)

        tables = [
            moved(part, dtype)
            for kinds, numbers in (found.own, found.geometry)
            for part, dtype in ((kinds, torch.int32), (numbers[:, 0], torch.float32))
        ]
        kept = _tables[features] = device, Tables._make([*tables, moved(points, torch.int32)])
    return kept[1]
