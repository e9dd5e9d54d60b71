"""The trajectory encoder: a transformer that reads the steps of a demonstration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.nn.layers import mlp, transformer
from llmdpd.ops import layers
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, TrajectoryTokens
from llmdpd.utils import sharding

_POSITION_FREQUENCIES = 6


class TrajectoryEncoder(nn.Module):
    """Tokens (s_t, a_t) → transformer → mean over the real steps → MLP head (paper, equation 3).

    Args:
        feature_dim: size of the state features of a step.
        action_dim: A.
        output_dim: size of z_traj.
        config: the transformer's sizes.
    """

    frequencies: Tensor

    def __init__(self, feature_dim: int, action_dim: int, output_dim: int, config: TrajectoryEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(feature_dim + action_dim, config.width)
        self.position = nn.Linear(2 * _POSITION_FREQUENCIES, config.width, bias=False)
        self.transformer = transformer(config.layers, config.width, config.heads, config.inner, config.dropout)
        self.head = mlp(config.width, (config.width,), output_dim)
        frequencies = torch.pi * 2.0 ** torch.arange(_POSITION_FREQUENCIES)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def encode_steps(self, features: Tensor, tokens: TrajectoryTokens) -> Tensor:
        """Encoded steps [P, T, width] from state features [P, T, F]; padded steps hold meaningless values.

        Raises:
            InputError: more steps than the encoder's limit.
        """
        if features.shape[1] > self.config.steps:
            found = f"{features.shape[1]} steps"
            raise InputError(
                "the trajectory prompt is longer than the encoder's limit",
                field="trajectory",
                found=found,
                expected=f"at most {self.config.steps}",
            )
        angle = tokens.phase[..., None] * self.frequencies
        position = torch.cat([angle.sin(), angle.cos()], dim=-1)
        embedded = self.embed(torch.cat([features, tokens.actions], dim=-1)) + self.position(position)
        if layers.computes_groups(embedded) and not (self.training and self.config.dropout > 0):
            return self._encode_natively(embedded, tokens.mask)
        # A mask is passed only where something is padded: the unmasked attention is the faster one.
        padding = ~tokens.mask if tokens.padded else None
        with sharding.dropout():
            return self.transformer(embedded, src_key_padding_mask=padding)

    def _encode_natively(self, steps: Tensor, mask: Tensor) -> Tensor:
        """`self.transformer` by the layers in C++; each attends to all its own steps where the mask [P, T] holds."""
        bias = steps.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        for layer in self.transformer.layers:
            attention = layer.self_attn
            query, *memory = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
            key, value = layers.linears(steps, layer.norm1, memory)
            parts = (query, *((part.weight, part.bias) for part in (attention.out_proj, layer.linear1, layer.linear2)))
            weights = layers.LayerWeights(layer.norm1, layer.norm2, *parts)
            steps = layers.attention_layer(steps, key, value, bias, attention.num_heads, weights)
        assert self.transformer.norm is not None
        encoded: Tensor = self.transformer.norm(steps)
        return encoded

    def pool(self, steps: Tensor, mask: Tensor) -> Tensor:
        """z_traj [P, Z]: mean of the encoded steps [P, T, width] where the mask [P, T] holds, then the head."""
        weight = mask.to(steps.dtype)[..., None]
        return self.head((steps * weight).sum(1) / weight.sum(1))
