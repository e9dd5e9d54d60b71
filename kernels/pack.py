"""The network's weights as the kernels read them: in the compute precision, padded with zeros, rows aligned."""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import rounded


@triton.jit(do_not_specialize=["wa_rows", "wa_columns", "ws_rows", "ws_columns", "w2_rows", "w3_rows", "w4_rows"])
def pack_kernel(
    W_a, W_s, w2, w3, w4, u_z, b2, b3, b4, packed, packed_actions, packed_states, biases,
    wa_rows, wa_columns, ws_rows, ws_columns, w2_rows, w3_rows, w4_rows, weights_next, u_z_next,
    S: tl.constexpr, SP: tl.constexpr, H: tl.constexpr, A: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """Program n copies rows n * BM and on of w2, w3 and w4 (`packed`: [2 HP + AP, HP]), and of W_a and W_s, transposed.

    W_a and W_s are [·, HP] then. The `…_rows` are row strides, the `…_columns` the other ones.

    Where weights_next is given, program_id(1) is a learner of several, whose weights lie so many elements apart. What
    is packed of them follows one another. u_z, b2, b3, b4, which of a single one are read in place, are packed too:
    biases [L, 3 HP + AP].
    """
    if weights_next is not None:
        learner = tl.program_id(1).to(tl.int64)
        to = learner * weights_next
        W_a, W_s, w2, w3, w4 = W_a + to, W_s + to, w2 + to, w3 + to, w4 + to
        packed, packed_actions = packed + learner * (2 * HP + AP) * HP, packed_actions + learner * AP * HP
        packed_states, biases = packed_states + learner * SP * HP, biases + learner * (3 * HP + AP)
        if tl.program_id(0) == 0:
            wide = tl.arange(0, HP)
            tl.store(biases + wide, tl.load(u_z + learner * u_z_next + wide, mask=wide < H, other=0.0))
            tl.store(biases + HP + wide, tl.load(b2 + to + wide, mask=wide < H, other=0.0))
            tl.store(biases + 2 * HP + wide, tl.load(b3 + to + wide, mask=wide < H, other=0.0))
            last = tl.arange(0, AP)
            tl.store(biases + 3 * HP + last, tl.load(b4 + to + last, mask=last < A, other=0.0))
    r = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    wide, column = tl.arange(0, HP)[None, :], tl.arange(0, AP)[None, :]
    held, own = (wide < H) & (r < H), r * HP + wide
    kind: tl.constexpr = packed.dtype.element_ty
    second = rounded(tl.load(w2 + r * w2_rows + wide, mask=held, other=0.0), kind)
    tl.store(packed + own, second, mask=r < HP)  # more outputs than hidden columns are possible
    third = rounded(tl.load(w3 + r * w3_rows + wide, mask=held, other=0.0), kind)
    tl.store(packed + HP * HP + own, third, mask=r < HP)
    last = rounded(tl.load(w4 + r * w4_rows + wide, mask=(wide < H) & (r < A), other=0.0), kind)
    tl.store(packed + 2 * HP * HP + own, last, mask=r < AP)
    first = tl.load(W_a + r * wa_rows + column * wa_columns, mask=(column < A) & (r < H), other=0.0)
    tl.store(packed_actions + column * HP + r, first, mask=r < HP)
    for begin in range(0, SP, 16):
        feature = begin + tl.arange(0, 16)[None, :]
        part = tl.load(W_s + r * ws_rows + feature * ws_columns, mask=(feature < S) & (r < H), other=0.0)
        tl.store(packed_states + feature * HP + r, part, mask=r < HP)
