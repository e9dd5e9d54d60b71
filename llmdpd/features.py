"""State features: what the networks see of an observation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError

FeatureKind = Literal["normalised", "metaworld"]

METAWORLD_STATE_DIM = 39
_HAND, _OBJECT, _SECOND, _GOAL = slice(0, 3), slice(4, 7), slice(11, 14), slice(36, 39)
_PREVIOUS_HAND, _PREVIOUS_OBJECT = slice(18, 21), slice(22, 25)
_METAWORLD_RELATIVE = 5 * 3
_METAWORLD_VELOCITY = 2 * 3


class StateFeatures(nn.Module):
    """Observations [..., S] → features [..., F].

    `normalised`: (s - mean) / std, clipped to ±10, with the statistics of the TRAINING tasks alone. A dimension that is
    constant there keeps its scale; the others are not widened for it. `metaworld` adds, from Meta-World's layout of 39
    numbers, the differences between hand, objects and goal, once in units of 25 cm and once as tanh in units of 4 cm
    (how near is near), and the velocities of hand and object, from the previous frame that the observation carries.

    Raises:
        InputError: `metaworld` features for observations of another size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state_dim: int, kind: FeatureKind = "normalised") -> None:
        super().__init__()
        if kind == "metaworld" and state_dim != METAWORLD_STATE_DIM:
            raise InputError(
                "these features read Meta-World's observation layout",
                field="features",
                found=f"observations of {state_dim} numbers",
                expected=METAWORLD_STATE_DIM,
                hint="use features 'normalised'",
            )
        self.kind = kind
        self.state_dim = state_dim
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))

    @property
    def output_dim(self) -> int:
        """F."""
        return self.state_dim + (2 * _METAWORLD_RELATIVE + _METAWORLD_VELOCITY if self.kind == "metaworld" else 0)

    def fit(self, observations: Tensor) -> None:
        """Take mean and std [S] from the training tasks' observations [N, S]."""
        low, high = observations.amin(0), observations.amax(0)
        std = observations.std(0, correction=0)
        # Asked exactly: rounding gives many equal numbers a mean beside them, and so a deviation.
        constant = low == high
        self.mean.copy_(torch.where(constant, low, observations.mean(0)))
        self.std.copy_(torch.where(constant | (std <= 1e-6), 1.0, std))

    def forward(self, state: Tensor) -> Tensor:
        normalised = ((state - self.mean) / self.std).clamp(-10.0, 10.0)
        return torch.cat([normalised, *_metaworld(state)], dim=-1) if self.kind == "metaworld" else normalised


def _metaworld(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hand, thing, second, goal = (state[..., part] for part in (_HAND, _OBJECT, _SECOND, _GOAL))
    relative = torch.cat([thing - hand, second - hand, goal - hand, goal - thing, second - thing], dim=-1)
    velocity = torch.cat([hand - state[..., _PREVIOUS_HAND], thing - state[..., _PREVIOUS_OBJECT]], dim=-1)
    return 4.0 * relative, torch.tanh(25.0 * relative), 100.0 * velocity
