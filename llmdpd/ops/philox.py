"""Counter-based noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, in PyTorch on any device.

The same (seed, row, draw, action dim) gives the same number on every backend and in every batch split. This is the
oracle for the native implementations, which hold its numbers to 2e-6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 by 32 bit product, in int64 arithmetic that cannot overflow."""
    low = (x & 0xFFFF) * multiplier
    high = (x >> 16) * multiplier + (low >> 16)
    return (high >> 16) & _MASK, ((high & 0xFFFF) << 16 | (low & 0xFFFF)) & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (in int64 tensors, broadcast together) from four counter and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def philox_normal(
    seed: int | Tensor,
    batch: int,
    samples: int,
    draws: int,
    action_dim: int,
    device: torch.device | str = "cpu",
    states: Tensor | None = None,
) -> Tensor:
    """Standard normal noise, float64 [draws, batch, samples, action_dim].

    Key = seed; counter = (row, draw, block of four action dims, stream 0). With one seed, an int or int64 [], the row
    is `state * samples + sample`; with seeds [batch] (int64) each state has its own key and the row is the sample, so
    that a state's noise does not depend on the batch that it is in. `states`, int64 [batch], are the states' places in
    a greater batch whose noise it is a part of, by default 0 … batch - 1.

    Raises:
        ValueError: seeds of another shape.
    """
    if isinstance(seed, Tensor) and seed.ndim and seed.shape != (batch,):
        raise ValueError(f"seeds {list(seed.shape)} of {batch} states; one for all has no dimension")
    blocks = -(-action_dim // 4)
    sample = torch.arange(samples, device=device)
    if isinstance(seed, Tensor):
        key = seed.to(device=device, dtype=torch.int64).reshape(-1, 1)
    else:
        key = torch.full((1, 1), signed64(seed), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor) and seed.ndim:
        row = sample.expand(batch, samples)
    else:
        place = torch.arange(batch, device=device) if states is None else states
        row = place[:, None] * samples + sample
    shape = (draws, batch, samples, blocks)
    counter = (
        row[None, :, :, None].expand(shape) & _MASK,
        torch.arange(draws, device=device)[:, None, None, None].expand(shape),
        torch.arange(blocks, device=device).expand(shape),
        torch.zeros((), dtype=torch.int64, device=device).expand(shape),
    )
    words = philox4x32(counter, ((key & _MASK)[None, :, :, None], ((key >> 32) & _MASK)[None, :, :, None]))
    normals = []
    for even, odd in ((words[0], words[1]), (words[2], words[3])):
        radius = torch.sqrt(-2.0 * torch.log(((even >> 8) + 1).double() * 2.0**-24))
        angle = 2.0 * math.pi * ((odd >> 8).double() * 2.0**-24)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1).reshape(draws, batch, samples, blocks * 4)[..., :action_dim]


def signed64(seed: int) -> int:
    """An int in the 64-bit two's complement range, so that any Python int is a key."""
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF  # int(): numpy's integers overflow here
    return seed - (1 << 64) if seed >= 1 << 63 else seed
