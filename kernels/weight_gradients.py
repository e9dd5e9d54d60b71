"""The gradients of weights and inputs of all members: a launch each, written where whoever reads them wants them.

A program makes one tile of one layer's gradient, a sum over all rows in a fixed order: no sum depends on which program
comes first, so the bits are the same each time. That suits rows up to some thousands; where there are more, products
that share them out among programs are faster (`products.py`).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (device code: triton has types of its own)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import product, rounded
from .launch import Launch, Wide
from .members import Members

FEW_ROWS = 1024
"""Up to so many rows an eager call takes these kernels: a program's loop over them is shorter than several launches.
Reasoned, not measured."""


def _tile(bf16: bool) -> dict[str, int]:
    """With any product of float32, half: its operands are three each, and 64 columns spill."""
    return {"TM": 64, "TN": 64 if bf16 else 32, "BR": 32}


@triton.jit
def layer_tile(
    left, right, left_step, right_step, weight, bias, of_steps, stride, tile, rows, steps,
    LEFT: tl.constexpr, HEIGHT, RIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, BR: tl.constexpr, FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of left^T right into weight [HEIGHT, WIDTH], of row stride `stride`; of the first column's, the sums.

    left: [steps, rows, LEFT], HEIGHT columns of which are taken, and right: [steps, rows, RIGHT], alike WIDTH, with
    `…_step` elements from one step's to the next. Its sums over rows and steps go to bias [HEIGHT], those over the rows
    of each step to of_steps [steps, HEIGHT], where these are given.
    """
    across: tl.constexpr = (WIDTH + TN - 1) // TN
    i, j, local = tile // across * TM + tl.arange(0, TM), tile % across * TN + tl.arange(0, TN), tl.arange(0, BR)
    inside, sums = i < HEIGHT, (i < HEIGHT) & (tile % across == 0)
    found, total = tl.zeros([TM, TN], tl.float32), tl.zeros([TM], tl.float32)
    for step in range(steps):
        own = tl.zeros([TM, BR], tl.float32)
        for begin in range(0, rows, BR):
            row = begin + local
            held = row < rows
            x = tl.load(left + row[None, :] * LEFT + i[:, None], mask=held[None, :] & inside[:, None], other=0.0)
            y = tl.load(right + row[:, None] * RIGHT + j[None, :], mask=held[:, None] & (j < WIDTH)[None, :], other=0.0)
            if bias is not None or of_steps is not None:
                own += x.to(tl.float32)
            if y.dtype != COMPUTE:
                y = rounded(y, COMPUTE)
            if x.dtype != COMPUTE:
                x = rounded(x, COMPUTE)
            found = product(x, y, found, FP32)
        if bias is not None or of_steps is not None:
            # Reduced here and not in the inner loop, where triton 3.7 fails to compile a sum that is used twice.
            summed = tl.sum(own, axis=1)
            total += summed
            if of_steps is not None:
                tl.store(of_steps + step * HEIGHT + i, summed, mask=sums)
        left, right = left + left_step, right + right_step
    tl.store(weight + i[:, None] * stride + j[None, :], found, mask=inside[:, None] & (j < WIDTH)[None, :])
    if bias is not None:
        tl.store(bias + i, total, mask=sums)


