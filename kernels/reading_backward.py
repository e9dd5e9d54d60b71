"""The pass backward of `reading`: a tile of states in a program, and then the gradients of weights and memories.

The first kernel leaves the gradients of every linear layer's results, which the second multiplies by what those layers
read, over all rows in a fixed order; what is a sum over a tile's rows (norms, similarity) it leaves a row a tile.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .reading import NEARNESS, dense, from_steps, gelu, head_of, to_steps, unit, vector
from .weight_gradients import layer_tile


@triton.jit
def norm_backward(d, x, norm, sums, column, W: tl.constexpr):
    """The gradient of x [BM, WP], whose padding is zeros, from that of its norm; of weight and bias, to sums [2, W]."""
    rest, scale = unit(x, column, W)
    tl.store(sums + column, tl.sum(d * rest, 0), mask=column < W)
    tl.store(sums + W + column, tl.sum(d, 0), mask=column < W)
    d = d * vector(norm, column, W)
    shared, along = tl.sum(d, 1) / W, tl.sum(d * rest, 1) / W
    return tl.where((column < W)[None, :], scale[:, None] * (d - shared[:, None] - rest * along[:, None]), 0.0)


@triton.jit
def softmax_backward(shares, d):
    """The gradient of scores [BM, TP] from that of their softmax."""
    return shares * (d - tl.sum(shares * d, 1)[:, None])


@triton.jit
def attend_backward(
    d_found, key, value, shares, d_scores, d_queries, local, live, T,
    W: tl.constexpr, HEADS: tl.constexpr, EP: tl.constexpr, TP: tl.constexpr, BM: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """From the gradient of what `attend` finds to those of scores and queries, before their scale."""
    E: tl.constexpr = W // HEADS
    step, part = tl.arange(0, TP), tl.arange(0, EP)
    for head in tl.range(HEADS, num_stages=1):
        d = head_of(d_found + head * E, live, part, W, E, BM)
        d = to_steps(d, value + head * E, part, step, T, W, E, FP32)
        place = local[:, None] * (HEADS * TP) + head * TP + step[None, :]
        d = softmax_backward(tl.load(shares + place, mask=live[:, None], other=0.0), d)
        tl.store(d_scores + place, d, mask=live[:, None])
        d = E**-0.5 * from_steps(d, key + head * E, W, part, E, step, T, FP32)
        place = d_queries + local[:, None] * W + head * E + part[None, :]
        tl.store(place, d, mask=live[:, None] & (part < E)[None, :])


@triton.jit
def retrieve_backward(
    d_out, out, key, here, there, likeness, waypoints, shares, d_scores, d_queries, sums, local, live, T,
    W: tl.constexpr, HEADS: tl.constexpr, EP: tl.constexpr, TP: tl.constexpr, A: tl.constexpr, G: tl.constexpr,
    FOUND: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SIMILARITY: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr, FP32: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """From the gradient of what `retrieve` finds to those of scores, queries, and (in sums [HEADS, C]) likeness."""
    E: tl.constexpr = W // HEADS
    step, part, number, compared = tl.arange(0, TP), tl.arange(0, EP), tl.arange(0, FP), tl.arange(0, CP)
    far = (number >= A) & (number < FOUND)
    plain, bent = live[:, None] & (number < FOUND)[None, :], live[:, None] & far[None, :]
    now = tl.load(here + local[:, None] * C + tl.where(far, (number - A) % G, 0)[None, :], mask=bent, other=0.0)
    for head in tl.range(HEADS, num_stages=1):
        at = local[:, None] * F + head * (2 * FOUND - A) + number[None, :]
        d = tl.load(d_out + at, mask=plain, other=0.0)
        near = tl.load(out + at + (FOUND - A), mask=bent, other=0.0)
        d += tl.load(d_out + at + (FOUND - A), mask=bent, other=0.0) * NEARNESS * (1.0 - near * near)
        # By the weights: of what was found, and of the step that says nothing, at which nothing is taken away.
        nothing = tl.sum(d * now, 1)
        d = to_steps(d, waypoints, number, step, T, FOUND, FOUND, RAW)
        d += tl.where((step == T - 1)[None, :], nothing[:, None], 0.0)
        place = local[:, None] * (HEADS * TP) + head * TP + step[None, :]
        d = softmax_backward(tl.load(shares + place, mask=live[:, None], other=0.0), d)
        tl.store(d_scores + place, d, mask=live[:, None])
        if SIMILARITY:
            tl.debug_barrier()
            held = (compared < C)[None, :]
            place = tl.load(here + local[:, None] * C + compared[None, :], mask=live[:, None] & held, other=0.0)
            found = tl.zeros([BM, CP], tl.float32)
            for t in range(T):
                away = place - vector(there + t * C, compared, C)
                column = d_scores + local * (HEADS * TP) + head * TP + t
                found += tl.load(column, mask=live, other=0.0)[:, None] * away * away
            weight = tl.exp(tl.load(likeness + head * C + compared, mask=compared < C, other=0.0))
            tl.store(sums + head * C + compared, -weight * tl.sum(found, 0), mask=compared < C)
        d = E**-0.5 * from_steps(d, key + head * E, W, part, E, step, T, FP32)
        place = d_queries + local[:, None] * W + head * E + part[None, :]
        tl.store(place, d, mask=live[:, None] & (part < E)[None, :])


@triton.jit(do_not_specialize=["T", "rows"])
def reading_backward_kernel(
    d_out, out, here, memory, waypoint_key, there, waypoints, weights,
    hidden, shares, middle, wide, waypoint_shares,
    d_hidden, d_queries, d_scores, d_found, d_middle, d_wide, d_waypoint_queries, d_waypoint_scores, sums, T, rows,
    OWN: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, N: tl.constexpr, LAYERS: tl.constexpr,
    HEADS: tl.constexpr, EP: tl.constexpr, TP: tl.constexpr, A: tl.constexpr, G: tl.constexpr, FOUND: tl.constexpr,
    FP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, WAYPOINTS: tl.constexpr, SIMILARITY: tl.constexpr,
    F: tl.constexpr, LAYERS_AT: tl.constexpr, LAYER: tl.constexpr, NORM_AT: tl.constexpr, WAYPOINT_AT: tl.constexpr,
    LIKENESS_AT: tl.constexpr, SUMS: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    FP32: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile's rows, as of `reading_kernel`, and its row of sums [SUMS].

    Those are, of each layer, what belongs to its two norms, then to the last norm, then to the similarity.
    """
    group, first = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES * BM
    local, column = tl.arange(0, BM), tl.arange(0, WP)
    prompts = (tl.num_programs(0) // TILES).to(tl.int64)
    live, begin, count = local < rows - first, group * rows + first, prompts * rows
    mine, inside = local[:, None] * W + column[None, :], live[:, None] & (column < W)[None, :]
    d_out, out, here, sums = d_out + begin * F, out + begin * F, here + begin * C, sums + tl.program_id(0) * SUMS
    hidden, d_hidden = hidden + (LAYERS * count + begin) * W, d_hidden + (LAYERS * count + begin) * W
    norm: tl.constexpr = W if LAYERS > 0 else 0
    end: tl.constexpr = OWN + norm
    d = tl.zeros([BM, WP], tl.float32)
    if LAYERS > 0:
        d = tl.load(d_out + OWN + local[:, None] * F + column[None, :], mask=inside, other=0.0)
        x = tl.load(hidden + mine, mask=inside, other=0.0)
        d = norm_backward(d, x, weights + NORM_AT, sums + LAYERS * 4 * W, column, W)
    # Where a gradient is added to, it is read again: between the two it would take registers.
    tl.store(d_hidden + mine, d, mask=inside)
    if WAYPOINTS:
        d_waypoint_queries += begin * W
        retrieve_backward(
            d_out + end, out + end, waypoint_key + group * T * W, here, there + group * T * C, weights + LIKENESS_AT,
            waypoints + group * T * FOUND, waypoint_shares + begin * HEADS * TP,
            d_waypoint_scores + begin * HEADS * TP, d_waypoint_queries, sums + LAYERS * 4 * W + 2 * norm,
            local, live, T, W, HEADS, EP, TP, A, G, FOUND, FP, C, CP, SIMILARITY, F, BM, FP32, RAW,
        )  # fmt: skip
        tl.debug_barrier()
        zero = tl.zeros([BM, WP], tl.float32)
        d = dense(d_waypoint_queries, W, live, weights + WAYPOINT_AT, W, 1, column, W, zero, W, BM, BK, FP32)
        tl.store(d_hidden + mine, d + tl.load(d_hidden + mine, mask=inside, other=0.0), mask=inside)
    for back in tl.range(LAYERS, num_stages=1):
        number = LAYERS - 1 - back
        norms = weights + LAYERS_AT + number * LAYER
        query, output, widen = norms + 4 * W, norms + 4 * W + (W * W + W), norms + 4 * W + 2 * (W * W + W)
        narrow = widen + N * W + N
        of_layer = number * count + begin
        own_queries, own_found, own_middle = d_queries + of_layer * W, d_found + of_layer * W, d_middle + of_layer * W
        own_wide = d_wide + of_layer * N
        tl.debug_barrier()
        for start in tl.range(0, N, WP, num_stages=1):
            outer = start + column
            zero = tl.zeros([BM, WP], tl.float32)
            broad = dense(d_hidden, W, live, narrow, N, 1, outer, N, zero, W, BM, BK, FP32)
            place, held = local[:, None] * N + outer[None, :], live[:, None] & (outer < N)[None, :]
            slope = gelu(tl.load(wide + of_layer * N + place, mask=held, other=0.0))[1]
            tl.store(own_wide + place, broad * slope, mask=held)
        tl.debug_barrier()
        zero = tl.zeros([BM, WP], tl.float32)
        part = dense(own_wide, N, live, widen, W, 1, column, W, zero, N, BM, BK, FP32)
        x = tl.load(middle + of_layer * W + mine, mask=inside, other=0.0)
        d = norm_backward(part, x, norms + 2 * W, sums + number * 4 * W + 2 * W, column, W)
        d += tl.load(d_hidden + mine, mask=inside, other=0.0)
        tl.store(own_middle + mine, d, mask=inside)
        tl.debug_barrier()
        zero = tl.zeros([BM, WP], tl.float32)
        part = dense(own_middle, W, live, output, W, 1, column, W, zero, W, BM, BK, FP32)
        tl.store(own_found + mine, part, mask=inside)
        tl.debug_barrier()
        keys = memory + (2 * number * prompts + group) * T * W
        attend_backward(
            own_found, keys, keys + prompts * T * W, shares + of_layer * HEADS * TP, d_scores + of_layer * HEADS * TP,
            own_queries, local, live, T, W, HEADS, EP, TP, BM, FP32,
        )  # fmt: skip
        tl.debug_barrier()
        zero = tl.zeros([BM, WP], tl.float32)
        part = dense(own_queries, W, live, query, W, 1, column, W, zero, W, BM, BK, FP32)
        hidden, d_hidden = hidden - count * W, d_hidden - count * W
        x = tl.load(hidden + mine, mask=inside, other=0.0)
        d = norm_backward(part, x, norms, sums + number * 4 * W, column, W)
        d += tl.load(own_middle + mine, mask=inside, other=0.0)
        tl.store(d_hidden + mine, d, mask=inside)


@triton.jit
def memory_tile(
    d_scores, other, to, head, tile, rows, T,
    W: tl.constexpr, HEADS: tl.constexpr, TP: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, BR: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """A tile of one head's part of the gradient [T, W] of a prompt's keys, or values, over the rows under it.

    d_scores: [rows, HEADS, TP], of keys; of values the weights. other: the queries [rows, W], or what was found's.
    """
    E: tl.constexpr = W // HEADS
    layer_tile(
        d_scores + head * TP, other + head * E, 0, 0, to + head * E, None, None, W, tile, rows, 1,
        HEADS * TP, T, W, E, TM, TN, BR, FP32, tl.float32,
    )  # fmt: skip


@triton.jit
def vector_gradient(
    d_hidden,
    weights,
    to,
    begin,
    rows,
    size,
    X: tl.constexpr,
    W: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns `begin` and on of the gradient of one prompt's vector [size], whose first X numbers queries read."""
    place = begin + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, W, BLOCK):
        outer = start + tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK], tl.float32)
        for row in range(rows):
            sums += tl.load(d_hidden + row * W + outer, mask=outer < W, other=0.0)
        block = weights + outer[:, None] * INPUTS + place[None, :]
        block = tl.load(block, mask=(outer < W)[:, None] & (place < X)[None, :], other=0.0)
        total += tl.sum(sums[:, None] * block, 0)
    tl.store(to + place, total, mask=place < size)


