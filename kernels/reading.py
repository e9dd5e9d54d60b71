"""The retrieval context of a tile of states under one prompt: attention to its demonstration, and waypoints.

`llmdpd.nn.context.retrieval` defines it. A program takes BM states through all layers; what a matrix product needs of
another thread's numbers goes through memory, which the pass backward reads again, with a barrier between.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import fresh_zero, product

NORM_EPSILON = tl.constexpr(1e-5)  # torch's default, as all of the networks' norms have
NEARNESS = tl.constexpr(6.0)  # factor on how far the state is from the demonstration, before tanh


@triton.jit
def dense(
    x, stride, live, weight, inner_step, outer_step, outer, outputs, z,
    INNER: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """z [BM, BN] + x W: x [BM, INNER] in memory, its rows `stride` apart; columns `outer` of W, those below `outputs`.

    W's element [i, o] lies at i * inner_step + o * outer_step.
    """
    row, held, zero = tl.arange(0, BM)[:, None] * stride, (outer < outputs)[None, :], fresh_zero()
    for begin in range(0, INNER, BK):
        inner = zero + begin + tl.arange(0, BK)
        inside = inner < INNER
        part = tl.load(x + row + inner[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        block = weight + inner[:, None] * inner_step + outer[None, :] * outer_step
        block = tl.load(block, mask=inside[:, None] & held, other=0.0)
        z = product(part, block, z, FP32)
    return z


@triton.jit
def vector(at, index, count):
    """The numbers `index` at an address, those below `count`; zeros beyond. As a row."""
    return tl.load(at + index, mask=index < count, other=0.0)[None, :]


@triton.jit
def unit(x, column, W: tl.constexpr):
    """x [BM, WP] with mean 0 and variance 1 over its first W columns, zeros beyond; and one over its deviation."""
    inside = (column < W)[None, :]
    away = tl.where(inside, x - (tl.sum(x, 1) / W)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, 1) / W + NORM_EPSILON)
    return away * scale[:, None], scale


@triton.jit
def normalised(x, norm, column, W: tl.constexpr):
    """The layer norm of x [BM, WP], whose padding is zeros. norm: weight and bias, [2, W]."""
    found, _ = unit(x, column, W)
    return found * vector(norm, column, W) + vector(norm + W, column, W)


@triton.jit
def gelu(x):
    """x (1 + erf(x / sqrt 2)) / 2, and its derivative."""
    share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * share, share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1); 1 in float32 from 10 on."""
    return 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(x, 10.0)) + 1.0)


@triton.jit
def head_of(rows, live, part, W: tl.constexpr, E: tl.constexpr, BM: tl.constexpr):
    """One head's columns of rows [BM, W], whose first is at `rows`: [BM, EP]."""
    place = rows + tl.arange(0, BM)[:, None] * W + part[None, :]
    return tl.load(place, mask=live[:, None] & (part < E)[None, :], other=0.0)


@triton.jit
def to_steps(x, memory, part, step, T, W: tl.constexpr, E: tl.constexpr, FP32: tl.constexpr):
    """x [BM, EP] by one head's columns of a memory [T, W]: [BM, TP]."""
    block = memory + step[None, :] * W + part[:, None]
    block = tl.load(block, mask=(step < T)[None, :] & (part < E)[:, None], other=0.0)
    zero = tl.zeros([x.shape[0], step.shape[0]], tl.float32)
    return product(x, block, zero, FP32)


@triton.jit
def from_steps(weights, memory, stride, part, width, step, T, FP32: tl.constexpr):
    """Weights [BM, TP] by columns `part`, those below `width`, of a memory [T, ·] of a stride: [BM, ·]."""
    block = memory + step[:, None] * stride + part[None, :]
    block = tl.load(block, mask=(step < T)[:, None] & (part < width)[None, :], other=0.0)
    zero = tl.zeros([weights.shape[0], part.shape[0]], tl.float32)
    return product(weights, block, zero, FP32)


