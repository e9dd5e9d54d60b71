"""Weights as the C++ code takes them: copies, packed as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.ops import native
from llmdpd.ops.arguments import NoiseNetwork, SamplerCoefficients

Table = tuple[NDArray[np.int32], NDArray[np.float32]]


def pack_net(net: NoiseNetwork, bf16: bool) -> Any:
    """The noise network packed, in which precision the hidden layers are computed."""
    first, *rest = net.linears
    weight, bias = native.array(first.weight, "layers[0].weight"), native.array(first.bias, "layers[0].bias")
    trunk = _trunk(rest)
    return native.module().PackedNet(net.action_dim, net.time_dim, weight, bias, trunk, net.state_dim, bf16)


def bind_sampler(packed: Any, time_mlp: nn.Module, coefficients: SamplerCoefficients) -> Any:
    """A sampler's coefficients bound to packed weights, with the time rows computed."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        embedding = time_mlp(torch.tensor(coefficients.timesteps, device="cpu"))
    time = native.array(embedding, "time embedding")
    return native.module().Sampler(packed, coefficients.table(), time, coefficients.start, coefficients.bound)


def pack_critic(network: nn.Module, state_dim: int, action_dim: int, bf16: bool) -> Any:
    """A critic packed: four linear layers with Mish on [s, a], or [s, a, z]."""
    first, *rest = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    weight, bias = native.array(first.weight), native.array(first.bias)
    return native.module().PackedCritic(state_dim, action_dim, weight, bias, _trunk(rest), bf16)


@dataclass(frozen=True)
class ContextParts:
    """A context's weights and P encoded prompts, in the form that everything outside torch computes by.

    Args:
        state_dim: S of the observations. action_dim: A of the demonstrations' actions.
        points, own, geometry: see `llmdpd.nn.feature_table`.
        pooled: prompt vectors [P, Z].
        memory: what is looked up of the prompts, by `RetrievalContext.remember`'s names, without the dimensions that
            it is broadcast along, and `query_init` [P, W], the text's part of the query.
        heads: of the attention. lookaheads: later steps whose geometry is looked up too.
        periods: of the timestep embedding's sines, in time steps; none where there is no embedding.
        time_unit: time steps in the unit that moments are compared in.
        weights: of what looks into the demonstration, by the names of `RetrievalContext`'s state; those of parts that
            are switched off are absent, and where all are, features and embedding alone are computed.
    """

    state_dim: int
    action_dim: int
    points: Sequence[Sequence[int]]
    own: Table
    geometry: Table
    pooled: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    heads: int = 0
    lookaheads: int = 0
    periods: Sequence[float] = ()
    time_unit: float = 1.0
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def pack_features(state_dim: int, points: Sequence[Sequence[int]], own: Table, geometry: Table) -> Any:
    """Features alone packed, of observations of S numbers; see `llmdpd.nn.feature_table`."""
    plain = [list(map(int, point)) for point in points]
    return native.module().Context(state_dim, 1, 0, 0, plain, own, geometry, [], 1.0, {})


def pack_prompts(parts: ContextParts) -> Any:
    """A context and its P prompts packed."""
    weights, memory = (
        {name: native.array(tensor, name) for name, tensor in tensors.items()}
        for tensors in (parts.weights, parts.memory)
    )
    points = [list(map(int, point)) for point in parts.points]
    sizes = (parts.state_dim, parts.action_dim, parts.lookaheads, parts.heads)
    time = (list(parts.periods), parts.time_unit)
    context = native.module().Context(*sizes, points, parts.own, parts.geometry, *time, weights)
    return native.module().Prompts(context, native.array(parts.pooled, "pooled"), memory)


def _trunk(layers: Sequence[nn.Linear]) -> list[NDArray[np.float32]]:
    return [
        native.array(tensor, f"layers[{i}].{part}")
        for i, layer in enumerate(layers, start=1)
        for part, tensor in (("weight", layer.weight), ("bias", layer.bias))
    ]
