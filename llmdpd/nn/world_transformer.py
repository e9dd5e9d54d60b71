"""A model of an environment that reads what came before: a causal transformer over the steps of an episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from llmdpd.nn.layers import transformer
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Fraction, Layers, SharedByHeads, Width


@dataclass(frozen=True)
class WorldTransformerConfig(SharedByHeads):
    """The sizes of a World Transformer."""

    horizon: Annotated[int, Bounds(2, 1000)] = 10
    """Steps that are read, and simulated."""
    layers: Layers = 2
    """Transformer layers."""
    heads: Width = 2
    """Attention heads."""
    width: Width = 64
    """Token width; the feed-forward layers are four times as wide."""
    dropout: Fraction = 0.1
    """Dropout inside the transformer, probability."""


class WorldTransformer(nn.Module):
    """Known states and actions of an episode's steps [B, T, F], [B, T, A] → what follows each [B, T, outputs].

    A token is a step, which sees itself and the steps before it.
    """

    def __init__(self, inputs: int, action_dim: int, outputs: int, config: WorldTransformerConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs + action_dim, config.width)
        self.place = nn.Parameter(0.02 * torch.randn(config.horizon, config.width))
        self.net = transformer(config.layers, config.width, config.heads, 4 * config.width, config.dropout)
        self.head = nn.Linear(config.width, outputs)

    def forward(self, known: Tensor, actions: Tensor) -> Tensor:
        steps = known.shape[1]
        tokens = self.embed(torch.cat([known, actions], -1)) + self.place[:steps]
        later = torch.ones(steps, steps, dtype=torch.bool, device=tokens.device).triu(1)
        with sharding.dropout():
            found: Tensor = self.head(self.net(tokens, later))
        return found


class WorldTransformers(nn.Module):
    """Two of them, for the change of state [B, T, S] and for the reward [B, T]."""

    def __init__(self, inputs: int, state_dim: int, action_dim: int, config: WorldTransformerConfig) -> None:
        super().__init__()
        self.states = WorldTransformer(inputs, action_dim, state_dim, config)
        self.rewards = WorldTransformer(inputs, action_dim, 1, config)

    def forward(self, known: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Known states and actions as `WorldTransformer` has them → changes of state, and rewards."""
        return self.states(known, actions), self.rewards(known, actions).squeeze(-1)
