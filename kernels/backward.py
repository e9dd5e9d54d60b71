"""The chain walked back by a tile of rows in one program: activations again from the kept actions, then the gradients.

What the weight gradients need is written, a step at a time, to `hidden` (h1, h2, h3) and `slopes` (first mish', then
dz1, dz2, dz3 in its place), both [3, K, R, HP] in the compute precision. Where an element is read back by another
thread of the program than wrote it, a barrier stands between.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import fresh_zero, product, rounded
from .elementwise import mish_and_slope
from .layers import columns, first_layer, narrow, of_learner, output_layer, straight, transposed


@triton.jit
def recompute(
    a, u, tau_k, W_a, w2, b2, w3, b3, w4, b4, hidden, slopes, layer, state, live,
    H: tl.constexpr, A: tl.constexpr, TAKEN: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, FP32: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """epsilon [BM, AP], as `epsilon_of`, leaving h and mish' of the three layers.

    hidden, slopes: of layer 1, the tile's first row.
    """
    zero = fresh_zero()
    wide, column, own = zero + tl.arange(0, HP), tl.arange(0, AP), (zero + tl.arange(0, BM))[:, None] * HP
    parts = columns(a, TAKEN, AP)
    z = tl.zeros([BM, HP], tl.float32) + tl.load(b2 + wide, mask=wide < H, other=0.0)[None, :]
    # To whole blocks of BN: what `propagate` reads back must have been written, padding too.
    for begin in range(0, (H + BN - 1) // BN * BN, BK):
        inner = begin + tl.arange(0, BK)
        z1 = first_layer(u, tau_k, W_a, state, live, a, parts, inner, H, TAKEN, HP, AP, FP32)
        h1, slope = mish_and_slope(z1)
        tl.store(hidden + own + inner[None, :], rounded(h1, COMPUTE))
        tl.store(slopes + own + inner[None, :], rounded(slope, COMPUTE))
        z = product(rounded(h1, COMPUTE), transposed(w2, inner, wide, HP), z, FP32)
    h2, slope2 = mish_and_slope(z)
    h2 = rounded(h2, COMPUTE)
    tl.store(hidden + layer + own + wide[None, :], h2)
    tl.store(slopes + layer + own + wide[None, :], rounded(slope2, COMPUTE))
    if not WHOLE:
        tl.debug_barrier()
    epsilon = tl.zeros([AP, BM], tl.float32)
    zero = fresh_zero()
    own = (zero + tl.arange(0, BM))[None, :] * HP
    for begin in range(0, H, BN):
        outer = zero + begin + tl.arange(0, BN)
        z3 = tl.zeros([BN, BM], tl.float32) + tl.load(b3 + outer, mask=outer < H, other=0.0)[:, None]
        z3 = narrow(h2, hidden + layer, w3, zero, outer, z3, False, H, HP, BM, BK, WHOLE, FP32)
        h3, slope = mish_and_slope(z3)
        tl.store(hidden + 2 * layer + own + outer[:, None], rounded(h3, COMPUTE))
        tl.store(slopes + 2 * layer + own + outer[:, None], rounded(slope, COMPUTE))
        epsilon = output_layer(rounded(h3, COMPUTE), w4, outer, epsilon, HP, AP, FP32)
    tl.debug_barrier()
    return tl.trans(epsilon) + tl.load(b4 + column, mask=column < A, other=0.0)[None, :]


@triton.jit
def propagate(
    d_epsilon, W_a, w2, w3, w4, slopes, layer,
    H: tl.constexpr, TAKEN: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, FP32: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """W_a^T dz1 [BM, AP], 0 where TAKEN is; dz takes the place of mish'."""
    zero = fresh_zero()
    wide, column, own = zero + tl.arange(0, HP), tl.arange(0, AP), (zero + tl.arange(0, BM))[:, None] * HP
    d_h2 = tl.zeros([BM, HP], tl.float32)
    for begin in range(0, H, BK):
        inner = begin + tl.arange(0, BK)
        d_h3 = product(d_epsilon, straight(w4, column, inner, HP), tl.zeros([BM, BK], tl.float32), FP32)
        place = slopes + 2 * layer + own + inner[None, :]
        dz3 = rounded(d_h3 * tl.load(place).to(tl.float32), COMPUTE)
        tl.store(place, dz3)
        d_h2 = product(dz3, straight(w3, inner, wide, HP), d_h2, FP32)
    whole = slopes + layer + own + wide[None, :]
    dz2 = rounded(d_h2 * tl.load(whole).to(tl.float32), COMPUTE)
    tl.store(whole, dz2)
    if not WHOLE:
        tl.debug_barrier()
    d_a = tl.zeros([AP, BM], tl.float32)
    zero = fresh_zero()
    own = (zero + tl.arange(0, BM))[None, :] * HP
    for begin in range(0, H, BN):
        outer = zero + begin + tl.arange(0, BN)
        d_h1 = tl.zeros([BN, BM], tl.float32)
        d_h1 = narrow(dz2, slopes + layer, w2, zero, outer, d_h1, True, H, HP, BM, BK, WHOLE, FP32)
        part = slopes + own + outer[:, None]
        dz1 = rounded(d_h1 * tl.load(part).to(tl.float32), COMPUTE)
        tl.store(part, dz1)
        if TAKEN > 0:
            d_a = product(rounded(straight(W_a, column, outer, HP), COMPUTE), dz1, d_a, FP32)
    return tl.trans(d_a)


