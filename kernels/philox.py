"""Counter-based noise in the kernel: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, in float32.

`llmdpd.ops.philox` is the definition; these numbers differ from it by at most 2e-6. The hardware's logarithm and sine
are accurate to about 2^-21 absolute, which is little near a radius of 5 but everything near log(1), so both are
computed here: exact reductions in integers, then short series.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four 32-bit words from four counter and two key words (uint32, broadcast together)."""
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _log(u):
    """log(u) for normal u > 0, to a few units in the last place, near 1 too."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # leaves a mantissa in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    s = f / (f + 2.0)  # log(1 + f) = 2 artanh(s)
    t = s * s
    series = 1.0 + t * (1.0 / 3.0 + t * (1.0 / 5.0 + t * (1.0 / 7.0 + t * (1.0 / 9.0))))
    return exponent.to(tl.float32) * 0.6931471805599453 + 2.0 * s * series


@triton.jit
def cosine_and_sine(quarter, x):
    """Of so many quarters of a turn, int32, and x in [-pi/4, pi/4] beside.

    The device's own take memory for large angles, whether there are any or not.
    """
    t = x * x
    sine = x * (1.0 + t * (-1.0 / 6.0 + t * (1.0 / 120.0 + t * (-1.0 / 5040.0 + t * (1.0 / 362880.0)))))
    cosine = 1.0 + t * (-0.5 + t * (1.0 / 24.0 + t * (-1.0 / 720.0 + t * (1.0 / 40320.0 + t * (-1.0 / 3628800.0)))))
    swap = (quarter & 1) == 1
    first, second = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    first = tl.where(((quarter + 1) & 2) == 2, -first, first)
    second = tl.where((quarter & 2) == 2, -second, second)
    return first, second


@triton.jit
def box_muller(even, odd):
    """Two standard normals from two 32-bit words."""
    u = ((even >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24: in (0, 1], exact
    radius = tl.sqrt(-2.0 * _log(u))
    turn = (odd >> 8).to(tl.int32)  # in units of 2^-24 of a turn
    quarter = (turn + 2097152) >> 22
    x = (turn - (quarter << 22)).to(tl.float32) * 3.7450702829239286e-07  # 2 pi 2^-24: in [-pi/4, pi/4]
    first, second = cosine_and_sine(quarter, x)
    return radius * first, radius * second


@triton.jit
def normals(counter, draw, k0, k1, BM: tl.constexpr, AP: tl.constexpr):
    """Standard normals [BM, AP] of one draw; counter, k0, k1: uint32 [BM, 1]."""
    block = tl.arange(0, AP // 4).to(tl.uint32)[None, :]
    zero = tl.zeros([BM, AP // 4], tl.uint32)
    number = tl.full([BM, AP // 4], draw, tl.uint32)
    w0, w1, w2, w3 = philox4x32(counter + zero, number, block + zero, zero, k0 + zero, k1 + zero)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BM, AP])
