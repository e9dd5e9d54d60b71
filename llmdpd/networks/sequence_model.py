"""GPT-2 over embedded tokens: what Decision Transformers model episodes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SequenceConfig:
    """The sequence model of Decision Transformers. Sizes are Decision Transformer's for Gym."""

    context: int = 20
    """K, steps that are seen: the present one and those before it."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 1
    """Attention heads."""
    width: int = 128
    """Token width; the feed-forward layers are four times as wide."""
    dropout: float = 0.1
    """Dropout inside the transformer, probability."""
    longest: int = 1000
    """Time steps that have an embedding of their own; later ones share the last."""


class _NoPositions(nn.Module):
    """In place of GPT-2's embedding of positions: time steps are embedded, not places in the sequence."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


class CausalTransformer(nn.Module):
    """GPT-2's layers, from random weights: tokens [B, N, W] → [B, N, W], each from itself and those before it.

    The model is `transformers.GPT2Model`; its embeddings of words and of positions are left out.
    """

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        # Imported here: it takes seconds, and most methods have no use for it.
        from transformers import GPT2Config, GPT2Model

        sizes = GPT2Config(
            vocab_size=1,
            n_positions=1,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="relu",
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
        )
        self.gpt2 = GPT2Model(sizes)
        self.gpt2.set_submodule("wte", nn.Identity())
        self.gpt2.set_submodule("wpe", _NoPositions())

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens, and which of them are there [B, N], True where one is; None: all."""
        count = tokens.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()[None, None]
        if mask is not None:
            # Each token sees itself, so that none sees nothing.
            seen = seen & mask[:, None, None] | torch.eye(count, dtype=torch.bool, device=tokens.device)
        # As a whole mask: from a short one transformers makes its own by looking at it on the host.
        bias = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill(~seen, torch.finfo(tokens.dtype).min)
        bias = bias.expand(len(tokens), -1, -1, -1)
        hidden: Tensor = self.gpt2(inputs_embeds=tokens, attention_mask=bias).last_hidden_state
        return hidden
