"""The three-layer Mish net on a CUDA device, all its members in one launch forward, and one backward.

Members are the two critics of a learner, or the networks of several learners: see `members.Members`. Under
TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch
from .members import Members
from .mlp import mlp_backward_kernel, mlp_forward_kernel, mlp_pack_kernel
from .products import product_of
from .reverse_diffusion import PACKED_ROWS, capability_of, compute_type, operands_of, precisions
from .tiles import Tile, backward_tile, forward_tile, padded_actions, padded_states, padded_width
from .weight_gradients import FEW_ROWS, input_launch, new_gradients, weight_launch


class Packed(NamedTuple):
    """Weights as the kernels read them: see `mlp_pack_kernel`."""

    trunk: Tensor
    inputs: Tensor
    biases: Tensor


def _sizes(members: Members) -> dict[str, Any]:
    H, inputs = members.first[0].shape
    outputs = members.first[6].shape[0]
    return {
        "IN": inputs, "IP": padded_states(inputs), "H": H, "OUT": outputs, "HP": padded_width(H),
        "OP": padded_actions(outputs), "INITS": members.rows,
    }  # fmt: skip


def _share(x: Tensor, members: Members) -> int:
    """How many members share their inputs: all of x [B, I], or of x [G, B, I] as many as there are to each of G."""
    groups = 1 if x.ndim == 2 else x.shape[0]
    if members.count % groups:
        raise ValueError(f"{members.count} members in {groups} groups of equal size")
    return members.count // groups


def pack(x: Tensor, members: Members, bf16: bool) -> tuple[Launch, Packed]:
    """Memory for the members' packed weights, and the launch that fills it."""
    sizes, count = _sizes(members), members.count
    HP = sizes["HP"]
    trunk = x.new_empty(count, 2 * HP + sizes["OP"], HP, dtype=compute_type(bf16))
    packed = Packed(trunk, x.new_empty(count, sizes["IP"], HP), x.new_empty(count, 4, HP))
    arguments = {**members.arguments(), **packed._asdict(), **members.distances()}
    constants = sizes | {"BM": PACKED_ROWS}
    return Launch(mlp_pack_kernel, HP // PACKED_ROWS, arguments, constants, 4, 1, members=count), packed


def forward_launch(x: Tensor, members: Members, packed: Packed, out: Tensor, bf16: bool, capability: int) -> Launch:
    """The launch that fills out [M, B, O]."""
    sizes, rows, count = _sizes(members), x.shape[-2], members.count
    # By the rows of those that share their inputs, a learner's: its bits don't depend on how many learners there are.
    tile = forward_tile(rows * _share(x, members), sizes["H"], sizes["OUT"], operands_of(bf16), capability)
    padded = -(-rows // tile.BM) * tile.BM
    room = (0,) if tile.WHOLE else (count, padded, sizes["HP"])
    arguments = {
        "x": x, "init": members.first[1], **packed._asdict(), "out": out,
        "contexts": x.new_empty(count, padded, sizes["H"]),
        "scratch": x.new_empty(room, dtype=compute_type(bf16)), "rows": rows, "padded": padded,
    }  # fmt: skip
    return _launch(mlp_forward_kernel, tile, padded, arguments, sizes | {"SHARE": _share(x, members)}, count, bf16)


def backward_launch(
    grad: Tensor, x: Tensor, members: Members, packed: Packed, bf16: bool, capability: int
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The launch backward, and what it fills: hidden and slopes [3, M, R, HP], d_out [M, R, OP], R whole tiles."""
    sizes, rows, count = _sizes(members), x.shape[-2], members.count
    tile = backward_tile(rows * _share(x, members), sizes["H"], operands_of(bf16), capability)
    padded = -(-rows // tile.BM) * tile.BM
    hidden, slopes = (x.new_empty(3, count, padded, sizes["HP"], dtype=compute_type(bf16)) for _ in range(2))
    d_out = x.new_empty(count, padded, sizes["OP"], dtype=compute_type(bf16))
    arguments = {
        "grad": grad.contiguous(), "x": x, "init": members.first[1], **packed._asdict(),
        "contexts": x.new_empty(count, padded, sizes["H"]), "hidden": hidden, "slopes": slopes, "d_out": d_out,
        "rows": rows, "padded": padded,
    }  # fmt: skip
    sizes |= {"SHARE": _share(x, members)}
    return _launch(mlp_backward_kernel, tile, padded, arguments, sizes, count, bf16), hidden, slopes, d_out


def _launch(
    kernel: Any, tile: Tile, padded: int, arguments: dict[str, Any], sizes: dict[str, Any], members: int, bf16: bool
) -> Launch:
    constants = {**sizes, "BM": tile.BM, "BK": tile.BK, "BN": tile.BN, "WHOLE": tile.WHOLE, **precisions(bf16)}
    return Launch(kernel, padded // tile.BM, arguments, constants, tile.warps, tile.stages, members=members)


def forward(x: Tensor, members: Members, bf16: bool) -> tuple[Tensor, Packed]:
    """The outputs [M, B, O] of M members, and the packed weights for the backward pass.

    x: inputs [B, I] of all, or [G, B, I], each for M / G members that follow one another.
    """
    x = x.contiguous()
    launch, packed = pack(x, members, bf16)
    launch.run()
    out = x.new_empty(members.count, x.shape[-2], _sizes(members)["OUT"])
    forward_launch(x, members, packed, out, bf16, capability_of(x.device)).run()
    return out, packed


def backward(
    grad: Tensor, x: Tensor, members: Members, packed: Packed, bf16: bool, need_x: bool, need_weights: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of x, shaped as it, and those of the eight weights, [M, …] each, from that of the outputs [M, B, O].

    Each only where it is needed. Sums are always taken in the same order: of `FEW_ROWS` by `backward_into`, of more by
    matrix products, which share out rows.
    """
    if x.shape[-2] > FEW_ROWS:
        return _backward_of_many(grad, x, members, packed, bf16, need_x, need_weights)
    into = new_gradients(members)[1] if need_weights else []
    return backward_into(grad, x, members, packed, bf16, need_x, into)[0], into


def backward_into(
    grad: Tensor, x: Tensor, members: Members, packed: Packed, bf16: bool, need_x: bool, into: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor]:
    """As `backward`, in at most three launches; returns the gradient of x and dz1, and writes those of the weights.

    dz1, the gradient of the first layer before its Mish, is [M, R, HP], rows and columns from B and H on of no meaning.

    into: eight tensors as `Members.stacked` takes them, or none, where they are not needed.
    """
    x, sizes, rows = x.contiguous(), _sizes(members), x.shape[-2]
    launch, hidden, slopes, d_out = backward_launch(grad, x, members, packed, bf16, capability_of(x.device))
    launch.run()
    groups, how, d_x = x if x.ndim == 3 else x[None], precisions(bf16), None
    if need_x:
        d_x = torch.empty_like(groups)
        input_launch(slopes[0], packed.inputs, d_x, sizes["H"], how).run()
        d_x = d_x.view(x.shape)
    if into:
        share, written = _share(x, members), Members.stacked(into)
        weight_launch(hidden, slopes, d_out, groups, written, rows, how, share).run()
        if sizes["INITS"]:
            into[1].copy_(slopes[0, :, :rows, : sizes["H"]])
    return d_x, slopes[0]


def _backward_of_many(
    grad: Tensor, x: Tensor, members: Members, packed: Packed, bf16: bool, need_x: bool, need_weights: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """As `backward`, by matrix products."""
    x, count, sizes, kind = x.contiguous(), members.count, _sizes(members), compute_type(bf16)
    rows, H, inputs, share = x.shape[-2], sizes["H"], sizes["IN"], _share(x, members)
    launch, hidden, slopes, d_out = backward_launch(grad, x, members, packed, bf16, capability_of(x.device))
    launch.run()
    hidden, slopes, d_out = hidden[:, :, :rows, :H], slopes[:, :, :rows, :H], d_out[:, :rows, : sizes["OUT"]]
    d_x = None
    if need_x:
        # Of all members that share their inputs at once: [G, B, share H] by [G, share H, I].
        W1 = packed.inputs[:, :inputs, :H].to(kind).transpose(1, 2).reshape(-1, share * H, inputs)
        dz1 = slopes[0].unflatten(0, (-1, share)).transpose(1, 2).reshape(-1, rows, share * H)
        d_x = product_of(dz1, W1).view(x.shape)
    if not need_weights:
        return d_x, []
    sums = slopes.sum(2, dtype=torch.float32)
    d_inner = product_of(slopes[1:].flatten(0, 1).transpose(-1, -2), hidden[:2].flatten(0, 1)).unflatten(0, (2, count))
    own = x.to(kind).view(-1, 1, rows, inputs).expand(-1, share, -1, -1).flatten(0, 1)
    d_W1 = product_of(slopes[0].transpose(-1, -2), own)
    d_init = slopes[0].float() if sizes["INITS"] else sums[0]
    d_W4 = product_of(d_out.transpose(-1, -2), hidden[2])
    return d_x, [d_W1, d_init, d_inner[0], sums[1], d_inner[1], sums[2], d_W4, d_out.sum(1, dtype=torch.float32)]
