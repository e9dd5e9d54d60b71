"""The two shapes of a hidden layer's product, and the first layer: what forward and backward are made of.

Of two H x H layers in a row the first takes its input in blocks of columns and computes its whole output; the second
takes its whole input and computes its output in blocks (`narrow`). So neither has to cut a tensor that is in registers.
Weights are packed (see `pack.py`): [HP, HP], padded with zeros.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import product

FEW = tl.constexpr(8)


@triton.jit
def of_learner(learner, W_a, trunk, biases, HP: tl.constexpr, AP: tl.constexpr):
    """A learner's W_a, w2, b2, w3, b3, w4, b4 in what is packed of several.

    Pointers with a known distance from each other: each by itself would take a pair of registers.
    """
    W_a, trunk = W_a + learner * AP * HP, trunk + learner * (2 * HP + AP) * HP
    biases += learner * (3 * HP + AP)
    return W_a, trunk, biases + HP, trunk + HP * HP, biases + 2 * HP, trunk + 2 * HP * HP, biases + 3 * HP


@triton.jit
def columns(a, A: tl.constexpr, AP: tl.constexpr):
    """The columns of a [BM, AP] as A vectors [BM], where they are few: then W_a a is a few multiply-adds an element."""
    found = ()
    if A <= FEW:
        for j in tl.static_range(A):
            found = found + (tl.sum(tl.where(tl.arange(0, AP)[None, :] == j, a, 0.0), axis=1),)  # noqa: RUF005
    return found


@triton.jit
def first_layer(
    u, tau_k, W_a, state, live, a, parts, inner,
    H: tl.constexpr, A: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """u + tau_k + W_a a, columns `inner`: float32 [BM, BK]. state: int32 [BM]; a: [BM, AP], and its `columns`.

    W_a is packed: its transpose, [AP, HP]. A of 0: u alone.
    """
    held = inner < H
    z = tl.load(u + state[:, None] * H + inner[None, :], mask=live[:, None] & held[None, :], other=0.0)
    if A == 0:
        return z
    z = z + tl.load(tau_k + inner, mask=held, other=0.0)[None, :]
    if A <= FEW:
        for j in tl.static_range(A):
            z += parts[j][:, None] * tl.load(W_a + j * HP + inner)[None, :]
        return z
    else:
        weight = tl.load(W_a + tl.arange(0, AP)[:, None] * HP + inner[None, :])
        return product(a, weight, z, FP32)


@triton.jit
def transposed(weight, inner, outer, HP: tl.constexpr):
    """The block W[outer, inner]^T of a packed matrix: [inner, outer]."""
    return tl.load(weight + outer[None, :] * HP + inner[:, None])


@triton.jit
def straight(weight, inner, outer, HP: tl.constexpr):
    """The block W[inner, outer] of a packed matrix."""
    return tl.load(weight + inner[:, None] * HP + outer[None, :])


@triton.jit
def narrow(
    h, exchange, weight, zero, outer, z, TRANSPOSED: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """z + W h^T (or W^T h^T where TRANSPOSED), rows `outer`: float32 [BN, BM].

    Weights stand on the left, so that warps share out their rows, which are many, and not the tile's, which may be 16.
    WHOLE: h [BM, HP] is the operand. Otherwise it is read back BK columns at a time from `exchange`, [BM, HP].
    """
    if WHOLE:
        inner = zero + tl.arange(0, HP)
        block = transposed(weight, outer, inner, HP) if TRANSPOSED else straight(weight, outer, inner, HP)
        return product(block, tl.trans(h), z, FP32)
    else:
        for begin in range(0, H, BK):
            inner = zero + begin + tl.arange(0, BK)
            part = tl.load(exchange + tl.arange(0, BM)[None, :] * HP + inner[:, None])
            block = transposed(weight, outer, inner, HP) if TRANSPOSED else straight(weight, outer, inner, HP)
            z = product(block, part, z, FP32)
        return z


@triton.jit
def output_layer(h, w4, outer, epsilon, HP: tl.constexpr, AP: tl.constexpr, FP32: tl.constexpr):
    """epsilon^T [AP, BM] plus what the rows `outer` of h3^T, [BN, BM], give to it."""
    return product(straight(w4, tl.arange(0, AP), outer, HP), h, epsilon, FP32)
