"""State features: what the networks see of an observation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.tasks.metaworld.layout import GOAL, GRIPPER, HAND, OBJECT, SECOND, STATE_DIM, previous

FeatureKind = Literal["normalised", "metaworld", "relative", "raw"]

_ANY_LAYOUT = ("normalised", "raw")
_METAWORLD_RELATIVE = 5 * 3
_METAWORLD_VELOCITY = 2 * 3
_METAWORLD_OWN = 1 + 4  # gripper, and the heights of hand, both objects and goal
_METAWORLD_GEOMETRY = 4 * 3 + 1


class StateFeatures(nn.Module):
    """Observations [..., S] → features [..., F].

    `normalised`: (s - mean) / std, clipped to ±10, with the statistics of the TRAINING tasks alone. A dimension that is
    constant there keeps its scale; the others are not widened for it. `metaworld` adds, from Meta-World's layout of 39
    numbers, the differences between hand, objects and goal, once in units of 25 cm and once as tanh in units of 4 cm
    (how near is near), and the velocities of hand and object, from the previous frame that the observation carries.
    `relative` is those alone, with the gripper and the heights beside: where on the table something lies, and how it is
    turned, is left out, and what an observation doesn't have (its three numbers are zero) is at no distance. `raw` is
    the observation itself.

    Raises:
        InputError: features of Meta-World's layout for observations of another size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state_dim: int, kind: FeatureKind = "normalised") -> None:
        super().__init__()
        if kind not in _ANY_LAYOUT and state_dim != STATE_DIM:
            raise InputError(
                "these features read Meta-World's observation layout",
                field="features",
                found=f"observations of {state_dim} numbers",
                expected=STATE_DIM,
                hint="use features 'normalised'",
            )
        self.kind = kind
        self.state_dim = state_dim
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))

    @property
    def output_dim(self) -> int:
        """F."""
        if self.kind in _ANY_LAYOUT:
            return self.state_dim
        rest = 2 * _METAWORLD_RELATIVE + _METAWORLD_VELOCITY
        return rest + (self.state_dim if self.kind == "metaworld" else _METAWORLD_OWN)

    @property
    def geometry_dim(self) -> int:
        """G, of `geometry`."""
        return self.state_dim if self.kind in _ANY_LAYOUT else _METAWORLD_GEOMETRY

    def fit(self, observations: Tensor) -> None:
        """Take mean and std [S] from the training tasks' observations [N, S]."""
        low, high = observations.amin(0), observations.amax(0)
        std = observations.std(0, correction=0)
        # Compared exactly: rounding gives many equal numbers a mean beside them, and so a deviation.
        constant = low == high
        self.mean.copy_(torch.where(constant, low, observations.mean(0)))
        self.std.copy_(torch.where(constant | (std <= 1e-6), 1.0, std))

    def forward(self, state: Tensor) -> Tensor:
        if self.kind == "raw":
            return state
        if self.kind == "relative":
            return torch.cat([_own(state), *_metaworld(state, present_only=True)], dim=-1)
        normalised = ((state - self.mean) / self.std).clamp(-10.0, 10.0)
        return torch.cat([normalised, *_metaworld(state)], dim=-1) if self.kind == "metaworld" else normalised

    def geometry(self, state: Tensor) -> Tensor:
        """Where things are, as two moments can be compared by: [..., S] → [..., G].

        From Meta-World's layout both objects - hand, goal - hand, goal - object in units of 25 cm, and the gripper; of
        other observations all numbers, normalised or raw.
        """
        if self.kind in _ANY_LAYOUT:
            return self(state)
        return torch.cat([4.0 * _differences(state, present_only=True)[..., : 4 * 3], state[..., GRIPPER]], dim=-1)


def _differences(state: Tensor, present_only: bool) -> Tensor:
    hand, thing, second, goal = (state[..., part] for part in (HAND, OBJECT, SECOND, GOAL))
    parts = [thing - hand, second - hand, goal - hand, goal - thing, second - thing]
    if present_only:
        has_second, has_goal = (second != 0).any(-1, keepdim=True), (goal != 0).any(-1, keepdim=True)
        given = (None, has_second, has_goal, has_goal, has_second)
        parts = [part if known is None else part * known for part, known in zip(parts, given, strict=True)]
    return torch.cat(parts, dim=-1)


def _metaworld(state: Tensor, present_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hand, thing = state[..., HAND], state[..., OBJECT]
    relative = _differences(state, present_only)
    velocity = torch.cat([hand - state[..., previous(HAND)], thing - state[..., previous(OBJECT)]], dim=-1)
    return 4.0 * relative, torch.tanh(25.0 * relative), 100.0 * velocity


def _own(state: Tensor) -> Tensor:
    heights = [4.0 * state[..., part][..., 2:] for part in (HAND, OBJECT, SECOND, GOAL)]
    return torch.cat([state[..., GRIPPER], *heights], dim=-1)
