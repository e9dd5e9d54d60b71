"""What the retrieval context keeps of demonstrations as they are, on a CUDA device in one launch.

`llmdpd.nn.context.retrieval` defines it in PyTorch, and the tests hold this to the same numbers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from llmdpd.ops import triton


def may_read(states: Tensor) -> bool:
    """Whether demonstrations are on a device that has the kernel: what is asked first, and costs nothing."""
    return states.is_cuda


def reads(mask: Tensor, given: Tensor | None, actions: Tensor, places: Tensor) -> bool:
    """Whether the kernel reads these: float32 on a CUDA device, without gradient, under no mode or compiler."""
    parts = [actions, places, *([] if given is None else [given])]
    return (
        may_read(places)
        and mask.dtype is torch.bool
        and all(part.dtype is torch.float32 and part.device == mask.device for part in parts)
        and not any(part.requires_grad for part in parts)
        and min(mask.numel(), actions.shape[2], places.shape[2]) > 0
        and triton.unavailable() is None
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
    )


def read(
    mask: Tensor,
    given: Tensor | None,
    actions: Tensor,
    places: Tensor,
    lookahead: tuple[int, ...],
    geometry: int,
    similarity: bool,
) -> dict[str, Tensor]:
    """The memory's parts `bias`, `waypoint_bias`, `waypoints`, and with similarity `there`.

    mask bool [P, T]; given [P, 1], see `Keep`; actions [P, T, A]; places [P, T, C], of which `geometry` numbers are
    found so many steps ahead.
    """
    from llmdpd.kernels import prompt_memory as kernel

    (P, T), C, new = mask.shape, places.shape[2], places.new_empty
    found = actions.shape[2] + len(lookahead) * geometry
    there = new(P, T + 1, C) if similarity else None
    raw = kernel.Raw(new(P, T + 1), new(P, T + 1), new(P, T + 1, found), there)
    with triton.on_device(places.device):
        mask, actions, places = mask.contiguous(), actions.contiguous(), places.contiguous()
        given = None if given is None else given.contiguous()
        kernel.launch(mask, given, actions, places, _steps(lookahead, places.device), geometry, raw).run()
    memory = {"bias": raw.bias[:, None, None], "waypoint_bias": raw.waypoint_bias[:, None, None]}
    memory["waypoints"] = raw.waypoints[:, None]
    return memory if there is None else memory | {"there": there}


@cache  # a captured CUDA graph may read them as long as the process lives
def _steps(lookahead: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False), _disable_current_modes():
        return torch.tensor(lookahead, dtype=torch.int32).to(device)
