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
def product(a, b, z):
    """z + a b, accumulated in float32; operands in float32 are not rounded to tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), z, input_precision="ieee")
    else:
        return tl.dot(a, b, z, input_precision="ieee")


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