@triton.jit
def place_of_sum(
    number, W: tl.constexpr, LAYERS: tl.constexpr, LAYERS_AT: tl.constexpr, LAYER: tl.constexpr,
    NORM_AT: tl.constexpr, LIKENESS_AT: tl.constexpr,
):  # fmt: skip
    """Where among the weights' gradients a number of the tiles' sums belongs."""
    of_norms: tl.constexpr = LAYERS * 4 * W
    norm: tl.constexpr = 2 * W if LAYERS > 0 else 0
    place = LAYERS_AT + number // (4 * W) * LAYER + number % (4 * W)
    place = tl.where(number >= of_norms, NORM_AT + number - of_norms, place)
    return tl.where(number >= of_norms + norm, LIKENESS_AT + number - of_norms - norm, place)


@triton.jit(do_not_specialize=["T", "rows", "prompts", "tiles", "vector_size"])
def reading_gradient_kernel(
    own, pooled, weights, hidden, normed, queries, shares, found, forward_normed, active, waypoint_queries,
    d_hidden, d_queries, d_scores, d_found, d_middle, d_wide, d_waypoint_queries, d_waypoint_scores, sums,
    d_weights, d_memory, d_waypoint_key, d_pooled, T, rows, prompts, tiles, vector_size,
    OWN: tl.constexpr, X: tl.constexpr, W: tl.constexpr, N: tl.constexpr, LAYERS: tl.constexpr,
    HEADS: tl.constexpr, TP: tl.constexpr, WAYPOINTS: tl.constexpr, LAYERS_AT: tl.constexpr, LAYER: tl.constexpr,
    NORM_AT: tl.constexpr, WAYPOINT_AT: tl.constexpr, LIKENESS_AT: tl.constexpr, SUMS: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
    FP32: tl.constexpr,
):  # fmt: skip
    """Tile program_id(0) of the gradients of layer program_id(1), or after the last layer of what is beside them.

    d_weights: as the weights lie. d_memory: [2 LAYERS, P, T, W]; d_waypoint_key [P, T, W]; d_pooled [P, vector_size].
    """
    tile, number = tl.program_id(0), tl.program_id(1)
    count = prompts.to(tl.int64) * rows
    E: tl.constexpr = W // HEADS
    square: tl.constexpr = ((W + TM - 1) // TM) * ((W + TN - 1) // TN)
    of_head: tl.constexpr = ((TP + TM - 1) // TM) * ((E + TN - 1) // TN)
    if number < LAYERS:
        to = d_weights + LAYERS_AT + number * LAYER + 4 * W
        of_layer = number * count
        broad: tl.constexpr = 2 * square + ((N + TM - 1) // TM) * ((W + TN - 1) // TN)
        last: tl.constexpr = broad + ((W + TM - 1) // TM) * ((N + TN - 1) // TN)
        if tile < square:
            layer_tile(
                d_queries + of_layer * W, normed + of_layer * W, 0, 0, to, to + W * W, None, W, tile, count, 1,
                W, W, W, W, TM, TN, BR, FP32, tl.float32,
            )  # fmt: skip
        elif tile < 2 * square:
            to += W * W + W
            layer_tile(
                d_middle + of_layer * W, found + of_layer * W, 0, 0, to, to + W * W, None, W, tile - square, count, 1,
                W, W, W, W, TM, TN, BR, FP32, tl.float32,
            )  # fmt: skip
        elif tile < broad:
            to += 2 * (W * W + W)
            layer_tile(
                d_wide + of_layer * N, forward_normed + of_layer * W, 0, 0, to, to + N * W, None, W, tile - 2 * square,
                count, 1, N, N, W, W, TM, TN, BR, FP32, tl.float32,
            )  # fmt: skip
        elif tile < last:
            to += 2 * (W * W + W) + N * W + N
            layer_tile(
                d_hidden + (of_layer + count) * W, active + of_layer * N, 0, 0, to, to + W * N, None, N, tile - broad,
                count, 1, W, W, N, N, TM, TN, BR, FP32, tl.float32,
            )  # fmt: skip
        else:
            part = (tile - last) // of_head
            values, head, group = part % 2, part // 2 % HEADS, (part // (2 * HEADS)).to(tl.int64)
            if group < prompts:
                begin = of_layer + group * rows
                scores = (shares if values == 1 else d_scores) + begin * HEADS * TP
                other = (d_found if values == 1 else queries) + begin * W
                to = d_memory + ((2 * number + values) * prompts.to(tl.int64) + group) * T * W
                memory_tile(
                    scores, other, to, head, (tile - last) % of_head, rows, T, W, HEADS, TP, TM, TN, BR, FP32
                )  # fmt: skip
    else:
        inputs: tl.constexpr = OWN + X
        of_own: tl.constexpr = ((W + TM - 1) // TM) * ((OWN + TN - 1) // TN)
        of_text: tl.constexpr = of_own + ((W + TM - 1) // TM) * ((X + TN - 1) // TN)
        of_query: tl.constexpr = of_text + (square if WAYPOINTS else 0)
        of_sums: tl.constexpr = of_query + (SUMS + BLOCK - 1) // BLOCK
        if tile < of_own:
            layer_tile(
                d_hidden, own, 0, 0, d_weights, d_weights + W * inputs, None, inputs, tile, count, 1,
                W, W, OWN, OWN, TM, TN, BR, FP32, tl.float32,
            )  # fmt: skip
        elif tile < of_text:
            # Each prompt's text is that of all its rows.
            layer_tile(
                d_hidden, pooled, rows * W, vector_size, d_weights + OWN, None, None, inputs, tile - of_own, rows,
                prompts, W, W, 0, X, TM, TN, BR, FP32, tl.float32,
            )  # fmt: skip
        elif tile < of_query:
            to = d_weights + WAYPOINT_AT
            layer_tile(
                d_waypoint_queries, hidden + LAYERS * count * W, 0, 0, to, to + W * W, None, W, tile - of_text, count,
                1, W, W, W, W, TM, TN, BR, FP32, tl.float32,
            )  # fmt: skip
        elif tile < of_sums:
            place = (tile - of_query) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for _ in range(tiles):
                total += tl.load(sums + place, mask=place < SUMS, other=0.0)
                sums += SUMS
            to = place_of_sum(place, W, LAYERS, LAYERS_AT, LAYER, NORM_AT, LIKENESS_AT)
            tl.store(d_weights + to, total, mask=place < SUMS)
        else:
            blocks = (vector_size + BLOCK - 1) // BLOCK
            left = tile - of_sums
            if left < prompts * blocks:
                group = (left // blocks).to(tl.int64)
                vector_gradient(
                    d_hidden + group * rows * W, weights + OWN, d_pooled + group * vector_size, left % blocks * BLOCK,
                    rows, vector_size, X, W, inputs, BLOCK,
                )  # fmt: skip
            elif WAYPOINTS:
                left -= prompts * blocks
                head, group = left // of_head % HEADS, (left // (of_head * HEADS)).to(tl.int64)
                if group < prompts:
                    begin = group * rows
                    memory_tile(
                        d_waypoint_scores + begin * HEADS * TP, waypoint_queries + begin * W,
                        d_waypoint_key + group * T * W, head, left % of_head, rows, T,
                        W, HEADS, TP, TM, TN, BR, FP32,
                    )  # fmt: skip
