"""The retrieval context in training: reading prompts, and states under them, each one node of autograd's graph.

`llmdpd.nn.context.retrieval` defines both in PyTorch, which the tests hold these to. As hundreds of small operations
they took a training iteration more time on one core than all of its matrix products. Results and gradients have the
same bits on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from llmdpd.ops import passes
from llmdpd.ops.nodes import Backward, node
from llmdpd.ops.passes import Array, Arrays

_ATTENTION = ("query_norm", "forward_norm", "query", "out", "widen", "narrow")


@dataclass(frozen=True)
class ContextShape:
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

    def prompt_weights(self) -> list[str]:
        """Names of the weights that prompts are read by."""
        encoder = "trajectory_encoder."
        modules = [f"text_head.{number}" for number in (0, 2, 4)] if self.text else []
        modules += [f"{encoder}embed", f"{encoder}transformer.norm", f"{encoder}head.0", f"{encoder}head.2", "step"]
        names = [f"{encoder}position.weight", "nothing"]
        for number in range(self.encoder_layers):
            layer = f"{encoder}transformer.layers.{number}."
            names += [f"{layer}self_attn.in_proj_weight", f"{layer}self_attn.in_proj_bias"]
            modules += [f"{layer}{part}" for part in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")]
        modules += [f"layers.{n}.{part}" for n in range(self.layers) for part in ("memory_norm", "key", "value")]
        modules += ["waypoint_key"] if self.waypoints else []
        return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]

    def state_weights(self) -> list[str]:
        """Names of the weights that states are read by."""
        modules = ["query", *(f"layers.{number}.{part}" for number in range(self.layers) for part in _ATTENTION)]
        modules += (["norm"] if self.layers else []) + (["waypoint_query"] if self.waypoints else [])
        names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        return [*names, "likeness"] if self.similarity else names


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


def read_prompts(
    shape: ContextShape, shown: Shown, weights: Mapping[str, Tensor], read: Sequence[Tensor]
) -> list[Tensor]:
    """The vectors [P, Z] of P prompts; keys and values of each attention layer, and the waypoints' keys.

    These are [P, T + 1, W], heads side by side; the last step is the one that says nothing.

    weights: by the names of `RetrievalContext`'s state. read: tensors whose memory `shown` is of.
    """
    return list(node(lambda arrays: _prompts(shape, shown, arrays), weights, read))


def read_states(shape: ContextShape, seen: Seen, given: Mapping[str, Tensor], read: Sequence[Tensor]) -> Tensor:
    """The condition's state part [B, F] of B states in groups under prompts that were read.

    given: `pooled`, `key0`, `value0`, …, `waypoint_key` as `read_prompts` returns them; weights by their names.
    read: tensors whose memory `seen` is of.
    """
    condition: Tensor
    (condition,) = node(lambda arrays: _states(shape, seen, arrays), given, read)
    return condition


def _prompts(shape: ContextShape, shown: Shown, weights: Arrays) -> tuple[list[Array], Backward]:
    prompts, steps = shown.mask.shape
    vectors, text_backward = _text(shown, weights) if shape.text else ([], None)
    encoded, encode_backward = _encoded(shape, shown, weights)
    count = shown.mask.sum(1, keepdims=True)
    mean = np.einsum("pt,ptw->pw", shown.mask, encoded.reshape(prompts, steps, -1)) / count
    vector, head_backward = passes.mlp(mean, weights, ("trajectory_encoder.head.0", "trajectory_encoder.head.2"))
    vectors.append(vector if shown.keep_trajectory is None else vector * shown.keep_trajectory)
    rows, rows_backward = _memory_rows(shape, shown, encoded, weights)
    text_dim = vectors[0].shape[1] if shape.text else 0

    def backward(grads: Sequence[Array], gradients: dict[str, Array]) -> None:
        d_pooled, *d_rows = grads
        if text_backward is not None:
            text_backward(d_pooled[:, :text_dim], gradients)
        d_vector = np.ascontiguousarray(d_pooled[:, text_dim:])
        if shown.keep_trajectory is not None:
            d_vector = d_vector * shown.keep_trajectory
        d_mean = head_backward(d_vector, gradients, True)
        d_encoded = rows_backward(d_rows, gradients)
        d_encoded.reshape(prompts, steps, -1)[:] += (shown.mask / count)[:, :, None] * d_mean[:, None]
        encode_backward(d_encoded, gradients)

    return [np.concatenate(vectors, 1), *rows], backward


def _text(shown: Shown, weights: Arrays) -> tuple[list[Array], Callable[[Array, Arrays], None]]:
    """z_text [P, ·]: equation 1."""
    assert shown.text is not None
    vector, head_backward = passes.mlp(shown.text, weights, ("text_head.0", "text_head.2", "text_head.4"))
    keep = shown.keep_text

    def backward(grad: Array, gradients: Arrays) -> None:
        head_backward(np.ascontiguousarray(grad) if keep is None else grad * keep, gradients, False)

    return [vector if keep is None else vector * keep], backward


def _encoded(
    shape: ContextShape, shown: Shown, weights: Arrays
) -> tuple[Array, Callable[[Array, dict[str, Array]], None]]:
    """The encoder's steps [P T, W], and the pass backward from their gradient."""
    prefix, groups = "trajectory_encoder.", shown.mask.shape
    embed, position = weights[f"{prefix}embed.weight"], weights[f"{prefix}position.weight"]
    own = {
        **weights,
        "tokens.weight": np.concatenate([embed, position], 1),
        "tokens.bias": weights[f"{prefix}embed.bias"],
    }
    layers = [f"{prefix}transformer.layers.{number}." for number in range(shape.encoder_layers)]
    for layer in layers:
        own |= _projections(layer, weights)
    steps, embed_backward = passes.linear(shown.steps, own, "tokens")
    backwards = []
    for layer in layers:
        steps, backward_of = _encoder_layer(layer, shape.encoder_heads, steps, groups, shown.bias, own)
        backwards.append(backward_of)
    encoded, norm_backward = passes.norm(steps, own, f"{prefix}transformer.norm")

    def backward(grad: Array, gradients: dict[str, Array]) -> None:
        for layer in layers:
            gradients |= _projections(layer, gradients)
        gradients |= {
            "tokens.weight": np.empty_like(own["tokens.weight"]),
            "tokens.bias": gradients[f"{prefix}embed.bias"],
        }
        grad = norm_backward(grad, gradients)
        for backward_of in reversed(backwards):
            grad = backward_of(grad, gradients)
        embed_backward(grad, gradients, False)
        gradients[f"{prefix}embed.weight"][:] = gradients["tokens.weight"][:, : embed.shape[1]]
        gradients[f"{prefix}position.weight"][:] = gradients["tokens.weight"][:, embed.shape[1] :]

    return encoded, backward


