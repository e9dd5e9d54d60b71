"""Rounding and products as tensor cores do them, on a device and in triton's interpreter.

The interpreter (triton 3.6 to 3.9) truncates bfloat16's bits where hardware rounds to nearest, and multiplies the bit
patterns of bfloat16 operands as if they were integers. Here it computes what hardware computes, so that its tests test
the kernels.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """float32 x as KIND (bfloat16 or float32), to nearest even; NaN stays NaN."""
    if INTERPRETED and tl.bfloat16 == KIND:
        bits = x.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x).to(KIND)
    else:
        return x.to(KIND)


@triton.jit
def _tf32(x):
    """float32 x to 11 significant bits, ties away from zero, as `cvt.rna.tf32.f32`; NaN and infinity stay."""
    bits = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), bits, x)


@triton.jit
def _cut(x):
    """float32 x without the 13 bits that a tensor core does not read of a tf32 operand."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, z, FP32: tl.constexpr):
    """z + a b, accumulated in float32. FP32 is how float32 operands are multiplied, as `input_precision` of `tl.dot`.

    `ieee`: by multiply-adds. `tf32x3`: on tensor cores, as a sum of three products of halves, which keeps 21 bits.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
        if FP32 == "ieee":
            return tl.dot(a, b, z, input_precision="ieee")
        big_a, big_b = _tf32(a), _tf32(b)
        if FP32 == "tf32":
            return tl.dot(big_a, big_b, z, input_precision="ieee")
        small = tl.dot(_cut(a - big_a), big_b, tl.zeros_like(z), input_precision="ieee")
        small = tl.dot(big_a, _cut(b - big_b), small, input_precision="ieee")
        return z + tl.dot(big_a, big_b, tl.where(small == small, small, 0.0), input_precision="ieee")
    else:
        return tl.dot(a, b, z, input_precision=FP32)


@triton.jit
def fresh_zero():
    """Zero, but the compiler can't know: an index that it is part of is computed where it stands.

    Otherwise every address of every product is computed once before the chain's loop and kept in registers, which
    overflow.
    """
    if INTERPRETED:
        return 0
    else:
        zero = tl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        return tl.multiple_of(zero, 512)
