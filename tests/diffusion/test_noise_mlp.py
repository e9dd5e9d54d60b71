"""The noise network: its split first layer is the plain concatenation; weights of the public Diffusion-QL code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class PublicMLP(nn.Module):
    """Laid out as the network of the public Diffusion-QL code."""

    def __init__(self, state_dim: int, action_dim: int, t_dim: int = 16, hidden: int = 256) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(
            nn.Identity(), nn.Linear(t_dim, 2 * t_dim), nn.Mish(), nn.Linear(2 * t_dim, t_dim)
        )
        widths = [state_dim + action_dim + t_dim, hidden, hidden, hidden]
        mid: list[nn.Module] = []
        for i in range(3):
            mid += [nn.Linear(widths[i], widths[i + 1]), nn.Mish()]
        self.mid_layer = nn.Sequential(*mid)
        self.final_layer = nn.Linear(hidden, action_dim)
        self.t_dim = t_dim

    def forward(self, x: Tensor, time: Tensor, state: Tensor) -> Tensor:
        t = self.time_mlp(sinusoidal(time, self.t_dim).to(x.dtype))
        return self.final_layer(self.mid_layer(torch.cat([x, t, state], dim=1)))


@pytest.mark.parametrize("prefix", ["", "model.", "actor.model."])
def test_weights_of_the_public_code(rng: np.random.Generator, prefix: str) -> None:
    theirs = PublicMLP(9 + 4, 3, t_dim=8, hidden=21)
    weights = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    weights |= {"betas": torch.rand(5)}  # the public Diffusion module keeps its schedule beside
    net = NoiseMLP.from_diffusion_ql(weights, state_dim=9, action_dim=3, prompt_dim=4)
    assert (net.hidden_dim, net.time_dim) == (21, 8)
    x, s, z = torch.randn(5, 3), torch.randn(5, 9), torch.randn(5, 4)
    t = torch.from_numpy(rng.integers(0, 5, 5))
    torch.testing.assert_close(net(x, t, s, z), theirs(x, t, torch.cat([s, z], 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lost", ["time_mlp.3.bias", "mid_layer.2.weight", "final_layer.weight"])
def test_missing_tensor_is_named(rng: np.random.Generator, lost: str) -> None:
    weights = PublicMLP(5, 2).state_dict()
    del weights[lost]
    with pytest.raises(InputError, match="no such tensor") as error:
        NoiseMLP.from_diffusion_ql(weights, 5, 2, 0)
    assert error.value.field == lost


@pytest.mark.parametrize(
    ("sizes", "field"), [((5, 2, 1), "layers.0.weight"), ((6, 2, 0), "layers.0.weight"), ((4, 3, 0), "layers.3.weight")]
)
def test_wrong_sizes(rng: np.random.Generator, sizes: tuple[int, int, int], field: str) -> None:
    with pytest.raises(InputError, match="another size") as error:
        NoiseMLP.from_diffusion_ql(PublicMLP(5, 2).state_dict(), *sizes)
    assert error.value.field == field


@pytest.mark.parametrize("dim", [0, 1, 7])
def test_time_embedding_is_pairs(dim: int) -> None:
    with pytest.raises(InputError, match="time_dim"):
        NoiseMLP(3, 2, 1, 8, dim)
