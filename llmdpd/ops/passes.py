"""Layers in C++ on arrays: each pass forward returns its results and the pass backward that belongs to it.

Several of them make one node of autograd's graph (`llmdpd.ops.reading`). Weights are taken by name from one dictionary,
and their gradients written to the arrays of the same names in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.ops import native

Array = NDArray[np.float32]
Arrays = Mapping[str, Array]


def _pair(arrays: Arrays, name: str) -> tuple[Array, Array]:
    return arrays[f"{name}.weight"], arrays[f"{name}.bias"]


def _columns(arrays: Arrays, names: Sequence[str]) -> tuple[list[Array], list[Array]]:
    return [arrays[f"{name}.weight"] for name in names], [arrays[f"{name}.bias"] for name in names]


def linears(
    x: Array, weights: Arrays, names: Sequence[str], norm: str | None = None
) -> tuple[list[Array], Callable[..., Array | None]]:
    """Linear layers on x [R, I], normalised first by `norm`: [R, O] of each. Without a layer, the normalised x itself.

    The pass backward takes the gradients of the results, where the weights' go, and whether x's is asked for, which it
    returns then; behind a norm it always is.
    """
    module = native.module()
    of_norm = [] if norm is None else list(_pair(weights, norm))
    matrices, biases = _columns(weights, names)
    widths = [len(bias) for bias in biases] or [x.shape[1]]
    out = [np.empty((len(x), width), np.float32) for width in widths]
    tape = module.pooled_buffer(module.linear_tape(len(x), x.shape[1], bool(of_norm)))
    module.linear_forward(x, of_norm, matrices, biases, out, tape, native.threads())

    def backward(grads: Sequence[Array], gradients: Arrays, need_x: bool = True) -> Array | None:
        d_x = np.empty_like(x) if need_x or of_norm else None
        d_norm = [] if norm is None else list(_pair(gradients, norm))
        module.linear_backward(
            *(x, of_norm, matrices, biases, list(grads), tape, d_x, d_norm),
            *(*_columns(gradients, names), native.threads()),
        )
        return d_x

    return out, backward


def linear(x: Array, weights: Arrays, name: str) -> tuple[Array, Callable[..., Any]]:
    """One linear layer; see `linears`."""
    (out,), of_layers = linears(x, weights, (name,))

    def backward(grad: Array, gradients: Arrays, need_x: bool = True) -> Array | None:
        return of_layers((grad,), gradients, need_x)

    return out, backward


def norm(x: Array, weights: Arrays, name: str) -> tuple[Array, Callable[..., Any]]:
    """A layer norm alone."""
    (out,), of_layers = linears(x, weights, (), name)

    def backward(grad: Array, gradients: Arrays) -> Array | None:
        return of_layers((grad,), gradients)

    return out, backward


def mlp(x: Array, weights: Arrays, names: Sequence[str]) -> tuple[Array, Callable[..., Any]]:
    """Linear layers one after the other, ReLU between them. x has no gradient unless it is asked for."""
    passes = []
    for name in names:
        x, backward_of = linear(x, weights, name)
        if name != names[-1]:
            np.maximum(x, 0.0, out=x)
        passes.append((x, backward_of))

    def backward(grad: Array, gradients: Arrays, need_x: bool) -> Array | None:
        for place in reversed(range(len(passes))):
            result, backward_of = passes[place]
            if place < len(passes) - 1:
                grad = grad * (result > 0.0)
            grad = backward_of(grad, gradients, need_x or place > 0)
        return grad

    return x, backward


_PARTS = ("query_norm", "forward_norm", "query", "out", "widen", "narrow")


def attention(
    hidden: Array, key: Array, value: Array, bias: Array, heads: int, weights: Arrays, names: Mapping[str, str]
) -> tuple[Array, Callable[..., tuple[Array, Array, Array]]]:
    """An attention layer with its feed-forward, as `llmdpd.ops.layers.attention_layer`.

    names: of its query_norm, forward_norm, query, out, widen and narrow. The pass backward returns the gradients of
    hidden, key and value.
    """
    module, inputs = native.module(), (hidden, key, value, bias)
    flat = [part for one in _PARTS for part in _pair(weights, names[one])]
    out = np.empty_like(hidden)
    (groups, count, width), steps, wide = hidden.shape, key.shape[1], len(flat[9])
    tape = module.pooled_buffer(module.attention_tape(groups, count, steps, width, wide, heads))
    module.attention_forward(*inputs, heads, flat, out, tape, native.threads())

    def backward(grad: Array, gradients: Arrays) -> tuple[Array, Array, Array]:
        own = np.empty_like(hidden), np.empty_like(key), np.empty_like(value)
        written = [*own, *(part for one in _PARTS for part in _pair(gradients, names[one]))]
        module.attention_backward(*inputs, heads, flat, grad, tape, written, native.threads())
        return own

    return out, backward


def retrieve(
    query: Array,
    key: Array,
    bias: Array,
    here: Array,
    compared: tuple[Array, Array] | None,
    waypoints: Array,
    sizes: tuple[int, int, int],
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array | None]]]:
    """The retrieval of waypoints, as `llmdpd.ops.layers.retrieve`; sizes: heads, A and G.

    The pass backward returns the gradients of query, key and the weights of squared differences.
    """
    module = native.module()
    there, similarity = (None, None) if compared is None else compared
    inputs = (query, key, bias, here, there, similarity, waypoints)
    heads, action_dim, _ = sizes
    groups, count = query.shape[:2]
    out = np.empty((groups, count, heads * (2 * waypoints.shape[-1] - action_dim)), np.float32)
    tape = module.pooled_buffer(module.retrieval_tape(groups * count, key.shape[1], heads))
    module.retrieval_forward(*inputs, *sizes, out, tape, native.threads())

    def backward(grad: Array) -> tuple[Array, Array, Array | None]:
        d_query, d_key = np.empty_like(query), np.empty_like(key)
        d_similarity = None if similarity is None else np.empty_like(similarity)
        module.retrieval_backward(*inputs, *sizes, out, grad, tape, d_query, d_key, d_similarity, native.threads())
        return d_query, d_key, d_similarity

    return out, backward