@triton.jit(do_not_specialize=["w1_rows", "rows", "padded", "steps"])
def weight_gradient_kernel(
    hidden, slopes, d_out, inputs, states, w1, init, w2, b2, w3, b3, w4, b4, W_s, of_steps,
    w1_next, init_next, w2_next, b2_next, w3_next, b3_next, w4_next, b4_next, W_s_next, w1_rows, W_s_rows,
    inputs_next, inputs_step, rows, padded, steps,
    IN: tl.constexpr, IP: tl.constexpr, S: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr,
    HP: tl.constexpr, OP: tl.constexpr, SHARE: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, BR: tl.constexpr, FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Tile program_id(0) of the gradients w1 … b4 of member program_id(1): of W2, W3, W1, W4, and of W_s.

    hidden, slopes: [3, M, steps, padded, HP]; d_out: [M, steps, padded, OP]; inputs of W1: rows of IP numbers, IN of
    which are taken, `inputs_next` elements from one group of SHARE members to the next and `inputs_step` from step to
    step. states: [M, rows, S], the same at each step, or None; of_steps: sums of dz1, [M, steps, H], or None.
    """
    tile, member = tl.program_id(0), tl.program_id(1).to(tl.int64)
    step, plane = padded.to(tl.int64) * HP, padded.to(tl.int64) * HP * steps
    layer = plane * tl.num_programs(1)
    hidden, slopes, d_out = hidden + plane * member, slopes + plane * member, d_out + member * padded * steps * OP
    inner: tl.constexpr = ((H + TM - 1) // TM) * ((H + TN - 1) // TN)
    first: tl.constexpr = 2 * inner + ((H + TM - 1) // TM) * ((IN + TN - 1) // TN)
    last: tl.constexpr = first + ((OUT + TM - 1) // TM) * ((H + TN - 1) // TN)
    if tile < inner:
        layer_tile(
            slopes + layer, hidden, step, step, w2 + member * w2_next, b2 + member * b2_next, None, H, tile,
            rows, steps, HP, H, HP, H, TM, TN, BR, FP32, COMPUTE,
        )  # fmt: skip
    elif tile < 2 * inner:
        layer_tile(
            slopes + 2 * layer, hidden + layer, step, step, w3 + member * w3_next, b3 + member * b3_next, None, H,
            tile - inner, rows, steps, HP, H, HP, H, TM, TN, BR, FP32, COMPUTE,
        )  # fmt: skip
    elif tile < first:
        layer_tile(
            slopes, inputs + member // SHARE * inputs_next, step, inputs_step, w1 + member * w1_next,
            None if init is None else init + member * init_next,
            None if of_steps is None else of_steps + member * steps * H, w1_rows, tile - 2 * inner,
            rows, steps, HP, H, IP, IN, TM, TN, BR, FP32, COMPUTE,
        )  # fmt: skip
    elif tile < last:
        layer_tile(
            d_out, hidden + 2 * layer, padded.to(tl.int64) * OP, step, w4 + member * w4_next, b4 + member * b4_next,
            None, H, tile - first, rows, steps, OP, OUT, HP, H, TM, TN, BR, FP32, COMPUTE,
        )  # fmt: skip
    elif states is not None:
        layer_tile(
            slopes, states + member * rows * S, step, 0, W_s + member * W_s_next, None, None, W_s_rows, tile - last,
            rows, steps, HP, H, S, S, TM, TN, BR, FP32, tl.float32,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "padded"])
def input_gradient_kernel(
    slopes, weights, d_x, rows, padded,
    IN: tl.constexpr, IP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, SHARE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """d_x [M / SHARE, rows, IN] of group program_id(1): the sum of dz1 W1 over its members, a tile of it a program.

    slopes: dz1 [M, padded, HP]; weights: packed, W1^T in float32, [M, IP, HP].
    """
    across: tl.constexpr = (IN + BN - 1) // BN
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = tile // across * BM + tl.arange(0, BM), tile % across * BN + tl.arange(0, BN)
    held, found = row < rows, tl.zeros([BM, BN], tl.float32)
    slopes, weights = slopes + group * SHARE * padded * HP, weights + group * SHARE * IP * HP
    for _ in range(SHARE):
        for begin in range(0, H, BK):
            inner = begin + tl.arange(0, BK)
            inside = inner < H
            dz = tl.load(slopes + row[:, None] * HP + inner[None, :], mask=held[:, None] & inside[None, :], other=0.0)
            w = tl.load(
                weights + column[None, :] * HP + inner[:, None],
                mask=inside[:, None] & (column < IN)[None, :],
                other=0.0,
            )
            found = product(dz, rounded(w, COMPUTE), found, FP32)
        slopes, weights = slopes + padded.to(tl.int64) * HP, weights + IP * HP
    place = d_x + group * rows * IN + row[:, None] * IN + column[None, :]
    tl.store(place, found, mask=held[:, None] & (column < IN)[None, :])


def weight_launch(
    hidden: Tensor,
    slopes: Tensor,
    d_out: Tensor,
    inputs: Tensor,
    into: Members,
    rows: int,
    precisions: dict[str, Any],
    share: int = 1,
    of_states: tuple[Tensor, Tensor] | None = None,
    of_steps: Tensor | None = None,
) -> Launch:
    """The launch that writes the gradients of M members' weights, the sums over all rows of all steps.

    Args:
        hidden: h1, h2, h3, [3, M, K, R, HP] or, of one step, [3, M, R, HP]; the first `rows` of R count.
        slopes: dz1, dz2, dz3, alike. d_out: the outputs' gradient, [M, K, R, OP].
        inputs: what W1 multiplies: [M, K, R, AP], or the same for `share` members, [M / share, rows, I].
        into: where the gradients go, shaped as the weights. One of init that is rows is left out: it is dz1.
        precisions: as of `reverse_diffusion.precisions`.
        of_states: states [M, rows, S], the same at each step, and where W_s's gradient goes, [M, H, S].
        of_steps: where the sums of dz1 over the rows of each step go, [M, K, H].

    Raises:
        ValueError: columns of a matrix in `into` are not contiguous.
    """
    count, padded, HP = hidden.shape[1], hidden.shape[-2], hidden.shape[-1]
    steps, ((H, IN), OUT) = 1 if hidden.ndim == 4 else hidden.shape[2], (into.first[0].shape, into.first[6].shape[0])
    states, W_s = (None, None) if of_states is None else of_states
    S = 0 if states is None else states.shape[-1]
    if into.first[0].stride(1) != 1 or (W_s is not None and W_s.stride(-1) != 1):
        raise ValueError("a gradient whose columns are not contiguous")
    distances = into.distances()
    distances.pop("w1_columns")
    weights: dict[str, Tensor | None] = {**into.arguments()}
    arguments = {
        "hidden": hidden, "slopes": slopes, "d_out": d_out, "inputs": inputs, "states": states,
        **weights, "init": None if into.rows else weights["init"], "W_s": W_s, "of_steps": of_steps,
        **{name: distances[name] for name in distances if name != "w1_rows"},
        "W_s_next": Wide(0 if W_s is None else W_s.stride(0)), "w1_rows": distances["w1_rows"],
        "W_s_rows": 0 if W_s is None else W_s.stride(1), "inputs_next": Wide(inputs.stride(0)),
        "inputs_step": Wide(inputs.stride(1) if inputs.ndim == 4 else 0), "rows": rows, "padded": padded,
        "steps": steps,
    }  # fmt: skip
    tile = _tile(hidden.dtype == torch.bfloat16 and states is None)
    constants = {
        "IN": IN, "IP": inputs.shape[-1], "S": S, "H": H, "OUT": OUT, "HP": HP, "OP": d_out.shape[-1], "SHARE": share,
        **tile, **precisions,
    }  # fmt: skip
    down, across = triton.cdiv(H, tile["TM"]), triton.cdiv(H, tile["TN"])
    tiles = down * (2 * across + triton.cdiv(IN, tile["TN"]) + triton.cdiv(S, tile["TN"]))
    tiles += triton.cdiv(OUT, tile["TM"]) * across
    # With a product of float32 beside those of bfloat16 a third stage spills on sm_100.
    stages = 3 if states is None else 2
    return Launch(weight_gradient_kernel, tiles, arguments, constants, 4, stages, members=count)


def input_launch(slopes: Tensor, packed_inputs: Tensor, d_x: Tensor, H: int, precisions: dict[str, Any]) -> Launch:
    """The launch that fills d_x [G, B, I] from dz1, [M, R, HP], and W1 as packed, [M, IP, HP]."""
    (count, padded, HP), (groups, rows, inputs) = slopes.shape, d_x.shape
    arguments = {"slopes": slopes, "weights": packed_inputs, "d_x": d_x, "rows": rows, "padded": padded}
    tile = {"BM": 16, "BK": 64, "BN": 64}
    constants = {
        "IN": inputs, "IP": packed_inputs.shape[1], "H": H, "HP": HP, "SHARE": count // groups, **tile, **precisions
    }  # fmt: skip
    tiles = triton.cdiv(rows, tile["BM"]) * triton.cdiv(inputs, tile["BN"])
    return Launch(input_gradient_kernel, tiles, arguments, constants, 4, 3, members=groups)


def new_gradients(like: Members) -> tuple[Tensor, list[Tensor]]:
    """Memory for the gradients of members' weights: flat, [M, P], and its parts, shaped as the eight weights.

    Of an init that is rows, the gradient is a tensor of its own, [M, B, H].
    """
    sizes = [part.numel() if number != 1 or not like.rows else 0 for number, part in enumerate(like.first)]
    flat = like.first[0].new_empty(like.count, sum(sizes))
    parts = flat.split(sizes, dim=1)
    return flat, [
        part.view(like.count, *weight.shape) if size else weight.new_empty(like.count, *weight.shape)
        for part, weight, size in zip(parts, like.first, sizes, strict=True)
    ]
