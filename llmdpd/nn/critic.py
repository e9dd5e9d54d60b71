"""Double Q: two networks of three hidden layers with Mish, as in Diffusion-QL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmdpd.diffusion.schedules import Precision
from llmdpd.ops.mish_mlp import mish_mlp


class DoubleQ(nn.Module):
    """Q_1 and Q_2 (s, a) or (s, a, z): the critics of the paper's equation 6.

    Args:
        state_dim: size of the state features.
        action_dim: A.
        prompt_dim: size of the prompt vector; 0 for the paper's critics, which do not see the prompts.
        hidden_dim: width of the three hidden layers.

    Shapes are given at `forward`; leading ones [...] are free, as [B] or [B, N] for N actions a state.
    """

    def __init__(self, state_dim: int, action_dim: int, prompt_dim: int = 0, hidden_dim: int = 256) -> None:
        super().__init__()
        self.prompt_dim, self.hidden_dim = prompt_dim, hidden_dim
        inputs = state_dim + action_dim + prompt_dim
        self.q1, self.q2 = _q_network(inputs, hidden_dim), _q_network(inputs, hidden_dim)

    @property
    def sizes(self) -> dict[str, int | bool]:
        """What `DiffusionPolicy.make_critic` builds these critics with."""
        return {"hidden": self.hidden_dim, "sees_prompts": bool(self.prompt_dim)}

    def forward(
        self, state: Tensor, action: Tensor, prompt: Tensor, precision: Precision = "fp32"
    ) -> tuple[Tensor, Tensor]:
        """State features [..., F], actions [..., A], prompt vectors [..., Z] → two times [...]."""
        parts = [state, action, prompt] if self.prompt_dim else [state, action]
        joined = torch.cat(parts, dim=-1)
        return _value(self.q1, joined, precision), _value(self.q2, joined, precision)

    def minimum(self, state: Tensor, action: Tensor, prompt: Tensor, precision: Precision = "fp32") -> Tensor:
        """min(Q_1, Q_2): state features [..., F], actions [..., A], prompt vectors [..., Z] → [...]."""
        return torch.minimum(*self(state, action, prompt, precision))


def _value(network: nn.Sequential, joined: Tensor, precision: Precision) -> Tensor:
    first, *rest = (layer for layer in network if isinstance(layer, nn.Linear))
    return mish_mlp(joined, first.weight, first.bias, rest, precision).squeeze(-1)


def _q_network(inputs: int, hidden_dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, hidden_dim, hidden_dim):
        layers += [nn.Linear(width, hidden_dim), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(hidden_dim, 1))
