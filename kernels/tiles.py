"""Which tile a shape gets: a small table, by reasoning from bytes and operations (docs/gpu.md), never by trial at run time.

A choice depends on shapes alone, so that it is the same while a CUDA graph is captured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """BM rows to a program; BK columns of the input, or BN of the output, of a product at a time."""

    BM: int
    BK: int
    BN: int
    warps: int
    stages: int
    WHOLE: bool
    """Whether a hidden activation as a whole is an operand (tensor cores), or goes through the exchange buffer."""


def padded_width(H: int) -> int:
    """HP: hidden columns, a power of two."""
    return max(64, 1 << (H - 1).bit_length())


def padded_actions(A: int) -> int:
    """AP: action dims, a power of two from 16 (the least depth of a product)."""
    return max(16, 1 << (A - 1).bit_length())


def forward_tile(rows: int, H: int, bf16: bool) -> Tile:
    HP = padded_width(H)
    if not bf16:
        return Tile(BM=16, BK=16, BN=min(HP, 64), warps=8 if HP > 64 else 4, stages=2, WHOLE=False)
    if rows > 16 * 264 and HP <= 256:
        return Tile(BM=64, BK=32, BN=32, warps=4, stages=2, WHOLE=True)
    return Tile(BM=16, BK=32, BN=32, warps=4 if HP <= 128 else 8, stages=3, WHOLE=True)


def backward_tile(rows: int, H: int, bf16: bool) -> Tile:
    return forward_tile(rows, H, bf16)
