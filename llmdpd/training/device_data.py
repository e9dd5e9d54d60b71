"""A data set that lies on a CUDA device once: a batch is gathered and changed there, in one launch.

The host draws what a batch is of, with the random numbers that it draws for batches of its own memory, and moves those
few numbers. Gathering and changing batches there takes it longer than a small network's iteration takes the device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from llmdpd.data import TrajectoryDataset
from llmdpd.data.augmentation import scene_columns
from llmdpd.ops import triton
from llmdpd.tasks.layout import Layout

_log = logging.getLogger(__name__)
_MOST_BYTES = 4 << 30
_SHARE = 0.5  # of the device's free memory
_ALIGNED = 64  # numbers, as CUDA's own allocator aligns


def device_data(dataset: TrajectoryDataset, device: torch.device, layout: Layout | None) -> DeviceData | None:
    """The data on a device, to be changed by this layout, if any; None where it has none of the kernels, or no room."""
    if device.type != "cuda" or dataset.stored or triton.unavailable() is not None:
        return None
    most = min(_MOST_BYTES, int(_SHARE * torch.cuda.mem_get_info(device)[0]))
    needed = bytes_of(dataset)
    if needed > most:
        _log.info("data stay on the host: %d MB, and %d MB of %s are for them", needed >> 20, most >> 20, device)
        return None
    _log.info("data lie on %s: %d MB", device, needed >> 20)
    return DeviceData(dataset, device, layout)


def bytes_of(dataset: TrajectoryDataset) -> int:
    """Bytes of a data set's numbers on a device."""
    columns = dataset.numbers() | {"terminals": dataset.terminals}
    return sum(4 * math.prod(column.shape) for column in columns.values() if column is not None)


class DeviceData:
    """The numbers of a data set as tensors on a device.

    Args:
        dataset: in memory.
        device: of the tensors.
        layout: what numbers of states and actions are, where batches are changed; None where none is.
    """

    def __init__(self, dataset: TrajectoryDataset, device: torch.device, layout: Layout | None) -> None:
        columns = dataset.numbers() | {"terminals": dataset.terminals}
        self._columns = {
            name: None if column is None else torch.from_numpy(np.ascontiguousarray(column, np.float32)).to(device)
            for name, column in columns.items()
        }
        self._scene = None
        if layout is not None:
            from llmdpd.kernels.batches import Scene

            table, pivot, places = scene_columns(layout, dataset.state_dim)
            axes = layout.horizontal if layout.rotatable else ()
            move = tuple(layout.move[axis] for axis in axes)
            there, about = torch.from_numpy(table).to(device), torch.from_numpy(pivot).to(device)
            self._scene = Scene(there, about, layout.dimensions, places, axes, move)

    def gather(
        self, rows: Tensor, shown: Tensor | None, prompts: int, change: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """The transitions of a batch by their names there, and the steps of demonstrations, under what changes them.

        Args:
            rows: int64 [B], in groups of equal size, one a prompt. prompts: P.
            shown: rows of the demonstrations' steps, int64 [P, T], -1 for none.
            change: as `Augmentation.numbers` of the prompts, moved to the device; None where nothing is changed.
        """
        from llmdpd.kernels import batches as kernel

        shapes = {name: (len(rows), *c.shape[1:]) for name, c in self._columns.items() if c is not None}
        if shown is not None:
            widths = {"states": shapes["observations"][1], "actions": shapes["actions"][1]}
            shapes |= {f"tokens.{name}": (*shown.shape, width) for name, width in widths.items()}
        sizes = [-(-math.prod(shape) // _ALIGNED) * _ALIGNED for shape in shapes.values()]
        parts = zip(torch.empty(sum(sizes), device=rows.device).split(sizes), shapes.items(), strict=True)
        out = {name: part[: math.prod(shape)].view(shape) for part, (name, shape) in parts}
        scene = None if change is None else self._scene
        given = {"expert_actions": None, **out}
        with triton.on_device(rows.device):
            kernel.launch(self._columns, rows, shown, prompts, given, scene, change or {}).run()
        return out
