"""The three-layer Mish net of one or two members on the same inputs, a tile of rows of one member in a program.

It is the chain's network without actions and time rows: its context is all of the first layer. Two members are the two
critics.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import rounded
from .backward import propagate, recompute
from .forward import context, epsilon_of


@triton.jit
def _pack_member(
    r, w1, init, w2, b2, w3, b3, w4, b4, trunk, inputs, biases, w1_rows, w1_columns,
    IN: tl.constexpr, IP: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, HP: tl.constexpr, OP: tl.constexpr,
    INITS: tl.constexpr,
):  # fmt: skip
    """Row r of the matrices, as `mlp_pack_kernel`; of the biases in program 0."""
    wide = tl.arange(0, HP)
    held = (wide < H) & (r + tl.zeros([HP], tl.int32) < H)
    kind: tl.constexpr = trunk.dtype.element_ty
    tl.store(trunk + r * HP + wide, rounded(tl.load(w2 + r * H + wide, mask=held, other=0.0), kind))
    tl.store(trunk + (HP + r) * HP + wide, rounded(tl.load(w3 + r * H + wide, mask=held, other=0.0), kind))
    last = tl.load(w4 + r * H + wide, mask=(wide < H) & (r + tl.zeros([HP], tl.int32) < OUT), other=0.0)
    tl.store(trunk + (2 * HP + r) * HP + wide, rounded(last, kind), mask=r + tl.zeros([HP], tl.int32) < OP)
    for begin in range(0, IP, 16):
        place = begin + tl.arange(0, 16)
        there = (place < IN) & (r + tl.zeros([16], tl.int32) < H)
        tl.store(inputs + place * HP + r, tl.load(w1 + r * w1_rows + place * w1_columns, mask=there, other=0.0))
    if r == 0:
        if not INITS:
            tl.store(biases + wide, tl.load(init + wide, mask=wide < H, other=0.0))
        tl.store(biases + HP + wide, tl.load(b2 + wide, mask=wide < H, other=0.0))
        tl.store(biases + 2 * HP + wide, tl.load(b3 + wide, mask=wide < H, other=0.0))
        tl.store(biases + 3 * HP + wide, tl.load(b4 + wide, mask=wide < OUT, other=0.0))


@triton.jit(do_not_specialize=["w1_rows", "w1_columns", "w1_rows_2", "w1_columns_2"])
def mlp_pack_kernel(
    w1, init, w2, b2, w3, b3, w4, b4, w1_2, init_2, w2_2, b2_2, w3_2, b3_2, w4_2, b4_2, trunk, inputs, biases,
    w1_rows, w1_columns, w1_rows_2, w1_columns_2,
    IN: tl.constexpr, IP: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, HP: tl.constexpr, OP: tl.constexpr,
    INITS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Program (r, member) copies row r of a member's matrices.

    trunk: w2, w3, w4 in the compute precision, [MEMBERS, 2 HP + OP, HP]; inputs: W1^T in float32, [MEMBERS, IP, HP];
    biases: init (where it is one for all rows), b2, b3, b4, [MEMBERS, 4, HP]. All padded with zeros.
    """
    r = tl.program_id(0)
    if tl.program_id(1) == 0:
        _pack_member(
            r, w1, init, w2, b2, w3, b3, w4, b4, trunk, inputs, biases, w1_rows, w1_columns,
            IN, IP, H, OUT, HP, OP, INITS,
        )  # fmt: skip
    elif MEMBERS > 1:
        _pack_member(
            r, w1_2, init_2, w2_2, b2_2, w3_2, b3_2, w4_2, b4_2, trunk + (2 * HP + OP) * HP, inputs + IP * HP,
            biases + 4 * HP, w1_rows_2, w1_columns_2, IN, IP, H, OUT, HP, OP, INITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "padded"])
def mlp_forward_kernel(
    x, init, trunk, inputs, biases, out, contexts, scratch, rows, padded,
    IN: tl.constexpr, IP: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, HP: tl.constexpr, OP: tl.constexpr,
    INITS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The outputs [MEMBERS, rows, OUT] of rows program_id(0) * BM and on of member program_id(1).

    init: [rows, H] where INITS, else among the biases. contexts, scratch: [MEMBERS, padded, ·].
    """
    begin, member = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1).to(tl.int64)
    local, column = tl.arange(0, BM), tl.arange(0, OP)
    live = local < rows - begin
    own = member * padded + begin
    trunk, inputs, biases = trunk + member * (2 * HP + OP) * HP, inputs + member * IP * HP, biases + member * 4 * HP
    u, exchange = contexts + own * H, scratch + own * HP
    first = init + begin * H if INITS else biases
    context(x + begin * IN, inputs, first, u, local, live, IN, IP, H, HP, BM, BN, INITS, FP32)
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
    INITS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """From the gradient [MEMBERS, rows, OUT]: h and dz of the layers, [3, MEMBERS, padded, HP], and it, rounded."""
    begin, member = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1).to(tl.int64)
    local, column = tl.arange(0, BM), tl.arange(0, OP)
    live = local < rows - begin
    own = member * padded + begin
    layer = tl.num_programs(1).to(tl.int64) * padded * HP
    trunk, inputs, biases = trunk + member * (2 * HP + OP) * HP, inputs + member * IP * HP, biases + member * 4 * HP
    u = contexts + own * H
    first = init + begin * H if INITS else biases
    context(x + begin * IN, inputs, first, u, local, live, IN, IP, H, HP, BM, BN, INITS, FP32)
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
