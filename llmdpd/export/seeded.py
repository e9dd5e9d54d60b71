"""Counter-based noise inside an exported module: `llmdpd.ops.philox`, in the operations that other runtimes have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmdpd.export.action import Action

_MASK, _LOW = 0xFFFFFFFF, 0xFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Seeded(nn.Module):
    """An `Action` that draws its noise from a seed for each state, with the numbers of every other backend."""

    def __init__(self, action: Action) -> None:
        super().__init__()
        self.action = action

    def forward(self, observation: Tensor, step: Tensor, seed: Tensor, before: Tensor | None = None) -> Tensor:
        """As `Action.forward`, with seed int64 [B] in place of noise and choice: keys of `Seeds`."""
        action, numbers = self.action, self.action.chunk * self.action.action_dim
        # A draw past the chain's is the choice's.
        draws = action.coefficients.steps + 1 + action.needs_choice
        drawn = normals(seed, draws, action.samples, numbers)
        choice = drawn[-1, :, 0, 0] if action.needs_choice else None
        noise = drawn[: action.coefficients.steps + 1, ..., :numbers]
        found: Tensor = action(observation, step, noise, before, choice)
        return found


def normals(seed: Tensor, draws: int, samples: int, numbers: int) -> Tensor:
    """Standard normals float32 [draws, B, samples, A] of seeds int64 [B], A a multiple of 4 from `numbers` on.

    In float32, the numbers are within 2e-6 of those of `llmdpd.ops.philox.philox_normal`.
    """
    shape = (2, draws, seed.shape[0], samples, -(-numbers // 4))
    key = torch.stack([seed & _MASK, (seed >> 32) & _MASK])[:, None, :, None, None]
    rows, blocks = torch.arange(shape[3])[:, None].expand(shape[3:]), torch.arange(shape[4]).expand(shape[3:])
    even = torch.stack([rows, blocks])[:, None, None].expand(shape)
    draw = torch.arange(draws)
    odd = torch.stack([draw, torch.zeros_like(draw)])[:, :, None, None, None].expand(shape)
    even, odd = _philox(even, odd, key)
    uniform = ((even >> 8) + 1).float() * 2.0**-24
    turns = (odd >> 8).float() * 2.0**-24
    # Within half a turn of 0, where the angle's rounding is least.
    angle = 2.0 * math.pi * torch.where(turns >= 0.5, turns - 1.0, turns)
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return torch.cat([pairs[0], pairs[1]], dim=-1).flatten(3)


def _philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The counter's words 0 and 2, and 1 and 3, each two beside each other: half as many operations."""
    weyl, multiplier = (torch.tensor(pair)[:, None, None, None, None] for pair in (_WEYL, _MULTIPLIERS))
    other = torch.tensor([1, 0])
    for number in range(10):
        if number:
            key = (key + weyl) & _MASK
        high, low = _multiply(even, multiplier)
        even, odd = high.index_select(0, other) ^ odd ^ key, low.index_select(0, other)
    return even, odd


def _multiply(x: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 by 32 bit product, in int64 arithmetic that cannot overflow."""
    low = (x & _LOW) * multiplier
    high = (x >> 16) * multiplier + (low >> 16)
    return high >> 16, (high & _LOW) * (_LOW + 1) + (low & _LOW)
