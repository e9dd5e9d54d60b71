"""The retrieval context on a CUDA device: reading states under prompts, one node of autograd's graph.

`llmdpd.nn.context.retrieval` defines it in PyTorch, which the tests hold this to; `llmdpd.ops.reading` is the same on
the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops import triton
from llmdpd.ops.reading import ContextShape
from llmdpd.utils.device import bfloat16_products

MOST_WIDTH, MOST_STEPS, MOST_NUMBERS = 128, 64, 64
"""Of the attention layers, of a demonstration with the step that says nothing, and of what is compared and found: what
the kernels hold in registers. Of float32 in layers of 256 they spill."""
MOST_STATES = 1 << 14
"""For each, what is kept for the pass backward takes 14 KB in the default preset, also where there is none."""


class Given(NamedTuple):
    """What is known of B states in P equal groups, and of the P prompts that they are under: see `reading.Seen`."""

    own: Tensor
    here: Tensor
    bias: Tensor
    waypoint_bias: Tensor | None
    there: Tensor | None
    waypoints: Tensor | None
    pooled: Tensor
    """The prompts' vectors [P, Z], of which alone there is a gradient."""


class Sizes(NamedTuple):
    """Everything that a reading's kernels are made for, and where its weights lie, side by side as they are given."""

    prompts: int
    rows: int
    """States of a group."""
    steps: int
    """Of a demonstration, with the one that says nothing."""
    own: int
    text: int
    """Numbers of a prompt's vector that queries read."""
    vector: int
    width: int
    inner: int
    """Of the feed-forward layers."""
    layers: int
    heads: int
    action_dim: int
    geometry: int
    found: int
    """Raw numbers of a step, A + L G."""
    compared: int
    waypoints: bool
    similarity: bool

    @classmethod
    def of(cls, shape: ContextShape, given: Given, weights: Sequence[Tensor]) -> Sizes:
        """By the context's shape, and weights in the order of `ContextShape.state_weights`."""
        (prompts, steps), (width, inputs) = given.bias.shape, weights[0].shape
        own = given.own.shape[1]
        return cls(
            prompts=prompts, rows=len(given.own) // prompts, steps=steps, own=own, text=inputs - own,
            vector=given.pooled.shape[1], width=width, inner=len(weights[10]) if shape.layers else width,
            layers=shape.layers, heads=shape.heads, action_dim=shape.action_dim, geometry=shape.geometry,
            found=0 if given.waypoints is None else given.waypoints.shape[-1], compared=given.here.shape[1],
            waypoints=shape.waypoints, similarity=shape.similarity,
        )  # fmt: skip

    @property
    def condition(self) -> int:
        """F."""
        found = self.heads * (2 * self.found - self.action_dim) if self.waypoints else 0
        return self.own + (self.width if self.layers else 0) + found

    @property
    def layers_at(self) -> int:
        """Where the first layer's weights begin: after those of the query."""
        return self.width * (self.own + self.text) + self.width

    @property
    def layer(self) -> int:
        """A layer's numbers: two norms, query, output, and the feed-forward's two."""
        W, N = self.width, self.inner
        return 4 * W + 2 * (W * W + W) + (N * W + N) + (W * N + W)

    @property
    def norm_at(self) -> int:
        """Where the last norm's begin."""
        return self.layers_at + self.layers * self.layer

    @property
    def waypoint_at(self) -> int:
        """Where those of the waypoints' query begin."""
        return self.norm_at + (2 * self.width if self.layers else 0)

    @property
    def likeness_at(self) -> int:
        """Where those of the similarity begin."""
        return self.waypoint_at + (self.width * self.width + self.width if self.waypoints else 0)

    @property
    def weights(self) -> int:
        """All numbers of them."""
        return self.likeness_at + self._of_similarity

    @property
    def sums(self) -> int:
        """Gradients that are sums over a tile's rows: of norms and similarity."""
        return self.layers * 4 * self.width + (2 * self.width if self.layers else 0) + self._of_similarity

    @property
    def _of_similarity(self) -> int:
        return self.heads * self.compared if self.similarity else 0


def may_read(own: Tensor) -> bool:
    """Whether such states are on a device that has the kernels: what is asked first, and costs nothing."""
    return own.is_cuda


def reads_states(shape: ContextShape, given: Given, tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels read such states: float32 on a CUDA device, within their sizes, under no mode or compiler."""
    raw = [part for part in given[:-1] if part is not None]
    parts = [*raw, given.pooled, *tensors]
    return (
        all(may_read(t) and t.dtype is torch.float32 and t.device == given.own.device for t in parts)
        and not any(part.requires_grad for part in raw)
        and _takes(shape, given, tensors)
        and triton.unavailable() is None
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch.is_autocast_enabled("cuda")
    )


def _takes(shape: ContextShape, given: Given, tensors: Sequence[Tensor]) -> bool:
    """Whether the sizes are some that the kernels are made for, and the groups equal."""
    if not len(given.bias) or not len(given.own) or len(given.own) % len(given.bias):
        return False
    sizes = Sizes.of(shape, given, tensors[_memories(shape) :])
    return (
        len(given.own) <= MOST_STATES
        and sizes.width <= MOST_WIDTH
        and sizes.steps <= MOST_STEPS
        and max(sizes.found, sizes.compared) <= MOST_NUMBERS
        and not (sizes.similarity and given.there is None)
    )


def _memories(shape: ContextShape) -> int:
    return 2 * shape.layers + shape.waypoints


def read_states(shape: ContextShape, given: Given, memories: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The condition's state part [B, F] of B states in groups under prompts that were read.

    Differentiable once in the prompts' vectors, memories and weights. Where torch's own products may be
    of bfloat16 (`matmul_precision`), those of the attention layers are of tf32; waypoints are looked up in float32.

    memories: [P, T, W] keys and values of each attention layer, and the waypoints' keys. weights: in the order of
    `ContextShape.state_weights`.

    Raises:
        ValueError: weights of other sizes than they should be.
    """
    short = bfloat16_products()
    sizes, tensors = Sizes.of(shape, given, weights), (*memories, *weights)
    found = sum(weight.numel() for weight in weights)
    if found != sizes.weights:
        raise ValueError(f"{found} numbers of weights, and {sizes.weights} are read")
    raw = Given._make(None if part is None else part.contiguous() for part in given)
    out: Tensor = _States.apply(sizes, short, raw.pooled, raw, *tensors)
    return out


class _States(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sizes, short: bool, pooled: Tensor, given: Given, *tensors: Tensor) -> Tensor:
        from llmdpd.kernels import state_reading as kernel

        with triton.on_device(pooled.device):
            out, flat, kept = kernel.forward(given, sizes, tensors, short)
        ctx.sizes, ctx.short, ctx.shapes = sizes, short, [tensor.shape for tensor in tensors]
        ctx.save_for_backward(out, flat, pooled, *given[:-1], *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from llmdpd.kernels import state_reading as kernel

        out, flat, pooled, *rest = ctx.saved_tensors
        raw = len(Given._fields) - 1
        given, kept = Given._make([*rest[:raw], pooled]), kernel.Kept._make(rest[raw:])
        with triton.on_device(pooled.device):
            d_flat, d_pooled = kernel.backward(grad, out, given, ctx.sizes, flat, kept, ctx.short)
        parts = d_flat.split([shape.numel() for shape in ctx.shapes])
        gradients = (part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
        return None, None, d_pooled, None, *gradients
