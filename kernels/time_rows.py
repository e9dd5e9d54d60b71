"""The noise network's embedding of diffusion steps, of several learners, and its gradients; what the diffusion loss
reads.

emb_k = W2 mish(W1 waves_k + b1) + b2 and tau_k = W_t emb_k, of K steps: so little that a program does all of a step.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import mish, mish_and_slope
from .launch import Launch, Wide

_HIDDEN = 64  # columns of the network's hidden layer to a block


@triton.jit
def _embedded(waves, w1, b1, T: tl.constexpr, TP: tl.constexpr, SLOPE: tl.constexpr):
    """mish(W1 waves + b1) [2 TP], or with SLOPE that and mish'; 0 in what pads it (mish' isn't)."""
    column, inner = tl.arange(0, TP), tl.arange(0, 2 * TP)
    wave = tl.load(waves + column, mask=column < T, other=0.0)
    held = (inner < 2 * T)[:, None] & (column < T)[None, :]
    weight = tl.load(w1 + inner[:, None] * T + column[None, :], mask=held, other=0.0)
    z = tl.sum(weight * wave[None, :], 1) + tl.load(b1 + inner, mask=inner < 2 * T, other=0.0)
    if SLOPE:
        return mish_and_slope(z)
    else:
        return mish(z)


@triton.jit(do_not_specialize=["between", "columns"])
def time_rows_kernel(
    waves, w1, b1, w2, b2, w_t, embedded, rows, between, columns,
    T: tl.constexpr, TP: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Program (k, l): emb_k [T] and tau_k [H] of learner l, into embedded [L, K, T] and rows [L, K, H].

    Weights of learner l lie l * between after the first's; W_t [H, T] is part of a matrix of so many columns.
    """
    step, learner, steps = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    own, at = learner * between, learner * steps + step
    column, inner = tl.arange(0, TP), tl.arange(0, 2 * TP)
    h = _embedded(waves + step * T, w1 + own, b1 + own, T, TP, False)
    held = (column < T)[:, None] & (inner < 2 * T)[None, :]
    weight = tl.load(w2 + own + column[:, None] * 2 * T + inner[None, :], mask=held, other=0.0)
    e = tl.sum(weight * h[None, :], 1) + tl.load(b2 + own + column, mask=column < T, other=0.0)
    tl.store(embedded + at * T + column, e, mask=column < T)
    for begin in range(0, H, BH):
        outer = begin + tl.arange(0, BH)
        there = (outer < H)[:, None] & (column < T)[None, :]
        part = tl.load(w_t + own + outer[:, None] * columns + column[None, :], mask=there, other=0.0)
        tl.store(rows + at * H + outer, tl.sum(part * e[None, :], 1), mask=outer < H)


@triton.jit(do_not_specialize=["between", "columns", "steps"])
def time_backward_kernel(
    waves, w1, b1, w2, w_t, embedded, d_rows, more, d_w1, d_b1, d_w2, d_b2, d_w_t, between, columns, steps,
    T: tl.constexpr, TP: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Learner program_id(1): the gradients of the embedding's weights, and of W_t what `d_rows` adds to it.

    d_rows, more [L, K, H]: gradients of tau; of `more` W_t has its part already. The gradients lie as the weights do.
    """
    learner = tl.program_id(1).to(tl.int64)
    own, at = learner * between, learner * steps
    column, inner = tl.arange(0, TP), tl.arange(0, 2 * TP)
    wide, tall = (inner < 2 * T)[:, None] & (column < T)[None, :], (column < T)[:, None] & (inner < 2 * T)[None, :]
    first, second = tl.zeros([2 * TP, TP], tl.float32), tl.zeros([TP, 2 * TP], tl.float32)
    of_z, of_e = tl.zeros([2 * TP], tl.float32), tl.zeros([TP], tl.float32)
    weight = tl.load(w2 + own + column[:, None] * 2 * T + inner[None, :], mask=tall, other=0.0)
    for step in range(steps):
        d_e = tl.zeros([TP], tl.float32)
        for begin in range(0, H, BH):
            outer = begin + tl.arange(0, BH)
            place = (at + step) * H + outer
            d = tl.load(d_rows + place, mask=outer < H, other=0.0) + tl.load(more + place, mask=outer < H, other=0.0)
            there = (outer < H)[:, None] & (column < T)[None, :]
            part = tl.load(w_t + own + outer[:, None] * columns + column[None, :], mask=there, other=0.0)
            d_e += tl.sum(part * d[:, None], 0)
        h, slope = _embedded(waves + step * T, w1 + own, b1 + own, T, TP, True)
        wave = tl.load(waves + step * T + column, mask=column < T, other=0.0)
        d_z = tl.sum(weight * d_e[:, None], 0) * slope
        first += d_z[:, None] * wave[None, :]
        second += d_e[:, None] * h[None, :]
        of_z += d_z
        of_e += d_e
    tl.store(d_w1 + own + inner[:, None] * T + column[None, :], first, mask=wide)
    tl.store(d_b1 + own + inner, of_z, mask=inner < 2 * T)
    tl.store(d_w2 + own + column[:, None] * 2 * T + inner[None, :], second, mask=tall)
    tl.store(d_b2 + own + column, of_e, mask=column < T)
    for begin in range(0, H, BH):
        outer = begin + tl.arange(0, BH)
        total = tl.zeros([BH, TP], tl.float32)
        for step in range(steps):
            d = tl.load(d_rows + (at + step) * H + outer, mask=outer < H, other=0.0)
            e = tl.load(embedded + (at + step) * T + column, mask=column < T, other=0.0)
            total += d[:, None] * e[None, :]
        there = (outer < H)[:, None] & (column < T)[None, :]
        tl.store(d_w_t + own + outer[:, None] * columns + column[None, :], total, mask=there)


@triton.jit(do_not_specialize=["count"])
def noisy_kernel(
    clean, noise, levels, places, alpha_bar, embedded, state, inputs, count,
    A: tl.constexpr, AP: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Program (b, l): [sqrt(alpha) clean + sqrt(1 - alpha) noise, emb, state] of row b of learner l.

    alpha is that of its level, and emb that of its level's place.
    """
    row = tl.program_id(1).to(tl.int64) * count + tl.program_id(0)
    level = tl.load(levels + row)
    alpha = tl.load(alpha_bar + level)
    into, a, t, s = inputs + row * (A + T + S), tl.arange(0, AP), tl.arange(0, TP), tl.arange(0, SP)
    x = tl.sqrt(alpha) * tl.load(clean + row * A + a, mask=a < A, other=0.0)
    x += tl.sqrt(1.0 - alpha) * tl.load(noise + row * A + a, mask=a < A, other=0.0)
    tl.store(into + a, x, mask=a < A)
    place = (tl.program_id(1).to(tl.int64) * K + tl.load(places + level)) * T
    tl.store(into + A + t, tl.load(embedded + place + t, mask=t < T, other=0.0), mask=t < T)
    tl.store(into + A + T + s, tl.load(state + row * S + s, mask=s < S, other=0.0), mask=s < S)


@triton.jit(do_not_specialize=["count", "between", "stride"])
def level_sums_kernel(
    slopes, levels, places, sums, count, between, stride,
    K: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Program (k * blocks + i, l): sums [L, K, H] of the rows of slopes [L, count, ·] with a level of place k, block i.

    between, stride: numbers from one learner's slopes to the next's, and from one row to the next.
    """
    blocks = (H + BH - 1) // BH
    place, learner = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    outer = (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    total = tl.zeros([BH], tl.float32)
    for begin in range(0, count, BB):
        row = begin + tl.arange(0, BB)
        there = row < count
        of_row = tl.load(levels + learner * count + row, mask=there, other=0)
        there = there & (tl.load(places + of_row) == place)
        at = slopes + learner * between + row.to(tl.int64)[:, None] * stride + outer[None, :]
        d = tl.load(at, mask=there[:, None] & (outer < H)[None, :], other=0.0)
        total += tl.sum(d.to(tl.float32), 0)
    tl.store(sums + (learner * K + place) * H + outer, total, mask=outer < H)


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def forward(waves: Tensor, weights: Sequence[Tensor], w_t: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """The launch that fills emb [L, K, T] and tau [L, K, H]; these.

    Args:
        waves: sines and cosines [K, T]. weights: W1 [L, 2 T, T], b1 [L, 2 T], W2 [L, T, 2 T], b2 [L, T], each a
            learner's own in one piece, all as far from one learner's to the next. w_t: [L, H, T], a part of columns.
    """
    (steps, T), (learners, H, _) = waves.shape, w_t.shape
    embedded, rows = waves.new_empty(learners, steps, T), waves.new_empty(learners, steps, H)
    arguments: dict[str, Any] = {
        "waves": waves,
        **dict(zip(("w1", "b1", "w2", "b2"), weights, strict=True)),
        "w_t": w_t,
    }
    arguments |= {"embedded": embedded, "rows": rows, "between": Wide(w_t.stride(0)), "columns": w_t.stride(1)}
    constants = {"T": T, "TP": _power(T), "H": H, "BH": _HIDDEN}
    return Launch(time_rows_kernel, steps, arguments, constants, 4, 1, members=learners), embedded, rows


def backward(
    waves: Tensor,
    weights: Sequence[Tensor],
    w_t: Tensor,
    embedded: Tensor,
    d_rows: tuple[Tensor, Tensor],
    gradients: Sequence[Tensor],
) -> Launch:
    """The launch that writes the gradients of W1, b1, W2, b2 and W_t, where each lies as its weight does.

    d_rows: gradients of tau [L, K, H], the second without its part in that of W_t.
    """
    (steps, T), (learners, H, _) = waves.shape, w_t.shape
    named = dict(zip(("w1", "b1", "w2"), weights, strict=False))
    arguments: dict[str, Any] = {"waves": waves, **named, "w_t": w_t}
    arguments |= {"embedded": embedded, "d_rows": d_rows[0], "more": d_rows[1]}
    arguments |= dict(zip(("d_w1", "d_b1", "d_w2", "d_b2", "d_w_t"), gradients, strict=True))
    arguments |= {"between": Wide(w_t.stride(0)), "columns": w_t.stride(1), "steps": steps}
    constants = {"T": T, "TP": _power(T), "H": H, "BH": _HIDDEN}
    return Launch(time_backward_kernel, 1, arguments, constants, 4, 1, members=learners)


def noisy_inputs(
    clean: Tensor, noise: Tensor, levels: Tensor, places: Tensor, alpha_bar: Tensor, embedded: Tensor, state: Tensor
) -> tuple[Launch, Tensor]:
    """The launch that fills the network's inputs [L, B, A + T + S], and these.

    clean, noise: [L, B, A]. levels: int64 [L, B], of N. places: which of the K embeddings each is, int64 [N].
    alpha_bar: [N]. embedded: [L, K, T]. state: [L, B, S].
    """
    (learners, rows, A), S, (_, K, T) = clean.shape, state.shape[2], embedded.shape
    inputs = clean.new_empty(learners, rows, A + T + S)
    arguments = {
        "clean": clean, "noise": noise, "levels": levels, "places": places, "alpha_bar": alpha_bar,
        "embedded": embedded, "state": state, "inputs": inputs, "count": rows,
    }  # fmt: skip
    constants = {"A": A, "AP": _power(A), "T": T, "TP": _power(T), "S": S, "SP": _power(S), "K": K}
    return Launch(noisy_kernel, rows, arguments, constants, 1, 1, members=learners), inputs


def level_sums(slopes: Tensor, levels: Tensor, places: Tensor, steps: int, width: int) -> tuple[Launch, Tensor]:
    """The launch that sums the rows of each place, in their order, and the sums [L, K, H].

    slopes: [L, B or more, H or more], rows and learners at any distance. levels, places: as of `noisy_inputs`.
    width: H.
    """
    learners, rows = levels.shape
    sums = slopes.new_empty(learners, steps, width, dtype=torch.float32)
    arguments = {
        "slopes": slopes, "levels": levels, "places": places, "sums": sums, "count": rows,
        "between": Wide(slopes.stride(0)), "stride": slopes.stride(1),
    }  # fmt: skip
    constants = {"K": steps, "H": width, "BH": _HIDDEN, "BB": 32}
    programs = steps * -(-width // _HIDDEN)
    return Launch(level_sums_kernel, programs, arguments, constants, 2, 1, members=learners), sums
