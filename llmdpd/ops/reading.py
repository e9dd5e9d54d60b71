"""The retrieval context in training: reading prompts, and states under them, each one node of autograd's graph.

`llmdpd.nn.context.retrieval` defines both in PyTorch, which the tests hold these to. As hundreds of small operations
they took a training iteration more time on one core than all of its matrix products. Results and gradients have the
same bits on any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from llmdpd.ops import native
from llmdpd.ops.nodes import Array, Computation, Weights, node

_ATTENTION = ("query_norm", "forward_norm", "query", "out", "widen", "narrow")


class ContextShape(NamedTuple):
    """Which parts there are, and the sizes that weights do not tell."""

    text: bool
    encoder_layers: int
    encoder_heads: int
    layers: int
    heads: int
    waypoints: bool
    similarity: bool
    action_dim: int
    geometry: int
    """Numbers that places are compared by, without the time."""

    def prompt_weights(self) -> tuple[str, ...]:
        """Names of the weights that prompts are read by, in the order in which the C++ code takes them."""
        encoder = "trajectory_encoder."
        names = _pairs(f"text_head.{number}" for number in (0, 2, 4)) if self.text else []
        names += [*_pairs([f"{encoder}embed"]), f"{encoder}position.weight"]
        for number in range(self.encoder_layers):
            layer = f"{encoder}transformer.layers.{number}."
            names += [*_pairs([f"{layer}norm1"]), f"{layer}self_attn.in_proj_weight", f"{layer}self_attn.in_proj_bias"]
            names += _pairs(f"{layer}{part}" for part in ("self_attn.out_proj", "norm2", "linear1", "linear2"))
        names += _pairs(f"{encoder}{part}" for part in ("transformer.norm", "head.0", "head.2"))
        names += [*_pairs(["step"]), "nothing"]
        for number in range(self.layers):
            names += _pairs(f"layers.{number}.{part}" for part in ("memory_norm", "key", "value"))
        return (*names, *(_pairs(["waypoint_key"]) if self.waypoints else []))

    def state_weights(self) -> tuple[str, ...]:
        """Names of the weights that states are read by, in the order in which the C++ code takes them."""
        modules = ["query", *(f"layers.{number}.{part}" for number in range(self.layers) for part in _ATTENTION)]
        modules += (["norm"] if self.layers else []) + (["waypoint_query"] if self.waypoints else [])
        return (*_pairs(modules), *(["likeness"] if self.similarity else []))


def _pairs(modules: Iterable[str]) -> list[str]:
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


class Shown(NamedTuple):
    """What is known of P prompts of T steps, without gradient; None for what is not there."""

    text: Array | None
    """LLM embeddings [P, D]."""
    keep_text: Array | None
    keep_trajectory: Array | None
    """Which are given, [P, 1] of zeros and ones."""
    steps: Array
    """What the encoder reads of the steps, [P T, I]: features, actions, waves of the phase."""
    embedded: Array | None
    """The timestep embedding of the steps, [P T, E]."""
    mask: Array
    """[P, T], 1 where a step is real."""
    bias: Array
    """[P, T]: 0 where a step is real, -inf where none is."""


class Seen(NamedTuple):
    """What is known of B states in P equal groups, and of the P prompts that they are under, without gradient."""

    own: Array
    """What the network sees of a state by itself, [B, O]."""
    here: Array
    """Places of the states, [B, C]."""
    bias: Array
    waypoint_bias: Array | None
    """[P, T + 1]: 0 where a step may be looked at, -inf where not."""
    there: Array | None
    """Places of the steps, [P, T + 1, C]."""
    waypoints: Array | None
    """Raw values of the steps, [P, T + 1, A + L G]."""


def read_prompts(shape: ContextShape, shown: Shown, weights: Weights, read: Sequence[Tensor]) -> list[Tensor]:
    """The vectors [P, Z] of P prompts; keys and values of each attention layer, and the waypoints' keys.

    These are [P, T + 1, W], heads side by side; the last step is the one that says nothing.

    weights: by the names of `RetrievalContext`'s state, in the order of `ContextShape.prompt_weights`.
    read: tensors whose memory `shown` is of.
    """
    prompts, steps = shown.mask.shape
    vector = len(weights["trajectory_encoder.head.2.bias"]) + (len(weights["text_head.4.bias"]) if shape.text else 0)
    rows = (prompts, steps + 1, len(weights["nothing"]))

    def compute(arrays: list[Array]) -> tuple[Computation, list[Array]]:
        results = [np.empty((prompts, vector), np.float32)]
        results += [np.empty(rows, np.float32) for _ in range(2 * shape.layers + shape.waypoints)]
        return native.module().prompt_node(shape, *shown, arrays, native.threads()), results

    return list(node(compute, (), weights, read))


def read_states(
    shape: ContextShape, seen: Seen, prompts: Sequence[Tensor], weights: Weights, read: Sequence[Tensor]
) -> Tensor:
    """The condition's state part [B, F] of B states in groups under prompts that were read.

    prompts: as `read_prompts` returns them. weights: in the order of `ContextShape.state_weights`.
    read: tensors whose memory `seen` is of.
    """
    dim = seen.own.shape[1] + (len(weights["norm.bias"]) if shape.layers else 0)
    if seen.waypoints is not None:
        dim += shape.heads * (2 * seen.waypoints.shape[-1] - shape.action_dim)

    def compute(arrays: list[Array]) -> tuple[Computation, list[Array]]:
        flat = [part.reshape(-1, part.shape[-1]) for part in arrays[: len(prompts)]]
        given = [*flat, *arrays[len(prompts) :]]
        computation = native.module().state_node(shape, *seen, given, native.threads())
        return computation, [np.empty((len(seen.own), dim), np.float32)]

    return node(compute, prompts, weights, read)[0]