@triton.jit(do_not_specialize=["rows", "begin", "padded", "steps"])
def backward_kernel(
    grad_actions, u, tau, W_a, w2, b2, w3, b3, w4, b4, table, chain,
    hidden, slopes, taken, d_out,
    rows, begin, padded, steps, clip,
    SAMPLES: tl.constexpr, H: tl.constexpr, A: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr,
    LEARNERS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rows begin + program_id * BM and on, of all `rows`.

    hidden, slopes: [3, K, padded, HP]; taken (the actions) and d_out (d epsilon): [K, padded, AP].

    LEARNERS: program_id(1) is a learner of several, as of `forward_kernel`. hidden and slopes are [3, L, K, padded, HP]
    then, what else is above follows one another, and b2 is the first of the packed biases.
    """
    local, column = tl.arange(0, BM), tl.arange(0, AP)
    here = tl.program_id(0).to(tl.int64) * BM
    row = begin + here
    live = local < rows - row
    held = live[:, None] & (column < A)[None, :]
    place, count = local[:, None] * A + column[None, :], rows.to(tl.int64) * A
    grad_actions, chain = grad_actions + row * A, chain + row * A
    state, u = ((row % SAMPLES).to(tl.int32) + local) // SAMPLES, u + (row // SAMPLES) * H
    layer = padded.to(tl.int64) * HP * steps
    before = 0  # steps of other learners that are kept before
    if LEARNERS:
        learner = tl.program_id(1).to(tl.int64)
        before = tl.program_id(1) * steps
        W_a, w2, b2, w3, b3, w4, b4 = of_learner(learner, W_a, w2, b2, HP, AP)
        u, grad_actions = u + learner * (rows // SAMPLES) * H, grad_actions + learner * count
        chain += learner * count * (steps + 1)
        layer *= tl.num_programs(1)

    g = tl.load(grad_actions + place, mask=held, other=0.0)
    g = tl.where(tl.abs(tl.load(chain + count * steps + place, mask=held, other=0.0)) <= clip, g, 0.0)
    carry = tl.zeros([BM, AP], tl.float32)
    for back in range(steps):
        step = steps - 1 - back
        p_k, e_k = tl.load(table + step * 6), tl.load(table + step * 6 + 1)
        A_k, B_k = tl.load(table + step * 6 + 2), tl.load(table + step * 6 + 3)
        a = tl.load(chain + count * step + fresh_zero() + place, mask=held, other=0.0)
        at = here + padded.to(tl.int64) * (step + before)
        epsilon = recompute(
            a, u, tau + (step + before) * H, W_a, w2, b2, w3, b3, w4, b4,
            hidden + at * HP, slopes + at * HP, layer, state, live,
            H, A, A, HP, AP, BM, BK, BN, WHOLE, FP32, COMPUTE,
        )  # fmt: skip
        d_pre = tl.where(tl.abs(p_k * a + e_k * epsilon) <= clip, B_k * g + carry, 0.0)
        C_k = tl.load(table + step * 6 + 4)
        carry = C_k * g
        d_epsilon = e_k * d_pre
        small = (fresh_zero() + local)[:, None] * AP + column[None, :]
        tl.store(taken + at * AP + small, rounded(a, COMPUTE))
        tl.store(d_out + at * AP + small, rounded(d_epsilon, COMPUTE))
        d_a = propagate(
            rounded(d_epsilon, COMPUTE), W_a, w2, w3, w4, slopes + at * HP, layer,
            H, A, HP, AP, BM, BK, BN, WHOLE, FP32, COMPUTE,
        )  # fmt: skip
        g = A_k * g + p_k * d_pre + d_a