def _projections(layer: str, arrays: Arrays) -> dict[str, Array]:
    """The parts of an encoder layer's joint projection, by names of their own."""
    parts: dict[str, Array] = {}
    for kind in ("weight", "bias"):
        joint = arrays[f"{layer}self_attn.in_proj_{kind}"]
        width = len(joint) // 3
        for place, name in enumerate(("query", "key", "value")):
            parts[f"{layer}{name}.{kind}"] = joint[place * width : (place + 1) * width]
    return parts


def _encoder_layer(
    layer: str, heads: int, steps: Array, groups: tuple[int, ...], bias: Array, weights: Arrays
) -> tuple[Array, Callable[[Array, Arrays], Array]]:
    """An encoder layer on the steps [P T, W]; each attends to its own demonstration's."""
    names = {
        "query_norm": f"{layer}norm1",
        "forward_norm": f"{layer}norm2",
        "query": f"{layer}query",
        "out": f"{layer}self_attn.out_proj",
        "widen": f"{layer}linear1",
        "narrow": f"{layer}linear2",
    }
    width = steps.shape[1]
    projected, project_backward = passes.linears(steps, weights, (f"{layer}key", f"{layer}value"), f"{layer}norm1")
    key, value = (part.reshape(*groups, width) for part in projected)
    out, attend_backward = passes.attention(steps.reshape(*groups, width), key, value, bias, heads, weights, names)

    def backward(grad: Array, gradients: Arrays) -> Array:
        shape = gradients[f"{layer}norm1.weight"].shape
        second = {f"{layer}norm1.{kind}": np.empty(shape, np.float32) for kind in ("weight", "bias")}
        d_steps, *d_memory = attend_backward(grad.reshape(out.shape), gradients)
        d_projected = project_backward([part.reshape(-1, width) for part in d_memory], {**gradients, **second})
        for name, part in second.items():  # the norm is before both
            gradients[name][:] += part
        assert d_projected is not None
        d_projected += d_steps.reshape(-1, width)
        return d_projected

    return out.reshape(-1, width), backward


def _memory_rows(
    shape: ContextShape, shown: Shown, encoded: Array, weights: Arrays
) -> tuple[list[Array], Callable[[Sequence[Array], Arrays], Array]]:
    """Keys and values, and the waypoints' keys, of encoded steps [P T, W]; see `read_prompts`."""
    prompts, count = shown.mask.shape
    streams = encoded if shown.embedded is None else np.concatenate([encoded, shown.embedded], 1)
    stepped, step_backward = passes.linear(streams, weights, "step")
    width = stepped.shape[1]
    steps = np.empty((prompts, count + 1, width), np.float32)
    steps[:, :-1], steps[:, -1] = stepped.reshape(prompts, count, width), weights["nothing"]
    flat, rows, backwards = steps.reshape(-1, width), [], []
    for number in range(shape.layers):
        layer = f"layers.{number}."
        parts, backward_of = passes.linears(flat, weights, (f"{layer}key", f"{layer}value"), f"{layer}memory_norm")
        rows += parts
        backwards.append((2, backward_of))
    if shape.waypoints:
        parts, backward_of = passes.linears(flat, weights, ("waypoint_key",))
        rows += parts
        backwards.append((1, backward_of))

    def backward(grads: Sequence[Array], gradients: Arrays) -> Array:
        left, d_steps = [grad.reshape(-1, width) for grad in grads], np.zeros_like(flat)
        for taken, backward_of in backwards:
            d_steps += backward_of(left[:taken], gradients)
            left = left[taken:]
        d_steps = d_steps.reshape(steps.shape)
        gradients["nothing"][:] = d_steps[:, -1].sum(0)
        d_streams = step_backward(np.ascontiguousarray(d_steps[:, :-1]).reshape(-1, width), gradients)
        return np.ascontiguousarray(d_streams[:, : encoded.shape[1]])

    return [row.reshape(prompts, count + 1, width) for row in rows], backward


