"""Meta-World's scenes rotated about the vertical and mirrored: what is observed and done there."""

from __future__ import annotations

import torch
from torch import Tensor

from llmdpd.tasks.metaworld.layout import FRAME, GOAL, HAND, OBJECT, SECOND

_PIVOT = (0.0, 0.6)  # the table's middle: rotated about it, places stay on the table
_STARTS = (*(frame + part.start for frame in (0, FRAME) for part in (HAND, OBJECT, SECOND)), GOAL.start)
_POINTS = torch.tensor([[start, start + 1, start + 2] for start in _STARTS])


def rotation(angle: Tensor, side: Tensor) -> Tensor:
    """Matrices [P, 2, 2], for row vectors of x and y: mirrored where `side` [P] is -1, then rotated by `angle` [P]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([side * cos, side * sin], -1), torch.stack([-sin, cos], -1)], -2)


def rotated(states: Tensor, matrix: Tensor) -> Tensor:
    """Observations [P, M, 39] of rotated scenes, a matrix [P, 2, 2] each; absent objects (zeros) stay absent.

    Orientations of objects are left as they are: features of kind `relative` don't read them.
    """
    points = states[..., _POINTS]
    pivot = states.new_tensor(_PIVOT)
    moved = (points[..., :2] - pivot) @ matrix[:, None] + pivot
    states = states.clone()
    states[..., _POINTS[:, :2]] = torch.where((points != 0).any(-1, keepdim=True), moved, points[..., :2])
    return states


def rotated_actions(actions: Tensor, matrix: Tensor) -> Tensor:
    """Actions [P, M, 4] (three of the hand's movement, one of the gripper) in the same scenes, within their bounds."""
    return torch.cat([(actions[..., :2] @ matrix).clamp(-1, 1), actions[..., 2:]], dim=-1)
