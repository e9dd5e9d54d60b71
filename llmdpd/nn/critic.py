"""Critics: two Q networks each, of which targets and choices take the lesser value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.diffusion.schedules import Precision
from llmdpd.nn.context import Condition
from llmdpd.nn.layers import EnsembleLinear, mlp
from llmdpd.ops import double_q
from llmdpd.ops.mish_mlp import mish_mlps


class DoubleQ(nn.Module):
    """Q_1 and Q_2 (s, a) or (s, a, z), with Mish as in Diffusion-QL: the critics of the paper's equation 6.

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
        self.q1, self.q2 = (mlp(inputs, (hidden_dim,) * 3, 1, nn.Mish) for _ in range(2))

    @property
    def sizes(self) -> dict[str, int | bool]:
        """What `DiffusionPolicy.make_critic` builds these critics with."""
        return {"hidden": self.hidden_dim, "sees_prompts": bool(self.prompt_dim)}

    def forward(
        self, state: Tensor, action: Tensor, prompt: Tensor, precision: Precision = "fp32"
    ) -> tuple[Tensor, Tensor]:
        """State features [..., F], actions [..., A], prompt vectors [..., Z] → two times [...]."""
        joined = torch.cat(self._seen([state, action, prompt]), dim=-1)
        first, second = mish_mlps(joined, [layers_of(self.q1), layers_of(self.q2)], precision)
        return first.squeeze(-1), second.squeeze(-1)

    def minimum(self, state: Tensor, action: Tensor, prompt: Tensor, precision: Precision = "fp32") -> Tensor:
        """min(Q_1, Q_2): state features [..., F], actions [..., A], prompt vectors [..., Z] → [...]."""
        read = [state, action, prompt]
        if state.ndim == 2 and not torch.is_grad_enabled():
            weights = double_q.weights_of(self, *read)
            if weights is not None:
                return double_q.minimum(self._seen(read), weights, precision == "bf16")
        return torch.minimum(*self(*read, precision))

    def regression(
        self, state: Tensor, action: Tensor, prompt: Tensor, target: Tensor, precision: Precision = "fp32"
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of Q_1 and Q_2 to targets [B], summed, and the mean of Q_1: scalars.

        state: features [B, F], action [B, A] and prompt [B, Z], none of which has a gradient.
        """
        read = [state, action, prompt]
        weights = double_q.weights_of(self, *read, target)
        if weights is not None and double_q.learn(weights):
            return double_q.regression(self._seen(read), target, weights, precision == "bf16")
        q1, q2 = self(*read, precision)
        return F.mse_loss(q1, target) + F.mse_loss(q2, target), q1.detach().mean()

    def objective(
        self, state: Tensor, action: Tensor, prompt: Tensor, first: bool, precision: Precision = "fp32"
    ) -> tuple[Tensor, Tensor]:
        """The mean value of actions by Q_1 (`first`) or Q_2, and the mean |Q| of the other, without gradient: scalars.

        state: features [B, F] and prompt [B, Z], which have no gradient; action [B, A].
        """
        weights = double_q.weights_of(self, state, action, prompt)
        if weights is not None and double_q.learn(weights) is False:
            seen = prompt if self.prompt_dim else prompt[:, :0]
            return double_q.objective(state, action, seen, weights, precision == "bf16", first)
        values = self(state, action, prompt, precision)
        chosen, other = values if first else values[::-1]
        return chosen.mean(), other.detach().abs().mean()

    def _seen(self, read: list[Tensor]) -> list[Tensor]:
        """Of state, action and prompt what the critics see."""
        return read if self.prompt_dim else read[:2]


def layers_of(network: nn.Sequential) -> tuple[Tensor, Tensor, list[nn.Linear]]:
    """A critic's first weight and bias, and the layers after it."""
    first, *rest = (layer for layer in network if isinstance(layer, nn.Linear))
    return first.weight, first.bias, rest


class TwinQ(nn.Module):
    """Q_1 and Q_2 (s, a) or (s, a, z), each an MLP with ReLU: the critics of TD3 and SAC.

    Args:
        state_dim: size of the state features. action_dim: A. prompt_dim: size of the prompt vector, 0 for none.
        hidden: widths of the hidden layers.
    """

    def __init__(self, state_dim: int, action_dim: int, prompt_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.q1, self.q2 = (mlp(state_dim + action_dim + prompt_dim, hidden, 1) for _ in range(2))

    def forward(self, condition: Condition, action: Tensor) -> tuple[Tensor, Tensor]:
        """The condition of B states, actions [B, A] → two times [B]."""
        joined = torch.cat([condition.joined(), action], dim=-1)
        return self.q1(joined).squeeze(-1), self.q2(joined).squeeze(-1)

    def minimum(self, condition: Condition, action: Tensor) -> Tensor:
        """min(Q_1, Q_2) [B]."""
        return torch.minimum(*self(condition, action))


class EnsembleQ(nn.Module):
    """Q_1 … Q_N (s, a) or (s, a, z), each an MLP with ReLU and weights of its own, all by one product a layer.

    Args:
        members: N. state_dim, action_dim, prompt_dim, hidden: as in `TwinQ`.
    """

    def __init__(self, members: int, state_dim: int, action_dim: int, prompt_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = (state_dim + action_dim + prompt_dim, *hidden)
        layers = [EnsembleLinear(members, a, b) for a, b in itertools.pairwise(widths)]
        self.hidden, self.last = nn.ModuleList(layers), EnsembleLinear(members, widths[-1], 1)

    def features(self, condition: Condition, action: Tensor) -> Tensor:
        """The condition of B states, actions [B, A] → what the last hidden layer says [N, B, W]."""
        found = torch.cat([condition.joined(), action], dim=-1)[None]
        for layer in self.hidden:
            found = torch.relu(layer(found))
        return found

    def value(self, features: Tensor) -> Tensor:
        """Of such features [N, B, W] → [N, B]."""
        value: Tensor = self.last(features)
        return value.squeeze(-1)

    def forward(self, condition: Condition, action: Tensor) -> Tensor:
        """The condition of B states, actions [B, A] → [N, B]."""
        return self.value(self.features(condition, action))
