"""The three-layer Mish net, out = W4 mish(W3 mish(W2 mish(W1 x + init) + b2) + b3) + b4: noise network and critics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.ops import autograd, native, triton
from llmdpd.ops.arguments import MlpArguments, Precision


def mish_mlp(
    x: Tensor, input_weight: Tensor, init: Tensor, layers: Sequence[nn.Linear], precision: Precision = "fp32"
) -> Tensor:
    """The net on a batch of inputs; differentiable in all.

    Device and dtype alone decide what computes it: C++ for float32 on the CPU, Triton on CUDA; PyTorch in another
    dtype, and under autocast, which the fused code would ignore.

    Args:
        x: [..., I].
        input_weight: W1 [H, I]; a slice of the columns of a larger matrix is possible.
        init: what is added to W1 x: the bias [H], or a row for each input, [..., H].
        layers: the three that follow: [H, H], [H, H], [O, H].
        precision: `bf16` runs the products of these three in bfloat16, summed in float32.

    Returns:
        [..., O].

    Raises:
        RuntimeError: float32 on the CPU and no C++ module; the message says why and what would help.
    """
    return mish_mlps(x, [(input_weight, init, layers)], precision)[0]


def mish_mlps(
    x: Tensor, members: Sequence[tuple[Tensor, Tensor, Sequence[nn.Linear]]], precision: Precision = "fp32"
) -> list[Tensor]:
    """Nets of the same sizes on the same inputs x [..., I], in one call. Returns [..., O] of each; see `mish_mlp`.

    members: of each its input_weight, init and layers, as of `mish_mlp`; of several, init is a bias [H].
    """
    flat = [(weight, init, *_trunk(layers)) for weight, init, layers in members]
    tensors, bf16 = [x, *(tensor for of in flat for tensor in of)], precision == "bf16"
    on_cuda = triton.computes_mlps(x, flat)
    if not on_cuda and not _native(tensors):
        return [_in_torch(x, weight, init, trunk, precision) for weight, init, *trunk in flat]
    rows = x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)
    if len(flat) == 1 and flat[0][1].ndim > 1:
        flat = [(flat[0][0], flat[0][1].expand(*x.shape[:-1], -1).flatten(0, -2), *flat[0][2:])]
    outs: Sequence[Tensor]
    if on_cuda:
        outs = triton.mish_mlps(rows, flat, bf16).unbind(0)
    else:
        differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        mlps = [MlpArguments(rows, weight, init, trunk, bf16) for weight, init, *trunk in flat]
        outs = autograd.mish_mlps(mlps, differentiate)
    return [out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs]


def _in_torch(x: Tensor, input_weight: Tensor, init: Tensor, trunk: Sequence[Tensor], precision: Precision) -> Tensor:
    if precision == "fp32":
        return mish_mlp_reference(x, input_weight, init, trunk)
    with torch.autocast(x.device.type, torch.bfloat16):
        return mish_mlp_reference(x, input_weight, init, trunk).to(x.dtype)


def _trunk(layers: Sequence[nn.Linear]) -> list[Tensor]:
    return [part for layer in layers for part in (layer.weight, layer.bias)]


def mish_mlp_reference(x: Tensor, input_weight: Tensor, init: Tensor, trunk: Sequence[Tensor]) -> Tensor:
    """The same in plain PyTorch, on any device and in any dtype: the oracle for the fused one."""
    w2, b2, w3, b3, w4, b4 = trunk
    hidden = F.mish(F.linear(x, input_weight) + init)
    return F.linear(F.mish(F.linear(F.mish(F.linear(hidden, w2, b2)), w3, b3)), w4, b4)


def _native(tensors: Sequence[Tensor]) -> bool:
    """Whether the C++ code computes these; it must be available then."""
    if not all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    # Not `native.module()`, which a compiler can't see through.
    there, reason = native.available()
    if not there:
        # PyTorch could compute it, but slower and with other last bits, which must not change silently in a run.
        raise RuntimeError(reason)
    return True
