"""The operators' way round PyTorch's dispatcher, for eager mode on the CPU.

A training iteration calls the operators some twenty times for a fraction of a millisecond each; what the dispatcher
and its generated autograd do in Python around a call is a fifth of that. Here the same implementations are called by
plain `torch.autograd.Function`s. Where a mode or a compiler watches, and on CUDA, the registered operators are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops import operators


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, constants: tuple[Any, ...], keep: bool, *tensors: Tensor) -> Tensor:
        *first, w2, b2, w3, b3, w4, b4 = tensors
        actions, tape = operators.chain_forward_cpu(*first, [w2, b2, w3, b3, w4, b4], *constants, keep)
        ctx.constants = constants
        ctx.save_for_backward(tape, *tensors)
        return actions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tape, *tensors = ctx.saved_tensors
        need_state = ctx.needs_input_grad[2]
        gradients = operators.chain_backward_cpu(grad, tape, *tensors[:5], tensors[5:], *ctx.constants, need_state)
        return None, None, gradients[0] if need_state else None, *gradients[1:]


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bf16: bool, keep: bool, *tensors: Tensor) -> Tensor:
        x, weight, init, *trunk = tensors
        out, tape = operators.mlp_forward_cpu(x, weight, init, trunk, bf16, keep)
        ctx.bf16 = bf16
        ctx.save_for_backward(tape, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tape, x, weight, init, *trunk = ctx.saved_tensors
        need_x, *weights = ctx.needs_input_grad[2:]
        # The reward term asks a critic that does not learn meanwhile.
        need_weights = any(weights)
        gradients = operators.mlp_backward_cpu(grad, tape, x, weight, init, trunk, ctx.bf16, need_x, need_weights)
        rest = gradients[1:] if need_weights else [None] * len(weights)
        return None, None, gradients[0] if need_x else None, *rest


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
    )


def chain(
    state: Tensor,
    state_weight: Tensor,
    init: Tensor,
    time_rows: Tensor,
    action_weight: Tensor,
    trunk: Sequence[Tensor],
    constants: tuple[Any, ...],
    keep: bool,
) -> Tensor:
    """`torch.ops.llmdpd.reverse_diffusion`'s actions; `constants` from the table to bf16."""
    if _plain(state):
        actions: Tensor = _Chain.apply(constants, keep, state, state_weight, init, time_rows, action_weight, *trunk)
    else:
        actions = torch.ops.llmdpd.reverse_diffusion(
            state, state_weight, init, time_rows, action_weight, trunk, *constants, keep
        )[0]
    return actions


def mlp(x: Tensor, input_weight: Tensor, init: Tensor, trunk: Sequence[Tensor], bf16: bool, keep: bool) -> Tensor:
    """`torch.ops.llmdpd.mish_mlp`'s outputs."""
    if _plain(x):
        out: Tensor = _Mlp.apply(bf16, keep, x, input_weight, init, *trunk)
    else:
        out = torch.ops.llmdpd.mish_mlp(x, input_weight, init, trunk, bf16, keep)[0]
    return out
