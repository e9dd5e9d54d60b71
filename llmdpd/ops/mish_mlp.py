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
    trunk = _trunk(layers)
    tensors = [x, input_weight, init, *trunk]
    if triton.computes_mlps(x, [tensors[1:]]):
        return mish_mlps(x, [(input_weight, init, layers)], precision)[0]
    if not _native(tensors):
        if precision == "fp32":
            return mish_mlp_reference(x, input_weight, init, trunk)
        with torch.autocast(x.device.type, torch.bfloat16):
            return mish_mlp_reference(x, input_weight, init, trunk).to(x.dtype)
    rows = x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)
    inits = init if init.ndim == 1 else init.expand(*x.shape[:-1], -1).flatten(0, -2)
    differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    out = autograd.mish_mlp(MlpArguments(rows, input_weight, inits, trunk, precision == "bf16"), differentiate)
    return out.reshape(*x.shape[:-1], trunk[4].shape[0])


def mish_mlps(
    x: Tensor, members: Sequence[tuple[Tensor, Tensor, Sequence[nn.Linear]]], precision: Precision = "fp32"
) -> list[Tensor]:
    """Nets of the same sizes on the same inputs x [..., I], two in one launch on CUDA. Returns [..., O] of each.

    members: of each its input_weight, init and layers, as of `mish_mlp`; of several, init is a bias [H].
    """
    flat = [(weight, init, *_trunk(layers)) for weight, init, layers in members]
    if not triton.computes_mlps(x, flat):
        return [mish_mlp(x, *member, precision) for member in members]
    rows = x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)
    if len(members) == 1 and flat[0][1].ndim > 1:
        flat = [(flat[0][0], flat[0][1].expand(*x.shape[:-1], -1).flatten(0, -2), *flat[0][2:])]
    outs = triton.mish_mlps(rows, flat, precision == "bf16")
    return [out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs.unbind(0)]


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
