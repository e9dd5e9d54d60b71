"""The fused reverse chain on a CUDA device: forward in one launch, backward in one launch and a few matrix products.

Everything is on one device, outputs come from `torch.empty`, and nothing waits for the device, so all of it can be
captured in a CUDA graph. Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .backward import backward_kernel
from .forward import forward_kernel
from .launch import Launch
from .pack import pack_kernel
from .products import gradients
from .tiles import Tile, backward_tile, forward_tile, padded_actions, padded_width

SCRATCH_BYTES = 512 << 20
"""Bound on what the backward pass keeps for the weight gradients at a time; larger batches go in several launches."""


def _compute(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def capability_of(device: torch.device) -> int:
    """Compute capability, 10 x major + minor; where kernels are interpreted any will do."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _precisions(bf16: bool) -> dict[str, Any]:
    """W_a a is computed to float32's accuracy in either mode; in bf16 as three tf32 products."""
    return {"ACTION": "tf32x3" if bf16 else "ieee", "COMPUTE": tl.bfloat16 if bf16 else tl.float32}


def pack(action_weight: Tensor, w2: Tensor, w3: Tensor, w4: Tensor, bf16: bool) -> tuple[Launch, Tensor, Tensor]:
    """The launch that fills the two packed tensors: w2, w3, w4 as [2 HP + AP, HP], and W_a^T as [AP, HP] in float32."""
    H, A = action_weight.shape
    HP, AP = padded_width(H), padded_actions(A)
    packed = torch.empty(2 * HP + AP, HP, dtype=_compute(bf16), device=w2.device)
    packed_actions = torch.empty(AP, HP, dtype=torch.float32, device=w2.device)
    w2, w3, w4 = (w if w.stride(1) == 1 else w.contiguous() for w in (w2, w3, w4))
    arguments = {
        "action_weight": action_weight, "w2": w2, "w3": w3, "w4": w4, "packed": packed,
        "packed_actions": packed_actions, "wa_rows": action_weight.stride(0), "wa_columns": action_weight.stride(1),
        "w2_rows": w2.stride(0), "w3_rows": w3.stride(0), "w4_rows": w4.stride(0),
    }  # fmt: skip
    constants = {"H": H, "A": A, "HP": HP, "AP": AP}
    return Launch(pack_kernel, HP, arguments, constants, 4, 1), packed, packed_actions


