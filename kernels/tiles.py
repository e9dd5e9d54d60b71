"""Which tile a shape gets: a small table, never tried at run time, reasoned in docs/research-log/gpu.md.

A choice depends on shapes and the device's compute capability alone, so it is the same while a CUDA graph is captured.
`llmdpd.kernels.report` compiles every tile of the table and prints what it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Operands = Literal["bf16", "tf32x3", "ieee"]
"""What the trunk's products are made of: bfloat16, or float32 by tensor cores or multiply-adds."""

SMS = 128
"""About the number of multiprocessors of the devices this is for: up to that many tiles run all at once."""

LARGE_SHARED = (80, 87, 90, 100, 103, 110)
"""Compute capabilities with 163 KiB and more of shared memory to a program; the others have 99."""


@dataclass(frozen=True)
class Tile:
    """How a program works."""

    BM: int
    """Rows to a program."""
    BK: int
    """Columns of the input that a product takes at a time, where its output is whole."""
    BN: int
    """Columns of the output that a product makes at a time, where its input is whole."""
    warps: int
    stages: int
    """Blocks of weights on their way at a time."""
    WHOLE: bool = True
    """Whether a hidden activation as a whole is an operand, or goes through memory, as in float32."""


def padded_width(H: int) -> int:
    """HP: hidden columns, a power of two."""
    return max(64, 1 << (H - 1).bit_length())


def padded_states(S: int) -> int:
    """SP: state features, in whole blocks of 16."""
    return -(-S // 16) * 16


def padded_actions(A: int) -> int:
    """AP: action dims, a power of two from 16 (the least depth of a product)."""
    return max(16, 1 << (A - 1).bit_length())


def forward_tile(rows: int, H: int, A: int, operands: Operands, capability: int) -> Tile:
    """The tile for B * N rows. capability: 10 x major + minor.

    The fewest rows that let all tiles run at once; beyond that, as many as registers hold, because every tile reads all
    weights. 8 warps need BN = 128 not to repeat each other, 4 warps 64.
    """
    HP, few, some = padded_width(H), rows <= 16 * SMS, rows <= 32 * SMS
    if operands == "tf32x3":
        # Measured on an H200 at 256 rows: 144 us against 430 of `ieee`; BK = 64 takes 134, but triton 3.6 spills.
        if HP <= 128:
            return Tile(16 if few else 32, 32, 64, warps=4, stages=2, WHOLE=False)
        if few or HP > 256 or A > 16:
            return Tile(16, 32, 64 if A > 16 else 128, warps=8, stages=2, WHOLE=False)
        return Tile(32, 32, 128, warps=8, stages=2, WHOLE=False)
    if operands == "ieee":
        if HP <= 128:
            return Tile(16, 16, 64, warps=4, stages=2, WHOLE=False)
        if few or HP > 256 or A > 16:
            return Tile(16, 16, 64, warps=8, stages=2, WHOLE=False)
        return Tile(32, 32, 64, warps=8, stages=2, WHOLE=False)
    # Tensor cores that read weights from shared memory; elsewhere operands fill the registers (triton 3.9 spills).
    from_shared = 90 <= capability < 120
    if HP > 256:
        return Tile(16, 64, 128, warps=8, stages=2, WHOLE=False)
    if HP <= 128:
        return Tile(16 if few else 64, 32, 64, warps=4, stages=3)
    if few and capability in (80, 90) and A <= 16:
        return Tile(16, 32, 128, warps=4, stages=3)  # measured on an H200: 45 us against 54 of the next
    if some or A > 8:  # W_a a is a product then, and takes registers
        return Tile(16 if few else 32, 64, 128, warps=8, stages=2, WHOLE=few or from_shared)
    return Tile(64, 32, 128 if capability in LARGE_SHARED else 64, warps=8, stages=2, WHOLE=from_shared)


def backward_tile(rows: int, H: int, operands: Operands, capability: int) -> Tile:
    """The backward pass holds derivatives beside activations, so its tiles are smaller.

    It writes activations to memory anyway, so going through memory costs it little.
    """
    HP, few = padded_width(H), rows <= 16 * SMS
    if operands == "tf32x3":
        # Measured there: 470 us against 1,150 of `ieee`; with 4 warps 402, but 88 bytes and more are spilled.
        return Tile(16, 32, 64, warps=8 if HP > 128 else 4, stages=2, WHOLE=False)
    if operands == "ieee":
        return Tile(16, 16, 32, warps=8 if HP > 128 else 4, stages=2, WHOLE=False)
    if HP > 256:
        return Tile(16, 32, 128, warps=8, stages=2, WHOLE=False)
    if HP <= 128:
        return Tile(16 if few else 32, 32, 64, warps=4, stages=2, WHOLE=False)
    if few or capability < 90:
        return Tile(16, 64, 128, warps=8, stages=2, WHOLE=capability < 100)
    return Tile(32, 32, 128, warps=8, stages=2, WHOLE=False)
