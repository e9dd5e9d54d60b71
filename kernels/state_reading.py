"""States read under prompts by the retrieval context, in one launch forward and two backward.

`llmdpd.ops.device_reading` says what is computed. All weights, and the memories of the prompts before them, are put
side by side first, by one launch of PyTorch; their gradients lie so too. Under TRITON_INTERPRET=1 the same code runs on
CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from llmdpd import kernels
from llmdpd.ops.device_reading import Given, Sizes

from .launch import Launch
from .reading import reading_kernel
from .reading_backward import reading_backward_kernel, reading_gradient_kernel

ROWS = 16
"""States to a program: a batch has some dozens under a prompt, to be shared out among many multiprocessors."""
_INNER = 32  # of a product's inner dimension at a time
_BLOCK = 64
_TILE = {"TM": 64, "TN": 32, "BR": 32}


def _power(number: int) -> int:
    return max(16, triton.next_power_of_2(number))


class Kept(NamedTuple):
    """What the pass forward leaves for the pass backward: L layers, B states, H heads, TP padded steps."""

    hidden: Tensor
    """[L + 1, B, W]: before each layer, and after the last."""
    normed: Tensor
    """[L, B, W], as those that follow; `wide` and `active` [L, B, N], `shares` [L, B, H, TP]."""
    queries: Tensor
    shares: Tensor
    found: Tensor
    middle: Tensor
    forward_normed: Tensor
    wide: Tensor
    active: Tensor
    waypoint_queries: Tensor | None
    """[B, W]."""
    waypoint_shares: Tensor | None
    """[B, H, TP]."""


class _Slopes(NamedTuple):
    """Gradients, of what `Kept` has under these names; and the sums of each tile."""

    d_hidden: Tensor
    d_queries: Tensor
    d_scores: Tensor
    d_found: Tensor
    d_middle: Tensor
    d_wide: Tensor
    d_waypoint_queries: Tensor | None
    d_waypoint_scores: Tensor | None
    sums: Tensor


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class _Flat(NamedTuple):
    """The parts of what `side_by_side` made of memories and weights, or of their gradients."""

    memory: Tensor
    """[2 L, P, T, W]: keys and values of each layer."""
    waypoint_key: Tensor | None
    weights: Tensor

    @classmethod
    def of(cls, flat: Tensor, sizes: Sizes) -> _Flat:
        one = sizes.prompts * sizes.steps * sizes.width
        memory, key, weights = flat.split([2 * sizes.layers * one, sizes.waypoints * one, sizes.weights])
        return cls(memory, key if sizes.waypoints else None, weights)


def _constants(sizes: Sizes, short: bool) -> dict[str, Any]:
    s = sizes
    return {
        "OWN": s.own, "X": s.text, "W": s.width, "WP": _power(s.width), "N": s.inner, "LAYERS": s.layers,
        "HEADS": s.heads, "EP": _power(s.width // s.heads), "TP": _power(s.steps), "A": s.action_dim,
        "G": max(1, s.geometry), "FOUND": s.found, "FP": _power(s.found), "C": s.compared, "CP": _power(s.compared),
        "WAYPOINTS": s.waypoints, "SIMILARITY": s.similarity, "F": s.condition, "LAYERS_AT": s.layers_at,
        "LAYER": s.layer, "NORM_AT": s.norm_at, "WAYPOINT_AT": s.waypoint_at, "LIKENESS_AT": s.likeness_at,
        "SUMS": s.sums, "TILES": triton.cdiv(s.rows, ROWS), "BM": ROWS, "BK": _INNER, **_TILE, "BLOCK": _BLOCK,
        "FP32": "tf32" if short else kernels.fp32_products(), "RAW": kernels.fp32_products(),
    }  # fmt: skip


def _launch(
    kernel: Any, programs: int, arguments: dict[str, Any], sizes: Sizes, short: bool, stages: int, members: int = 1
) -> Launch:
    constants = {name: value for name, value in _constants(sizes, short).items() if name in kernel.arg_names}
    ordered = {name: arguments[name] for name in kernel.arg_names if name not in constants}
    return Launch(kernel, programs, ordered, constants, 4, stages, members=members)


def _seen(given: Given) -> dict[str, Any]:
    """What is raw; without similarity nothing reads `there`."""
    there = given.here if given.there is None else given.there
    return {"there": there, "waypoints": given.waypoints}


def forward_launch(given: Given, sizes: Sizes, flat: Tensor, out: Tensor, short: bool) -> tuple[Launch, Kept]:
    """The launch that fills out [B, F], and what it leaves."""
    s, new = sizes, given.own.new_empty
    B, L, W, steps = s.prompts * s.rows, s.layers, s.width, _power(s.steps)
    kept = Kept(
        hidden=new(L + 1, B, W), normed=new(L, B, W), queries=new(L, B, W), shares=new(L, B, s.heads, steps),
        found=new(L, B, W), middle=new(L, B, W), forward_normed=new(L, B, W), wide=new(L, B, s.inner),
        active=new(L, B, s.inner), waypoint_queries=new(B, W) if s.waypoints else None,
        waypoint_shares=new(B, s.heads, steps) if s.waypoints else None,
    )  # fmt: skip
    parts = _Flat.of(flat, sizes)
    arguments = {
        "own": given.own, "here": given.here, "pooled": given.pooled, "memory": parts.memory,
        "waypoint_key": parts.waypoint_key, "bias": given.bias, "waypoint_bias": given.waypoint_bias, **_seen(given),
        "weights": parts.weights, **kept._asdict(), "out": out, "T": s.steps, "rows": s.rows, "vector_size": s.vector,
    }  # fmt: skip
    return _launch(reading_kernel, s.prompts * triton.cdiv(s.rows, ROWS), arguments, sizes, short, 2), kept


def backward_launches(
    d_out: Tensor, out: Tensor, given: Given, sizes: Sizes, flat: Tensor, kept: Kept, short: bool
) -> tuple[list[Launch], Tensor, Tensor]:
    """The two launches, and what they fill: the gradients of `flat`, and of the prompts' vectors [P, Z]."""
    s, parts, tiles = sizes, _Flat.of(flat, sizes), sizes.prompts * triton.cdiv(sizes.rows, ROWS)
    like = {f"d_{name}": None if part is None else torch.empty_like(part) for name, part in kept._asdict().items()}
    like |= {"d_scores": torch.empty_like(kept.shares), "sums": d_out.new_empty(tiles, s.sums)}
    like["d_waypoint_scores"] = None if kept.waypoint_shares is None else torch.empty_like(kept.waypoint_shares)
    slopes = _Slopes._make(like[name] for name in _Slopes._fields)
    arguments = {
        "d_out": d_out, "out": out, "here": given.here, "memory": parts.memory, "waypoint_key": parts.waypoint_key,
        **_seen(given), "weights": parts.weights, **kept._asdict(), **slopes._asdict(), "T": s.steps, "rows": s.rows,
    }  # fmt: skip
    by_rows = _launch(reading_backward_kernel, tiles, arguments, sizes, short, 2)
    d_flat, d_pooled = torch.empty_like(flat), torch.empty_like(given.pooled)
    d_parts = _Flat.of(d_flat, sizes)
    arguments = {
        "own": given.own, "pooled": given.pooled, "weights": parts.weights, **kept._asdict(), **slopes._asdict(),
        "d_weights": d_parts.weights, "d_memory": d_parts.memory, "d_waypoint_key": d_parts.waypoint_key,
        "d_pooled": d_pooled, "T": s.steps, "rows": s.rows, "prompts": s.prompts, "tiles": tiles,
        "vector_size": s.vector,
    }  # fmt: skip
    programs, members = _gradient_tiles(sizes)
    of_weights = _launch(reading_gradient_kernel, programs, arguments, sizes, short, 2, members)
    return [by_rows, of_weights], d_flat, d_pooled