def forward_launch(
    context: Tensor, time_rows: Tensor, packed_actions: Tensor, packed: Tensor, b2: Tensor, b3: Tensor, b4: Tensor,
    table: Tensor, key: Tensor, noise: Tensor | None, *, start: float, clip: float, samples: int, bf16: bool,
    keep: bool,
    capability: int | None = None,
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """The forward launch, and the tensors that it fills: actions [B, N, A], chain [K + 1, B, N, A] (or empty)."""
    (B, H), K, A = context.shape, time_rows.shape[0], b4.shape[0]
    HP, AP, rows = padded_width(H), padded_actions(A), B * samples
    tile = forward_tile(rows, H, A, bf16, capability or capability_of(context.device))
    programs = -(-rows // tile.BM)
    new = context.new_empty
    actions, chain = new(B, samples, A), new((K + 1, B, samples, A) if keep else (0,))
    scratch = new((0,) if tile.WHOLE else (programs * tile.BM, HP), dtype=_compute(bf16))
    arguments = {
        "context": context, "time_rows": time_rows, "action_weight": packed_actions, "w2": packed, "b2": b2,
        "w3": packed[HP:], "b3": b3, "w4": packed[2 * HP :], "b4": b4, "table": table, "key": key, "noise": noise,
        "actions": actions, "chain": chain, "scratch": scratch, "rows": rows, "steps": K, "start": float(start),
        "clip": float(clip),
    }  # fmt: skip
    constants = {
        "SAMPLES": samples, "H": H, "A": A, "HP": HP, "AP": AP,
        "KEYED": key.shape[0] != 1 or B == 1, "GIVEN": noise is not None, "KEEP": keep,
        "BM": tile.BM, "BK": tile.BK, "BN": tile.BN, "WHOLE": tile.WHOLE,
        **_precisions(bf16),
    }  # fmt: skip
    return Launch(forward_kernel, programs, arguments, constants, tile.warps, tile.stages), actions, chain


def forward(
    context: Tensor, time_rows: Tensor, action_weight: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    w4: Tensor,
    b4: Tensor, table: Tensor, key: Tensor, noise: Tensor | None, *,
    start: float, clip: float, samples: int, bf16: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Walk the chain."""
    context, time_rows, b2, b3, b4, table, key = (x.contiguous() for x in (context, time_rows, b2, b3, b4, table, key))
    noise = None if noise is None else noise.contiguous()
    packing, packed, packed_actions = pack(action_weight, w2, w3, w4, bf16)
    packing.run()
    launch, actions, chain = forward_launch(
        context, time_rows, packed_actions, packed, b2, b3, b4, table, key, noise,
        start=start, clip=clip, samples=samples, bf16=bf16, keep=keep,
    )  # fmt: skip
    launch.run()
    return actions, chain


@dataclass
class Kept:
    """What one backward launch writes, in the compute precision. R: its rows, padded to whole tiles."""

    hidden: Tensor
    """h1, h2, h3: [3, K, R, HP]."""
    slopes: Tensor
    """dz1, dz2, dz3, alike."""
    taken: Tensor
    """The actions [K, R, AP]."""
    d_out: Tensor
    """d epsilon [K, R, AP]."""


def _kept(rows: int, K: int, H: int, A: int, tile: Tile, bf16: bool, device: torch.device) -> Kept:
    """Room for a launch's rows: in equal launches, as few as `SCRATCH_BYTES` allows."""
    HP, AP, kind = padded_width(H), padded_actions(A), _compute(bf16)
    tiles = -(-rows // tile.BM)
    tile_bytes = tile.BM * K * (6 * HP + 2 * AP) * kind.itemsize
    launches = -(-tiles // max(1, SCRATCH_BYTES // tile_bytes))
    padded = -(-tiles // launches) * tile.BM

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    return Kept(new(3, K, padded, HP), new(3, K, padded, HP), new(K, padded, AP), new(K, padded, AP))


def backward_launches(
    grad_actions: Tensor, context: Tensor, time_rows: Tensor, packed_actions: Tensor, packed: Tensor, b2: Tensor,
    b3: Tensor, b4: Tensor, table: Tensor, chain: Tensor, *, clip: float, samples: int, bf16: bool,
    capability: int | None = None,
) -> tuple[Iterator[tuple[int, Launch]], Kept]:  # fmt: skip
    """The backward launches with their first rows, one after another on the same buffers, and the buffers."""
    (B, H), K, A = context.shape, time_rows.shape[0], b4.shape[0]
    HP, AP, rows = padded_width(H), padded_actions(A), B * samples
    tile = backward_tile(rows, H, bf16, capability or capability_of(context.device))
    kept = _kept(rows, K, H, A, tile, bf16, context.device)
    padded = kept.taken.shape[1]
    constants = {
        "SAMPLES": samples, "H": H, "A": A, "HP": HP, "AP": AP,
        "BM": tile.BM, "BK": tile.BK, "BN": tile.BN, "WHOLE": tile.WHOLE, **_precisions(bf16),
    }  # fmt: skip

    def launch(begin: int) -> Launch:
        arguments = {
            "grad_actions": grad_actions, "context": context, "time_rows": time_rows, "action_weight": packed_actions,
            "w2": packed, "b2": b2, "w3": packed[HP:], "b3": b3, "w4": packed[2 * HP :], "b4": b4, "table": table,
            "chain": chain, **vars(kept), "rows": rows, "begin": begin, "padded": padded, "steps": K,
            "clip": float(clip),
        }  # fmt: skip
        # A launch's last tiles may have no row: they write zeros, so that every row of the buffers is a number.
        return Launch(backward_kernel, padded // tile.BM, arguments, constants, tile.warps, tile.stages)

    return ((begin, launch(begin)) for begin in range(0, rows, padded)), kept


def backward(
    grad_actions: Tensor, context: Tensor, time_rows: Tensor, action_weight: Tensor, w2: Tensor, b2: Tensor, w3: Tensor,
    b3: Tensor, w4: Tensor, b4: Tensor, table: Tensor, chain: Tensor, *, clip: float, samples: int, bf16: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients."""
    H, A = action_weight.shape
    K, B = time_rows.shape[0], context.shape[0]
    rows = B * samples
    grad_actions, context, time_rows, b2, b3, b4, table, chain = (
        x.contiguous() for x in (grad_actions, context, time_rows, b2, b3, b4, table, chain)
    )
    if B == 0:
        shapes = ((0, H), (K, H), (H, A), (H, H), (H,), (H, H), (H,), (A, H), (A,))
        return tuple(context.new_zeros(shape) for shape in shapes)
    packing, packed, packed_actions = pack(action_weight, w2, w3, w4, bf16)
    packing.run()
    launches, kept = backward_launches(
        grad_actions, context, time_rows, packed_actions, packed, b2, b3, b4, table, chain,
        clip=clip, samples=samples, bf16=bf16,
    )  # fmt: skip
    total: list[Tensor] = []
    d_context = []
    for begin, launch in launches:
        launch.run()
        d_context.append(kept.slopes[0, :, : rows - begin, :H].sum(0, dtype=torch.float32))
        part = gradients(kept.hidden, kept.slopes, kept.taken, kept.d_out, H, A)
        total = [x + y for x, y in zip(total, part, strict=True)] if total else part
    d_state = d_context[0] if len(d_context) == 1 else torch.cat(d_context)
    if samples > 1:
        d_state = d_state.view(B, samples, H).sum(1)
    d_time_rows, d_action_weight, dw2, db2, dw3, db3, dw4, db4 = total
    return d_state, d_time_rows, d_action_weight, dw2, db2, dw3, db3, dw4, db4
