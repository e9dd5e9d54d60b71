"""GPT-2 over embedded tokens: what Decision Transformers model episodes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Fraction, Layers, NonNegative, SharedByHeads, Steps, Width
from llmdpd.utils.extras import extra


@dataclass(frozen=True)
class GPT2Sizes(SharedByHeads):
    """What GPT-2's layers are built with; defaults are those of the smallest GPT-2."""

    layers: Layers = 12
    """Transformer layers."""
    heads: Width = 12
    """Attention heads."""
    width: Width = 768
    """Token width."""
    inner: Annotated[int, Bounds(1, 65_536)] = 3072
    """Width of the feed-forward layers."""
    activation: str = "gelu_new"
    """Activation of the feed-forward layers, by its name in transformers."""
    epsilon: NonNegative = 1e-5
    """Added to the variance by the layer norms."""


@dataclass(frozen=True)
class SequenceConfig(SharedByHeads):
    """The sequence model of Decision Transformers. Sizes are Decision Transformer's for Gym."""

    context: Steps = 20
    """K, steps that are seen: the present one and those before it."""
    layers: Layers = 3
    """Transformer layers."""
    heads: Width = 1
    """Attention heads."""
    width: Width = 128
    """Token width; the feed-forward layers are four times as wide."""
    dropout: Fraction = 0.1
    """Dropout inside the transformer, probability."""
    longest: Annotated[int, Bounds(1, 1_000_000)] = 1000
    """Time steps that have an embedding of their own; later ones share the last."""

    @property
    def sizes(self) -> GPT2Sizes:
        """Of the layers, where no language model says them."""
        return GPT2Sizes(self.layers, self.heads, self.width, 4 * self.width, activation="relu")


class _NoPositions(nn.Module):
    """In place of GPT-2's embedding of positions: time steps are embedded, not places in the sequence."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


class CausalTransformer(nn.Module):
    """GPT-2's layers, from random weights: tokens [B, N, W] → [B, N, W], each from itself and those before it.

    The model is `transformers.GPT2Model`; its embeddings of words and of positions are left out.

    Args:
        sizes: of the layers.
        dropout: probability, inside the layers and of the tokens that come in.

    Raises:
        InputError: an activation that transformers does not have.
    """

    def __init__(self, sizes: GPT2Sizes, dropout: float) -> None:
        super().__init__()
        # Imported here: it takes seconds, and most methods have no use for it.
        with extra("llm"):
            from transformers import GPT2Config, GPT2Model

        check_activation(sizes.activation)
        config = GPT2Config(
            vocab_size=1,
            n_positions=1,
            n_embd=sizes.width,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            n_inner=sizes.inner,
            activation_function=sizes.activation,
            layer_norm_epsilon=sizes.epsilon,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
        self.gpt2 = GPT2Model(config)
        self.gpt2.set_submodule("wte", nn.Identity())
        self.gpt2.set_submodule("wpe", _NoPositions())

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens, and which of them are there [B, N], True where one is; None: all."""
        with sharding.dropout():
            found = self.gpt2(inputs_embeds=tokens, attention_mask=causal_bias(tokens, mask))
        hidden: Tensor = found.last_hidden_state
        return hidden


def check_activation(name: str) -> None:
    """Raise `InputError` for an activation that transformers does not have."""
    with extra("llm"):
        from transformers.activations import ACT2FN

    if name not in ACT2FN:
        expected = "a name that transformers has, such as gelu_new or relu"
        raise InputError("no such activation", field="activation", found=name, expected=expected)


def causal_bias(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the attention's scores, [B, 1, N, N]: each token sees itself and those before it.

    Tokens are [B, N, W]; mask [B, N] is True where a token is there, None: all are. It is a whole mask because from a
    short one transformers makes its own by looking at it on the host.
    """
    count = tokens.shape[1]
    seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()[None, None]
    if mask is not None:
        # Each token sees itself, so that none sees nothing.
        seen = seen & mask[:, None, None] | torch.eye(count, dtype=torch.bool, device=tokens.device)
    bias = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill(~seen, torch.finfo(tokens.dtype).min)
    return bias.expand(len(tokens), -1, -1, -1)
