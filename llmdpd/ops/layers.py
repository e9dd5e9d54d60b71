"""Layers with gradients in C++: linear layers behind a norm, attention to a memory, retrieval of waypoints.

The networks (`llmdpd.nn.context.retrieval`, `llmdpd.nn.trajectory_encoder`) define them in PyTorch, which the tests
hold these to, and call them here where `computes` says so. Several threads take groups of rows; results and gradients
have the same bits for any number of them. Norms have torch's default epsilon, as all of the networks' have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmdpd.ops import native
from llmdpd.ops.autograd import eager_on_cpu

FEW_ROWS = 4  # below, a group's memory costs more to lay out than it saves


def computes(*tensors: Tensor) -> bool:
    """Whether the C++ code computes what is made of these: float32 on the CPU, under no mode, compiler or autocast."""
    return (
        native.available()[0]
        and all(tensor.dtype is torch.float32 and eager_on_cpu(tensor) for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def computes_groups(hidden: Tensor, *tensors: Tensor) -> bool:
    """The same of rows [G, M, W] in groups; not where each group has but a few."""
    return hidden.shape[1] >= FEW_ROWS and computes(hidden, *tensors)


class LayerWeights(NamedTuple):
    """The weights of an attention layer with its feed-forward, the norms' first."""

    query_norm: nn.LayerNorm
    forward_norm: nn.LayerNorm
    query: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    widen: tuple[Tensor, Tensor]
    narrow: tuple[Tensor, Tensor]

    def flat(self) -> tuple[Tensor, ...]:
        """Twelve tensors, in the order of the C++ code."""
        norms = (self.query_norm, self.forward_norm)
        rest = (self.query, self.out, self.widen, self.narrow)
        return (*(part for norm in norms for part in (norm.weight, norm.bias)), *(part for two in rest for part in two))


def linears(x: Tensor, norm: nn.LayerNorm | None, layers: Sequence[nn.Linear | tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Linear layers on x [..., I], normalised first: [..., O] of each."""
    pairs = [(layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer for layer in layers]
    normed = () if norm is None else (norm.weight, norm.bias)
    flat = [part for pair in pairs for part in pair]
    results = _Linears.apply(len(normed), x.reshape(-1, x.shape[-1]), *normed, *flat)
    return [result.unflatten(0, x.shape[:-1]) for result in results]


def attention_layer(
    hidden: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int, weights: LayerWeights
) -> Tensor:
    """An attention layer with its feed-forward on queries [G, M, W], each group's to its own keys and values [G, T, W].

    bias [G, T] is added to every score, -inf where there is no step; it has no gradient. Returns [G, M, W].
    """
    out: Tensor = _Attention.apply(heads, hidden, key, value, bias, *weights.flat())
    return out


def retrieve(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    here: Tensor,
    compared: tuple[Tensor, Tensor] | None,
    waypoints: Tensor,
    *,
    heads: int,
    action_dim: int,
    geometry: int,
) -> Tensor:
    """What waypoint heads find, and how far states are from it: `RetrievalContext`'s [G, M, heads (A + 2 L G)].

    Args:
        query: [G, M, W]. key: [G, T, W]. bias: [G, T], no gradient.
        here: places [G, M, C] of the states, the first numbers their geometry; no gradient.
        compared: places [G, T, C] of the steps, without gradient, and the weights [heads, C] of squared differences.
        waypoints: raw values [G, T, A + L G], no gradient.
        heads: of them. action_dim: A. geometry: G.
    """
    there, similarity = (None, None) if compared is None else compared
    sizes = (heads, action_dim, geometry)
    out: Tensor = _Retrieval.apply(sizes, query, key, bias, here, there, similarity, waypoints)
    return out


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        x = x.contiguous()
        out = [x.new_empty(len(x), weight.shape[0]) for weight in tensors[norm::2]]
        tape = native.linear_forward(x, tensors[:norm], tensors[norm:], out)
        ctx.norm = norm
        ctx.save_for_backward(x, tape, *tensors)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, tape, *tensors = ctx.saved_tensors
        need_x = ctx.needs_input_grad[1] or ctx.norm > 0
        d_x = torch.empty_like(x) if need_x else None
        gradients = [tensor.new_empty(tensor.shape) for tensor in tensors]
        native.linear_backward(x, tensors[: ctx.norm], tensors[ctx.norm :], grads, tape, d_x, gradients)
        return None, d_x if ctx.needs_input_grad[1] else None, *gradients


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: int, *tensors: Tensor) -> Tensor:
        dense = [tensor.contiguous() for tensor in tensors[:4]]
        out = torch.empty_like(dense[0])
        tape = native.attention_forward(heads, dense, tensors[4:], out)
        ctx.heads = heads
        ctx.save_for_backward(tape, *dense, *tensors[4:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tape, *tensors = ctx.saved_tensors
        gradients = [tensor.new_empty(tensor.shape) for tensor in (*tensors[:3], *tensors[4:])]
        native.attention_backward(ctx.heads, tensors[:4], tensors[4:], grad, tape, gradients)
        return None, *gradients[:3], None, *gradients[3:]


class _Retrieval(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, int, int], *tensors: Tensor | None) -> Tensor:
        dense = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        query, waypoints = dense[0], dense[-1]
        assert query is not None
        assert waypoints is not None
        heads, action_dim, _ = sizes
        width = heads * (2 * waypoints.shape[-1] - action_dim)
        out = query.new_empty(*query.shape[:2], width)
        tape = native.retrieval_forward(sizes, dense, out)
        ctx.sizes = sizes
        ctx.save_for_backward(tape, out, *dense)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tape, out, *tensors = ctx.saved_tensors
        query, key, _, _, _, similarity, _ = tensors
        d_query, d_key = torch.empty_like(query), torch.empty_like(key)
        d_similarity = None if similarity is None else torch.empty_like(similarity)
        native.retrieval_backward(ctx.sizes, tensors, out, grad, tape, (d_query, d_key, d_similarity))
        return None, d_query, d_key, None, None, None, d_similarity, None
