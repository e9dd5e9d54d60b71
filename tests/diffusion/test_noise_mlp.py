"""The noise network: its split first layer is the plain concatenation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.diffusion import NoiseMLP
from llmdpd.errors import InputError


def sinusoidal(timesteps: Tensor, dim: int) -> Tensor:
    """sin and cos of t / 10000^(i / (dim/2 - 1)), one number at a time."""
    half = dim // 2
    rows = []
    for t in timesteps.tolist():
        angles = [t / 10000 ** (i / max(half - 1, 1)) for i in range(half)]
        rows.append([math.sin(x) for x in angles] + [math.cos(x) for x in angles])
    return torch.tensor(rows, dtype=torch.float64)


def concatenated(net: NoiseMLP, actions: Tensor, timesteps: Tensor, state: Tensor, prompt: Tensor) -> Tensor:
    """The network as it is drawn: [a, t, s, z] through four linear layers."""
    time = sinusoidal(timesteps, net.time_dim)
    time = net.time_mlp[3](F.mish(net.time_mlp[1](time)))
    x = torch.cat([actions, time, state, prompt.expand(len(actions), -1)], dim=-1)
    for layer in list(net.layers)[:-1]:
        x = layer(x)
        x = x * torch.tanh(torch.nn.functional.softplus(x))
    return net.layers[-1](x)


@pytest.mark.parametrize(("S", "A", "Z", "H", "T"), [(11, 3, 5, 17, 6), (1, 1, 1, 1, 2), (4, 7, 0, 9, 16)])
@pytest.mark.parametrize("shared", [True, False])
def test_forward_is_the_concatenated_form(
    rng: np.random.Generator, make_net: Any, S: int, A: int, Z: int, H: int, T: int, shared: bool
) -> None:
    net = make_net(S, A, Z, H, T, torch.float64)
    actions, state = torch.randn(6, A, dtype=torch.float64), torch.randn(6, S, dtype=torch.float64)
    prompt = torch.randn(Z, dtype=torch.float64) if shared else torch.randn(6, Z, dtype=torch.float64)
    timesteps = torch.from_numpy(rng.integers(0, 50, 6))
    expected = concatenated(net, actions, timesteps, state, prompt)
    # 2e-6: the buffer of frequencies is made in float32.
    torch.testing.assert_close(net(actions, timesteps, state, prompt), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dim", [0, 1, 7])
def test_time_embedding_is_pairs(dim: int) -> None:
    with pytest.raises(InputError, match="time_dim"):
        NoiseMLP(3, 2, 1, 8, dim)
