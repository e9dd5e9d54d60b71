"""How the fused operations are called with a gradient, or on CUDA.

A training iteration calls the operators some twenty times for a fraction of a millisecond each; what the dispatcher
and its generated autograd do in Python around a call is a fifth of that. Here the same implementations are called by
plain `torch.autograd.Function`s. Where a mode or a compiler is active, and on CUDA, the registered operators are
called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops import operators
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


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bf16: bool, keep: bool, *tensors: Tensor) -> Tensor:
        out, tape = operators.mlp_forward_cpu(MlpArguments._make((*tensors[:3], tensors[3:], bf16)), keep)
        ctx.bf16 = bf16
        ctx.save_for_backward(tape, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tape, *tensors = ctx.saved_tensors
        need_x, *weights = ctx.needs_input_grad[2:]
        # The reward term asks a critic that does not learn meanwhile.
        need_weights = any(weights)
        mlp = MlpArguments._make((*tensors[:3], tensors[3:], ctx.bf16))
        gradients = operators.mlp_backward_cpu(grad, tape, mlp, need_x, need_weights)
        rest = gradients[1:] if need_weights else [None] * len(weights)
        return None, None, gradients[0] if need_x else None, *rest


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


def mish_mlp(mlp: MlpArguments, differentiate: bool) -> Tensor:
    """The three-layer net's outputs [B, O]."""
    keep = differentiate and operators.keeps_tape(operators.mlp_tape_floats(mlp))
    out: Tensor
    if eager_on_cpu(mlp.x):
        out = _Mlp.apply(mlp.bf16, keep, *mlp[:3], *mlp.trunk)
    else:
        out = torch.ops.llmdpd.mish_mlp(*mlp, keep)[0]
    return out