def _states(shape: ContextShape, seen: Seen, given: Arrays) -> tuple[list[Array], Backward]:
    hidden, query_backward = _queries(shape, seen, given)
    attends: list[Callable[[Array, Arrays], tuple[Array, Array, Array]]] = []
    for number in range(shape.layers):
        names = {part: f"layers.{number}.{part}" for part in _ATTENTION}
        key, value = given[f"key{number}"], given[f"value{number}"]
        hidden, attend_backward = passes.attention(hidden, key, value, seen.bias, shape.heads, given, names)
        attends.append(attend_backward)
    parts, looks = [seen.own], []
    flat = hidden.reshape(len(seen.own), -1)
    if shape.layers:
        normed, norm_backward = passes.norm(flat, given, "norm")
        parts.append(normed)
        looks.append(norm_backward)
    if shape.waypoints:
        found, found_backward = _found(shape, seen, flat, given)
        parts.append(found)
        looks.append(found_backward)

    def backward(grads: Sequence[Array], gradients: dict[str, Array]) -> None:
        d_hidden: Array = np.zeros_like(flat)
        end = seen.own.shape[1]
        for look, part in zip(looks, parts[1:], strict=True):
            start, end = end, end + part.shape[1]
            d_hidden += look(np.ascontiguousarray(grads[0][:, start:end]), gradients)
        d_hidden = d_hidden.reshape(hidden.shape)
        for number, attend_backward in reversed(list(enumerate(attends))):
            d_hidden, d_key, d_value = attend_backward(d_hidden, gradients)
            gradients[f"key{number}"][:], gradients[f"value{number}"][:] = d_key, d_value
        query_backward(d_hidden, gradients)

    return [np.concatenate(parts, 1)], backward


def _queries(shape: ContextShape, seen: Seen, given: Arrays) -> tuple[Array, Callable[[Array, Arrays], None]]:
    """Queries [P, M, W] of the states. The text's part of them is computed once a prompt."""
    weight, bias, pooled = given["query.weight"], given["query.bias"], given["pooled"]
    prompts, streams = len(pooled), seen.own.shape[1]
    text_dim = weight.shape[1] - streams
    parts = {
        "states.weight": weight[:, :streams],
        "states.bias": np.zeros_like(bias) if shape.text else bias,
        "text.weight": weight[:, streams:],
        "text.bias": bias,
    }
    query, own_backward = passes.linear(seen.own, parts, "states")
    hidden = query.reshape(prompts, -1, len(bias))
    text_backward = None
    if shape.text:
        init, text_backward = passes.linear(np.ascontiguousarray(pooled[:, :text_dim]), parts, "text")
        hidden += init[:, None]

    def backward(grad: Array, gradients: Arrays) -> None:
        own = {name: np.empty_like(part, order="C") for name, part in parts.items()}
        gradients["pooled"].fill(0.0)
        own_backward(grad.reshape(-1, len(bias)), own, False)
        if text_backward is not None:
            gradients["pooled"][:, :text_dim] = text_backward(grad.sum(1), own)
            gradients["query.weight"][:, streams:] = own["text.weight"]
        gradients["query.weight"][:, :streams] = own["states.weight"]
        gradients["query.bias"][:] = own["text.bias" if shape.text else "states.bias"]

    return hidden, backward


def _found(
    shape: ContextShape, seen: Seen, hidden: Array, given: Arrays
) -> tuple[Array, Callable[[Array, Arrays], Array]]:
    """What the waypoint heads find, [B, ·], by queries of hidden numbers [B, W]."""
    query, query_backward = passes.linear(hidden, given, "waypoint_query")
    prompts = len(seen.bias)
    similarity: Array | None = np.exp(given["likeness"]) if shape.similarity else None
    assert seen.waypoint_bias is not None
    assert seen.waypoints is not None
    found, retrieve_backward = passes.retrieve(
        query.reshape(prompts, -1, query.shape[1]),
        given["waypoint_key"],
        seen.waypoint_bias,
        seen.here.reshape(prompts, -1, seen.here.shape[1]),
        None if similarity is None or seen.there is None else (seen.there, similarity),
        seen.waypoints,
        (shape.heads, shape.action_dim, shape.geometry),
    )

    def backward(grad: Array, gradients: Arrays) -> Array:
        d_query, gradients["waypoint_key"][:], d_similarity = retrieve_backward(grad.reshape(found.shape))
        if similarity is not None and d_similarity is not None:
            np.multiply(d_similarity, similarity, out=gradients["likeness"])
        d_hidden: Array = query_backward(d_query.reshape(query.shape), gradients)
        return d_hidden

    return found.reshape(len(seen.own), -1), backward
