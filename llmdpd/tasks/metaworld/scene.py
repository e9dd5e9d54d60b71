"""Meta-World's scenes rotated about the vertical and mirrored: their observations and actions."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from llmdpd.tasks.metaworld.layout import FRAME, GOAL, HAND, OBJECT, SECOND

_PIVOT = (0.0, 0.6)  # the table's middle: rotated about it, points stay on the table
_STARTS = (*(frame + part.start for frame in (0, FRAME) for part in (HAND, OBJECT, SECOND)), GOAL.start)
_POINTS = torch.tensor([[start, start + 1, start + 2] for start in _STARTS])


def turn_matrix(angle: Tensor, side: Tensor) -> Tensor:
    """Matrices [P, 2, 2], for row vectors of x and y: mirrored where `side` [P] is -1, then rotated by `angle` [P]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([side * cos, side * sin], -1), torch.stack([-sin, cos], -1)], -2)


@lru_cache(8)
def view_matrices(count: int) -> Tensor:
    """Matrices [V, 2, 2]: evenly spaced rotations, each plain and mirrored; the first is the identity.

    `count` is 1 or even. For rotations by right angles the entries are exactly -1, 0 and 1.
    """
    turns = max(count // 2, 1)
    angle = 2 * math.pi * torch.arange(turns, dtype=torch.float64).repeat_interleave(min(count, 2)) / turns
    side = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(turns)[:count]
    matrix = turn_matrix(angle, side)
    whole = matrix.round()
    return torch.where((matrix - whole).abs() < 1e-9, whole, matrix).float()


def turned(states: Tensor, matrix: Tensor) -> Tensor:
    """Observations [P, M, 39] of rotated scenes, a matrix [P, 2, 2] each; absent objects (zeros) stay absent.

    Orientations of objects are left as they are: features of kind `relative` do not read them.
    """
    points = states[..., _POINTS]
    pivot = states.new_tensor(_PIVOT)
    moved = (points[..., :2] - pivot) @ matrix[:, None] + pivot
    states = states.clone()
    states[..., _POINTS[:, :2]] = torch.where((points != 0).any(-1, keepdim=True), moved, points[..., :2])
    return states


def turned_actions(actions: Tensor, matrix: Tensor) -> Tensor:
    """Actions [P, M, 4] (three of the hand's movement, one of the gripper) in the same scenes, within their bounds."""
    return torch.cat([(actions[..., :2] @ matrix).clamp(-1, 1), actions[..., 2:]], dim=-1)
