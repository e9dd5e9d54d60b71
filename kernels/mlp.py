"""The three-layer Mish net of several members, a tile of rows of one member in a program.

It is the chain's network without actions and time rows: its context is all of the first layer. Members are the two
critics, or the networks of several learners.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import rounded
from .backward import propagate, recompute
from .forward import context, epsilon_of


@triton.jit(do_not_specialize=["w1_rows", "w1_columns"])
def mlp_pack_kernel(
    w1, init, w2, b2, w3, b3, w4, b4, trunk, inputs, biases,
    w1_next, init_next, w2_next, b2_next, w3_next, b3_next, w4_next, b4_next, w1_rows, w1_columns,
    IN: tl.constexpr, IP: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, HP: tl.constexpr, OP: tl.constexpr,
    INITS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Program (n, member) copies rows n * BM and on of a member's matrices; its biases in program 0.

    `…_next`: how far the next member's lies. trunk: w2, w3, w4 in the compute precision, [M, 2 HP + OP, HP]; inputs:
    W1^T in float32, [M, IP, HP]; biases: init (where it is one for all rows), b2, b3, b4, [M, 4, HP]. All padded with
    zeros.
    """
    first, member = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    trunk, inputs, biases = trunk + member * (2 * HP + OP) * HP, inputs + member * IP * HP, biases + member * 4 * HP
    w1, w2, w3, w4 = w1 + member * w1_next, w2 + member * w2_next, w3 + member * w3_next, w4 + member * w4_next
    r, wide = (first + tl.arange(0, BM))[:, None], tl.arange(0, HP)
    there, own, column = r * H + wide[None, :], r * HP + wide[None, :], (wide < H)[None, :]
    kind: tl.constexpr = trunk.dtype.element_ty
    tl.store(trunk + own, rounded(tl.load(w2 + there, mask=column & (r < H), other=0.0), kind))
    tl.store(trunk + HP * HP + own, rounded(tl.load(w3 + there, mask=column & (r < H), other=0.0), kind))
    last = rounded(tl.load(w4 + there, mask=column & (r < OUT), other=0.0), kind)
    tl.store(trunk + 2 * HP * HP + own, last, mask=r < OP)
    for begin in range(0, IP, 16):
        place = (begin + tl.arange(0, 16))[None, :]
        part = tl.load(w1 + r * w1_rows + place * w1_columns, mask=(place < IN) & (r < H), other=0.0)
        tl.store(inputs + place * HP + r, part)
    if first == 0:
        if not INITS:
            tl.store(biases + wide, tl.load(init + member * init_next + wide, mask=wide < H, other=0.0))
        tl.store(biases + HP + wide, tl.load(b2 + member * b2_next + wide, mask=wide < H, other=0.0))
        tl.store(biases + 2 * HP + wide, tl.load(b3 + member * b3_next + wide, mask=wide < H, other=0.0))
        tl.store(biases + 3 * HP + wide, tl.load(b4 + member * b4_next + wide, mask=wide < OUT, other=0.0))


@triton.jit(do_not_specialize=["rows", "padded"])
def mlp_forward_kernel(
    x, init, trunk, inputs, biases, out, contexts, scratch, rows, padded,
    IN: tl.constexpr, IP: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, HP: tl.constexpr, OP: tl.constexpr,
    INITS: tl.constexpr, SHARE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The outputs [M, rows, OUT] of rows program_id(0) * BM and on of member program_id(1).

    x: [M / SHARE, rows, IN], each for SHARE members. init: [M, rows, H] where INITS, else among the biases. contexts,
    scratch: [M, padded, ·].
    """
    begin, member = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1).to(tl.int64)
    local, column = tl.arange(0, BM), tl.arange(0, OP)
    live = local < rows - begin
    own = member * padded + begin
    trunk, inputs, biases = trunk + member * (2 * HP + OP) * HP, inputs + member * IP * HP, biases + member * 4 * HP
    u, exchange = contexts + own * H, scratch + own * HP
    first = init + (member * rows + begin) * H if INITS else biases
    x += (member // SHARE * rows + begin) * IN
    context(x, inputs, first, u, local, live, IN, IP, H, HP, BM, BN, INITS, FP32)
    found = epsilon_of(
        tl.zeros([BM, OP], tl.float32), u, u, u, trunk, biases + HP, trunk + HP * HP, biases + 2 * HP,
        trunk + 2 * HP * HP, biases + 3 * HP, exchange, local, live,
        H, OUT, 0, HP, OP, BM, BK, BN, WHOLE, FP32, COMPUTE,
    )  # fmt: skip
    place = (member * rows + begin) * OUT + local[:, None] * OUT + column[None, :]
    tl.store(out + place, found, mask=live[:, None] & (column < OUT)[None, :])


@triton.jit(do_not_specialize=["rows", "padded"])
def mlp_backward_kernel(
    grad, x, init, trunk, inputs, biases, contexts, hidden, slopes, d_out, rows, padded,
    IN: tl.constexpr, IP: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, HP: tl.constexpr, OP: tl.constexpr,
    INITS: tl.constexpr, SHARE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """From the gradient [M, rows, OUT]: h and dz of the layers, [3, M, padded, HP], and it, rounded."""
    begin, member = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1).to(tl.int64)
    local, column = tl.arange(0, BM), tl.arange(0, OP)
    live = local < rows - begin
    own = member * padded + begin
    layer = tl.num_programs(1).to(tl.int64) * padded * HP
    trunk, inputs, biases = trunk + member * (2 * HP + OP) * HP, inputs + member * IP * HP, biases + member * 4 * HP
    u = contexts + own * H
    first = init + (member * rows + begin) * H if INITS else biases
    x += (member // SHARE * rows + begin) * IN
    context(x, inputs, first, u, local, live, IN, IP, H, HP, BM, BN, INITS, FP32)
    hidden, slopes = hidden + own * HP, slopes + own * HP
    recompute(
        tl.zeros([BM, OP], tl.float32), u, u, u, trunk, biases + HP, trunk + HP * HP, biases + 2 * HP,
        trunk + 2 * HP * HP, biases + 3 * HP, hidden, slopes, layer, local, live,
        H, OUT, 0, HP, OP, BM, BK, BN, WHOLE, FP32, COMPUTE,
    )  # fmt: skip
    place = (member * rows + begin) * OUT + local[:, None] * OUT + column[None, :]
    given = rounded(tl.load(grad + place, mask=live[:, None] & (column < OUT)[None, :], other=0.0), COMPUTE)
    tl.store(d_out + own * OP + local[:, None] * OP + column[None, :], given)
    propagate(
        given, u, trunk, trunk + HP * HP, trunk + 2 * HP * HP, slopes, layer,
        H, 0, HP, OP, BM, BK, BN, WHOLE, FP32, COMPUTE,
    )  # fmt: skip
