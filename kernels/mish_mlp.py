"""The three-layer Mish net on a CUDA device, one or two members at a time: a launch forward, and one backward.

Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch
from .mlp import mlp_backward_kernel, mlp_forward_kernel, mlp_pack_kernel
from .products import product_of
from .reverse_diffusion import capability_of, compute_type, operands_of, precisions
from .tiles import Tile, backward_tile, forward_tile, padded_actions, padded_states, padded_width

Member = Sequence[Tensor]
"""A member's weights: W1 [H, I], init [H] (or [B, H], of one member alone), W2, b2, W3, b3, W4, b4."""


class Packed(NamedTuple):
    """Weights as the kernels read them: see `mlp_pack_kernel`."""

    trunk: Tensor
    inputs: Tensor
    biases: Tensor


def _sizes(members: Sequence[Member]) -> dict[str, Any]:
    H, inputs = members[0][0].shape
    outputs = members[0][6].shape[0]
    return {
        "IN": inputs, "IP": padded_states(inputs), "H": H, "OUT": outputs, "HP": padded_width(H),
        "OP": padded_actions(outputs), "INITS": members[0][1].ndim == 2,
    }  # fmt: skip


def pack(x: Tensor, members: Sequence[Member], bf16: bool) -> tuple[Launch, Packed]:
    """Memory for the members' packed weights, and the launch that fills it."""
    sizes, count = _sizes(members), len(members)
    HP = sizes["HP"]
    trunk = x.new_empty(count, 2 * HP + sizes["OP"], HP, dtype=compute_type(bf16))
    packed = Packed(trunk, x.new_empty(count, sizes["IP"], HP), x.new_empty(count, 4, HP))
    names = ("w1", "init", "w2", "b2", "w3", "b3", "w4", "b4")
    arguments: dict[str, Any] = {}
    for member, ending in zip((members[0], members[-1]), ("", "_2"), strict=True):
        dense = (member[0], *(part.contiguous() for part in member[1:]))
        arguments |= {name + ending: part for name, part in zip(names, dense, strict=True)}
    arguments |= packed._asdict()
    for member, ending in zip((members[0], members[-1]), ("", "_2"), strict=True):
        arguments |= {f"w1_rows{ending}": member[0].stride(0), f"w1_columns{ending}": member[0].stride(1)}
    return Launch(mlp_pack_kernel, HP, arguments, sizes | {"MEMBERS": count}, 4, 1, members=count), packed


def forward_launch(
    x: Tensor, members: Sequence[Member], packed: Packed, out: Tensor, bf16: bool, capability: int
) -> Launch:
    """The launch that fills out [M, B, O]."""
    sizes, rows = _sizes(members), len(x)
    tile = forward_tile(rows * len(members), sizes["H"], sizes["OUT"], operands_of(bf16), capability)
    padded = -(-rows // tile.BM) * tile.BM
    room = (0,) if tile.WHOLE else (len(members), padded, sizes["HP"])
    arguments = {
        "x": x, "init": members[0][1].contiguous(), **packed._asdict(), "out": out,
        "contexts": x.new_empty(len(members), padded, sizes["H"]),
        "scratch": x.new_empty(room, dtype=compute_type(bf16)), "rows": rows, "padded": padded,
    }  # fmt: skip
    return _launch(mlp_forward_kernel, tile, padded, arguments, sizes, len(members), bf16)


def backward_launch(
    grad: Tensor, x: Tensor, members: Sequence[Member], packed: Packed, bf16: bool, capability: int
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The launch backward, and what it fills: hidden and slopes [3, M, R, HP], d_out [M, R, OP], R whole tiles."""
    sizes, rows, count = _sizes(members), len(x), len(members)
    tile = backward_tile(rows * count, sizes["H"], operands_of(bf16), capability)
    padded = -(-rows // tile.BM) * tile.BM
    hidden, slopes = (x.new_empty(3, count, padded, sizes["HP"], dtype=compute_type(bf16)) for _ in range(2))
    d_out = x.new_empty(count, padded, sizes["OP"], dtype=compute_type(bf16))
    arguments = {
        "grad": grad.contiguous(), "x": x, "init": members[0][1].contiguous(), **packed._asdict(),
        "contexts": x.new_empty(count, padded, sizes["H"]), "hidden": hidden, "slopes": slopes, "d_out": d_out,
        "rows": rows, "padded": padded,
    }  # fmt: skip
    return _launch(mlp_backward_kernel, tile, padded, arguments, sizes, count, bf16), hidden, slopes, d_out


def _launch(
    kernel: Any, tile: Tile, padded: int, arguments: dict[str, Any], sizes: dict[str, Any], members: int, bf16: bool
) -> Launch:
    constants = {**sizes, "BM": tile.BM, "BK": tile.BK, "BN": tile.BN, "WHOLE": tile.WHOLE, **precisions(bf16)}
    return Launch(kernel, padded // tile.BM, arguments, constants, tile.warps, tile.stages, members=members)


def forward(x: Tensor, members: Sequence[Member], bf16: bool) -> tuple[Tensor, Packed]:
    """The outputs [M, B, O] of M members on inputs x [B, I], and the packed weights for the backward pass."""
    x = x.contiguous()
    launch, packed = pack(x, members, bf16)
    launch.run()
    out = x.new_empty(len(members), len(x), _sizes(members)["OUT"])
    forward_launch(x, members, packed, out, bf16, capability_of(x.device)).run()
    return out, packed


def backward(
    grad: Tensor,
    x: Tensor,
    members: Sequence[Member],
    packed: Packed,
    bf16: bool,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor | None, list[list[Tensor]]]:
    """The gradient of x [B, I], and those of each member's eight weights, from that of the outputs [M, B, O].

    Each only where it is needed. Sums are always taken in the same order.
    """
    x, count, sizes, kind = x.contiguous(), len(members), _sizes(members), compute_type(bf16)
    rows, H, outputs = len(x), sizes["H"], sizes["OUT"]
    launch, hidden, slopes, d_out = backward_launch(grad, x, members, packed, bf16, capability_of(x.device))
    launch.run()
    hidden, slopes, d_out = hidden[:, :, :rows, :H], slopes[:, :, :rows, :H], d_out[:, :rows, :outputs]
    d_x = None
    if need_x:
        W1 = torch.cat([member[0] for member in members])  # of all members at once: [M H, I]
        dz1 = slopes[0].transpose(0, 1).reshape(rows, count * H)
        d_x = product_of(dz1, W1.to(kind))
    if not need_weights:
        return d_x, []
    sums = slopes.sum(2, dtype=torch.float32)
    d_b4 = d_out.sum(1, dtype=torch.float32)
    d_inner = product_of(slopes[1:].flatten(0, 1).transpose(-1, -2), hidden[:2].flatten(0, 1)).unflatten(0, (2, count))
    d_W4 = product_of(d_out.transpose(-1, -2), hidden[2])
    d_W1 = product_of(slopes[0].transpose(-1, -2), x.to(kind).expand(count, rows, -1))
    gradients = []
    for m in range(count):
        d_init = slopes[0, m].float() if sizes["INITS"] else sums[0, m]
        inner = [d_inner[0, m], sums[1, m], d_inner[1, m], sums[2, m]]
        gradients.append([d_W1[m], d_init, *inner, d_W4[m], d_b4[m]])
    return d_x, gradients
