"""Mish, its derivative, and the bound on actions."""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .arithmetic import INTERPRETED


@triton.jit
def _quotient(x, y):
    """x / y for y in [2, 2^60], where the device's one-instruction reciprocal is good to 2 units in the last place."""
    if INTERPRETED:
        return x / y
    else:
        return libdevice.fast_dividef(x, y)


@triton.jit
def mish(x):
    """x tanh(softplus(x)) = x n / (n + 2) with n = e^x (e^x + 2): one exponential and one division."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * _quotient(n, n + 2.0)


@triton.jit
def mish_and_slope(x):
    """mish(x) and mish'(x) = n r + 4 x e (e + 1) r^2, with r = 1 / (n + 2)."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    r = _quotient(1.0, n + 2.0)
    ratio = n * r
    return x * ratio, ratio + x * (4.0 * e * (e + 1.0) * r * r)


@triton.jit
def bounded(x, clip):
    """x held to [-clip, clip]; NaN stays NaN."""
    return tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))