@triton.jit
def softmax(scores):
    """Of rows [BM, TP]; -inf stands for what is no step."""
    power = tl.exp(scores - tl.max(scores, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def distances(here, there, likeness, local, live, step, T, C: tl.constexpr, BM: tl.constexpr, TP: tl.constexpr):
    """sum of w (here - there)^2, w = e^likeness, [BM, TP]: of places [BM, C] from a prompt's [T, C].

    As differences: multiplied out, the terms would be far greater than their sum.
    """
    found = tl.zeros([BM, TP], tl.float32)
    for number in range(C):
        weight = tl.exp(tl.load(likeness + number))
        away = tl.load(here + local * C + number, mask=live, other=0.0)[:, None]
        away = away - tl.load(there + step * C + number, mask=step < T, other=0.0)[None, :]
        found += weight * away * away
    return found


@triton.jit
def attend(
    queries, key, value, bias, weights, found, local, live, T,
    W: tl.constexpr, HEADS: tl.constexpr, EP: tl.constexpr, TP: tl.constexpr, BM: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """What each head of scaled queries [BM, W] finds in a memory [T, W], to `found`; its weights [BM, HEADS, TP]."""
    E: tl.constexpr = W // HEADS
    step, part = tl.arange(0, TP), tl.arange(0, EP)
    open_to = tl.load(bias + step, mask=step < T, other=-float("inf"))[None, :]
    for head in tl.range(HEADS, num_stages=1):
        own = head_of(queries + head * E, live, part, W, E, BM)
        shares = softmax(to_steps(own, key + head * E, part, step, T, W, E, FP32) + open_to)
        tl.store(weights + local[:, None] * (HEADS * TP) + head * TP + step[None, :], shares, mask=live[:, None])
        seen = from_steps(shares, value + head * E, W, part, E, step, T, FP32)
        place = found + local[:, None] * W + head * E + part[None, :]
        tl.store(place, seen, mask=live[:, None] & (part < E)[None, :])


@triton.jit
def retrieve(
    queries, key, bias, here, there, likeness, waypoints, weights, out, local, live, T,
    W: tl.constexpr, HEADS: tl.constexpr, EP: tl.constexpr, TP: tl.constexpr, A: tl.constexpr, G: tl.constexpr,
    FOUND: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, SIMILARITY: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """What each head finds of the raw demonstration [T, FOUND], and how far the state is from it, plain and in tanh.

    To `out`, of stride F: of each head FOUND + FOUND - A numbers. Its weights [BM, HEADS, TP] to `weights`. All
    products are of float32: heads that are sure of a step must not be sure of another, and of raw numbers differences
    count.
    """
    E: tl.constexpr = W // HEADS
    step, part, number = tl.arange(0, TP), tl.arange(0, EP), tl.arange(0, FP)
    open_to = tl.load(bias + step, mask=step < T, other=-float("inf"))[None, :]
    far = (number >= A) & (number < FOUND)
    place = tl.where(far, (number - A) % G, 0)[None, :]
    now = tl.load(here + local[:, None] * C + place, mask=live[:, None] & far[None, :], other=0.0)
    for head in tl.range(HEADS, num_stages=1):
        own = head_of(queries + head * E, live, part, W, E, BM)
        scores = to_steps(own, key + head * E, part, step, T, W, E, RAW) + open_to
        if SIMILARITY:
            scores -= distances(here, there, likeness + head * C, local, live, step, T, C, BM, TP)
        shares = softmax(scores)
        tl.store(weights + local[:, None] * (HEADS * TP) + head * TP + step[None, :], shares, mask=live[:, None])
        found = from_steps(shares, waypoints, FOUND, number, FOUND, step, T, RAW)
        # Weighted like the sum that it is taken from: the step that says nothing is at no distance.
        seen = 1.0 - tl.sum(tl.where((step == T - 1)[None, :], shares, 0.0), 1)
        found -= seen[:, None] * now
        to = out + local[:, None] * F + head * (2 * FOUND - A) + number[None, :]
        tl.store(to, found, mask=live[:, None] & (number < FOUND)[None, :])
        tl.store(to + (FOUND - A), tanh(found * NEARNESS), mask=live[:, None] & far[None, :])


@triton.jit(do_not_specialize=["T", "rows", "vector_size"])
def reading_kernel(
    own, here, pooled, memory, waypoint_key, bias, waypoint_bias, there, waypoints, weights,
    hidden, normed, queries, shares, found, middle, forward_normed, wide, active, waypoint_queries, waypoint_shares,
    out, T, rows, vector_size,
    OWN: tl.constexpr, X: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, N: tl.constexpr, LAYERS: tl.constexpr,
    HEADS: tl.constexpr, EP: tl.constexpr, TP: tl.constexpr, A: tl.constexpr, G: tl.constexpr, FOUND: tl.constexpr,
    FP: tl.constexpr, C: tl.constexpr, WAYPOINTS: tl.constexpr, SIMILARITY: tl.constexpr, F: tl.constexpr,
    LAYERS_AT: tl.constexpr, LAYER: tl.constexpr, NORM_AT: tl.constexpr, WAYPOINT_AT: tl.constexpr,
    LIKENESS_AT: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    FP32: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """The condition of rows program_id(0) % TILES * BM and on of group program_id(0) // TILES, all under one prompt.

    `state_reading` says what is read and written.
    """
    group, first = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BM
    local, column = tl.arange(0, BM), tl.arange(0, WP)
    live, begin, count = local < rows - first, group * rows + first, (tl.num_programs(0) // TILES * rows).to(tl.int64)
    mine, inside = local[:, None] * W + column[None, :], live[:, None] & (column < W)[None, :]
    own, here, out = own + begin * OWN, here + begin * C, out + begin * F
    hidden, normed, queries, found = hidden + begin * W, normed + begin * W, queries + begin * W, found + begin * W
    middle, forward_normed, shares = middle + begin * W, forward_normed + begin * W, shares + begin * HEADS * TP
    wide, active = wide + begin * N, active + begin * N
    SCALE: tl.constexpr = (W // HEADS) ** -0.5
    for start in range(0, OWN, BK):
        number = start + tl.arange(0, BK)
        place, held = local[:, None], live[:, None] & (number < OWN)[None, :]
        part = tl.load(own + place * OWN + number[None, :], mask=held)
        tl.store(out + place * F + number[None, :], part, mask=held)
    # A state and the text that it is under, which is one to all of them.
    z = tl.zeros([BM, WP], tl.float32) + vector(weights + W * (OWN + X), column, W)
    z = dense(own, OWN, live, weights, 1, OWN + X, column, W, z, OWN, BM, BK, FP32)
    if X > 0:
        text = pooled + group * vector_size
        z = dense(text, 0, live, weights + OWN, 1, OWN + X, column, W, z, X, BM, BK, FP32)
    tl.store(hidden + mine, z, mask=inside)
    for number in tl.range(LAYERS, num_stages=1):
        norms = weights + LAYERS_AT + number * LAYER
        query, output, widen = norms + 4 * W, norms + 4 * W + (W * W + W), norms + 4 * W + 2 * (W * W + W)
        narrow = widen + N * W + N
        tl.debug_barrier()
        z = tl.load(hidden + mine, mask=inside, other=0.0)
        tl.store(normed + mine, normalised(z, norms, column, W), mask=inside)
        tl.debug_barrier()
        asked = tl.zeros([BM, WP], tl.float32) + vector(query + W * W, column, W)
        asked = dense(normed, W, live, query, 1, W, column, W, asked, W, BM, BK, FP32)
        tl.store(queries + mine, SCALE * asked, mask=inside)
        tl.debug_barrier()
        keys = memory + (2 * number * tl.num_programs(0) // TILES + group) * T * W
        values = keys + (tl.num_programs(0) // TILES).to(tl.int64) * T * W
        attend(
            queries, keys, values, bias + group * T, shares, found, local, live, T,
            W, HEADS, EP, TP, BM, FP32,
        )  # fmt: skip
        tl.debug_barrier()
        answer = tl.zeros([BM, WP], tl.float32) + vector(output + W * W, column, W)
        answer = dense(found, W, live, output, 1, W, column, W, answer, W, BM, BK, FP32)
        # Added after the sum, whose roundings would else be those of what it is added to. Read again: between the two
        # it would take registers.
        z = answer + tl.load(hidden + mine, mask=inside, other=0.0)
        tl.store(middle + mine, z, mask=inside)
        tl.store(forward_normed + mine, normalised(z, norms + 2 * W, column, W), mask=inside)
        tl.debug_barrier()
        for start in tl.range(0, N, WP, num_stages=1):
            outer = start + column
            broad = tl.zeros([BM, WP], tl.float32) + vector(widen + N * W, outer, N)
            broad = dense(forward_normed, W, live, widen, 1, W, outer, N, broad, W, BM, BK, FP32)
            place, held = local[:, None] * N + outer[None, :], live[:, None] & (outer < N)[None, :]
            tl.store(wide + place, broad, mask=held)
            tl.store(active + place, gelu(broad)[0], mask=held)
        tl.debug_barrier()
        answer = tl.zeros([BM, WP], tl.float32) + vector(narrow + W * N, column, W)
        answer = dense(active, N, live, narrow, 1, N, column, W, answer, N, BM, BK, FP32)
        z = answer + tl.load(middle + mine, mask=inside, other=0.0)
        hidden += count * W
        tl.store(hidden + mine, z, mask=inside)
        normed, queries, found, middle = normed + count * W, queries + count * W, found + count * W, middle + count * W
        forward_normed, shares = forward_normed + count * W, shares + count * HEADS * TP
        wide, active = wide + count * N, active + count * N
    end: tl.constexpr = OWN + (W if LAYERS > 0 else 0)
    if LAYERS > 0:
        tl.debug_barrier()
        shown = normalised(tl.load(hidden + mine, mask=inside, other=0.0), weights + NORM_AT, column, W)
        tl.store(out + OWN + local[:, None] * F + column[None, :], shown, mask=inside)
    if WAYPOINTS:
        waypoint_queries += begin * W
        tl.debug_barrier()
        asked = tl.zeros([BM, WP], tl.float32) + vector(weights + WAYPOINT_AT + W * W, column, W)
        asked = dense(hidden, W, live, weights + WAYPOINT_AT, 1, W, column, W, asked, W, BM, BK, FP32)
        tl.store(waypoint_queries + mine, SCALE * asked, mask=inside)
        tl.debug_barrier()
        retrieve(
            waypoint_queries, waypoint_key + group * T * W, waypoint_bias + group * T, here, there + group * T * C,
            weights + LIKENESS_AT, waypoints + group * T * FOUND, waypoint_shares + begin * HEADS * TP, out + end,
            local, live, T, W, HEADS, EP, TP, A, G, FOUND, FP, C, SIMILARITY, F, BM, RAW,
        )  # fmt: skip
