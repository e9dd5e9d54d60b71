"""Scenes rotated about the vertical and mirrored: what is observed and done there, by a layout."""

from __future__ import annotations

import torch
from torch import Tensor

from llmdpd.tasks.layout import Layout


def rotation(angle: Tensor, side: Tensor) -> Tensor:
    """Matrices [P, 2, 2], for row vectors of the horizontal axes: mirrored where `side` [P] is -1, then rotated by
    `angle` [P]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([side * cos, side * sin], -1), torch.stack([-sin, cos], -1)], -2)


class Turning:
    """Rotates observations and actions of a layout that is `rotatable`.

    Orientations are left as they are: features of kind `relative` don't read them.
    """

    def __init__(self, layout: Layout) -> None:
        points = [indices for point in layout.points for indices in (point.at, point.previous) if indices]
        self._points = torch.tensor(points)
        self._axes, pivot = list(layout.horizontal), layout.pivot or (0.0,) * layout.dimensions
        self._pivot = [pivot[axis] for axis in self._axes]
        self._move = [layout.move[axis] for axis in self._axes]

    def states(self, states: Tensor, matrix: Tensor) -> Tensor:
        """Observations [P, M, S] of rotated scenes, a matrix [P, 2, 2] each; absent points (zeros) stay absent."""
        points = states[..., self._points]
        pivot = states.new_tensor(self._pivot)
        moved = (points[..., self._axes] - pivot) @ matrix[:, None] + pivot
        states = states.clone()
        there = (points != 0).any(-1, keepdim=True)
        states[..., self._points[:, self._axes]] = torch.where(there, moved, points[..., self._axes])
        return states

    def actions(self, actions: Tensor, matrix: Tensor) -> Tensor:
        """Actions [P, M, A] in the same scenes, within ±1."""
        actions = actions.clone()
        actions[..., self._move] = (actions[..., self._move] @ matrix).clamp(-1, 1)
        return actions
