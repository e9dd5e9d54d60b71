"""Stacks of layers that several networks are built from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with the activation between them."""
    widths = (inputs, *hidden)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def transformer(layers: int, width: int, heads: int, inner: int, dropout: float) -> nn.TransformerEncoder:
    """A transformer with normalisation before each layer's parts, GELU, and a last layer norm; batch first."""
    layer = nn.TransformerEncoderLayer(width, heads, inner, dropout, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class EnsembleLinear(nn.Module):
    """N linear layers side by side, from weights as `nn.Linear` begins with: [N or 1, B, inputs] → [N, B, outputs]."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs.expand(len(self.weight), -1, -1), self.weight)
