"""How the fused operations are called with a gradient, or on CUDA.

A training iteration calls the operators some twenty times for a fraction of a millisecond each; what the dispatcher
and its generated autograd do in Python around a call is a fifth of that. Here the same implementations are called by
plain `torch.autograd.Function`s. Where a mode or a compiler is active, and on CUDA, the registered operators are
called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops import native, operators
from llmdpd.ops.arguments import ChainArguments, MlpArguments


class _Chain(torch.autograd.Function):
    """Tensors: the first six arguments of the chain, the trunk last; constants: the arguments after them."""

    @staticmethod
    def forward(ctx: Any, constants: tuple[Any, ...], keep: bool, *tensors: Tensor) -> Tensor:
        actions, tape = operators.chain_forward_cpu(ChainArguments._make((*tensors[:5], tensors[5:], *constants)), keep)
        ctx.constants = constants
        ctx.save_for_backward(tape, *tensors)
        return actions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tape, *tensors = ctx.saved_tensors
        need_state = ctx.needs_input_grad[2]
        chain = ChainArguments._make((*tensors[:5], tensors[5:], *ctx.constants))
        gradients = operators.chain_backward_cpu(grad, tape, chain, need_state)
        return None, None, gradients[0] if need_state else None, *gradients[1:]


class _Mlps(torch.autograd.Function):
    """Nets on one input x: of each eight tensors, the input weight, init and the trunk. Gives the outputs of each."""

    @staticmethod
    def forward(ctx: Any, bf16: bool, keep: bool, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outs, tapes = operators.mlps_forward_cpu(_members(x, tensors, bf16), keep)
        ctx.bf16 = bf16
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, *tapes)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        tensors, tapes = saved[: -len(grads)], saved[-len(grads) :]
        need_x, *needed = ctx.needs_input_grad[2:]
        mlps = _members(x, tensors, ctx.bf16)
        asked = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Sequence[Tensor] | list[None]] = [[None] * _EACH for _ in mlps]
        for i in asked:
            # The reward term asks a critic that does not learn meanwhile.
            if any(needed[i * _EACH : (i + 1) * _EACH]):
                weights = tensors[i * _EACH : (i + 1) * _EACH]
                found[i] = _unflatten_dense_tensors(x.new_empty(sum(map(Tensor.numel, weights))), weights)
        of_x = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in asked] if need_x else []
        if asked:
            given = [grad for grad in grads if grad is not None]
            written = [[part for part in found[i] if part is not None] for i in asked]
            native.mlps_backward([mlps[i] for i in asked], given, [tapes[i] for i in asked], of_x, written)
        total = sum(of_x[1:], of_x[0]) if of_x else None
        return None, None, total, *(part for of in found for part in of)


_EACH = 8  # tensors of a net


def _members(x: Tensor, tensors: Sequence[Tensor], bf16: bool) -> list[MlpArguments]:
    parts = (tensors[i : i + _EACH] for i in range(0, len(tensors), _EACH))
    return [MlpArguments(x, weight, init, trunk, bf16) for weight, init, *trunk in parts]


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether a plain call of the C++ code is possible: no mode, compiler or subclass has a say in it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
    )


def reverse_diffusion(chain: ChainArguments, differentiate: bool) -> Tensor:
    """a_0 [B, N, A]. `differentiate`: whether a gradient may be asked for."""
    keep = differentiate and (chain.state.is_cuda or operators.keeps_tape(operators.chain_tape_floats(chain)))
    actions: Tensor
    if eager_on_cpu(chain.state):
        actions = _Chain.apply(chain[6:], keep, *chain[:5], *chain.trunk)
    else:
        actions = torch.ops.llmdpd.reverse_diffusion(*chain, keep)[0]
    return actions


def mish_mlps(mlps: Sequence[MlpArguments], differentiate: bool) -> list[Tensor]:
    """The outputs [B, O] of three-layer nets of the same sizes and precision on the same x."""
    first = mlps[0]
    keep = differentiate and operators.keeps_tape(len(mlps) * operators.mlp_tape_floats(first))
    if eager_on_cpu(first.x):
        if not differentiate:
            return operators.mlps_forward_cpu(mlps, keep)[0]
        flat = (tensor for mlp in mlps for tensor in (mlp.input_weight, mlp.init, *mlp.trunk))
        return list(_Mlps.apply(first.bf16, keep, first.x, *flat))
    return [torch.ops.llmdpd.mish_mlp(*mlp, keep)[0] for mlp in mlps]