def _gradient_tiles(s: Sizes) -> tuple[int, int]:
    """The grid of `reading_gradient_kernel`: the tiles of a layer, or of what is beside, and layers with that."""

    def tiles(outputs: int, inputs: int) -> int:
        return triton.cdiv(outputs, _TILE["TM"]) * triton.cdiv(inputs, _TILE["TN"])

    W, N = s.width, s.inner
    of_head = s.prompts * s.heads * tiles(_power(s.steps), W // s.heads)
    layer = 2 * tiles(W, W) + tiles(N, W) + tiles(W, N) + 2 * of_head
    beside = tiles(W, s.own) + tiles(W, s.text) + triton.cdiv(s.sums, _BLOCK)
    beside += s.prompts * triton.cdiv(s.vector, _BLOCK) + s.waypoints * (tiles(W, W) + of_head)
    return max(layer if s.layers else 0, beside), s.layers + 1


def forward(given: Given, sizes: Sizes, tensors: Sequence[Tensor], short: bool) -> tuple[Tensor, Tensor, Kept]:
    """The condition [B, F]; memories and weights side by side, and what is kept, for `backward`.

    short: whether operands of the attention layers' products may be rounded to tf32, 11 bits.
    """
    flat, out = side_by_side(tensors), given.own.new_empty(sizes.prompts * sizes.rows, sizes.condition)
    launch, kept = forward_launch(given, sizes, flat, out, short)
    launch.run()
    return out, flat, kept


def backward(
    d_out: Tensor, out: Tensor, given: Given, sizes: Sizes, flat: Tensor, kept: Kept, short: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of `flat`, side by side, and of the prompts' vectors. Sums are always in the same order."""
    launches, d_flat, d_pooled = backward_launches(d_out.contiguous(), out, given, sizes, flat, kept, short)
    for launch in launches:
        launch.run()
    return d_flat, d_pooled
