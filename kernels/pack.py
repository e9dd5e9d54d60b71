"""The network's weights as the kernels read them: in the compute precision, padded with zeros, rows aligned."""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import rounded


@triton.jit(do_not_specialize=["wa_rows", "wa_columns", "ws_rows", "ws_columns", "w2_rows", "w3_rows", "w4_rows"])
def pack_kernel(
    W_a, W_s, w2, w3, w4, packed, packed_actions, packed_states,
    wa_rows, wa_columns, ws_rows, ws_columns, w2_rows, w3_rows, w4_rows,
    S: tl.constexpr, SP: tl.constexpr, H: tl.constexpr, A: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr,
):  # fmt: skip
    """Program r copies row r of w2, w3 and w4 (`packed`: [2 HP + AP, HP]), and of W_a and W_s, transposed: [·, HP].

    The `…_rows` are row strides, the `…_columns` the other ones.
    """
    r = tl.program_id(0).to(tl.int64)
    wide, column = tl.arange(0, HP), tl.arange(0, AP)
    row = r + tl.zeros([HP], tl.int64)
    held, inside = (wide < H) & (row < H), row < HP  # more outputs than hidden columns are possible
    kind: tl.constexpr = packed.dtype.element_ty
    second = rounded(tl.load(w2 + r * w2_rows + wide, mask=held, other=0.0), kind)
    tl.store(packed + r * HP + wide, second, mask=inside)
    third = rounded(tl.load(w3 + r * w3_rows + wide, mask=held, other=0.0), kind)
    tl.store(packed + (HP + r) * HP + wide, third, mask=inside)
    last = rounded(tl.load(w4 + r * w4_rows + wide, mask=(wide < H) & (row < A), other=0.0), kind)
    tl.store(packed + (2 * HP + r) * HP + wide, last, mask=row < AP)
    first = tl.load(
        W_a + r * wa_rows + column * wa_columns,
        mask=(column < A) & (r + tl.zeros([AP], tl.int64) < H),
        other=0.0,
    )
    tl.store(packed_actions + column * HP + r, first, mask=r + tl.zeros([AP], tl.int64) < HP)
    for begin in range(0, SP, 16):
        feature = begin + tl.arange(0, 16)
        there = (feature < S) & (r + tl.zeros([16], tl.int64) < H)
        part = tl.load(W_s + r * ws_rows + feature * ws_columns, mask=there, other=0.0)
        tl.store(packed_states + feature * HP + r, part, mask=r + tl.zeros([16], tl.int64) < HP)
