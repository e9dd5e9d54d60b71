"""Policies that name their action, or its distribution, without diffusion: prompts + state → context → MLP → action.

They are what the baselines act with. Encoders, context and features are those of all methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmdpd.diffusion import philox_normal
from llmdpd.nn.acting import ActingConfig, NoisyActing
from llmdpd.nn.config import ContextNetworkConfig
from llmdpd.nn.context import Condition, ContextConfig
from llmdpd.nn.layers import mlp
from llmdpd.nn.policy_network import ConditionedNetwork
from llmdpd.nn.spaces import Spaces
from llmdpd.utils.bounds import Width
from llmdpd.utils.sharding import randn

_INSIDE = 1 - 1e-6


def _normal(mean: Tensor, log_std: Tensor) -> torch.distributions.Normal:
    # Unchecked: a check would wait for the device.
    return torch.distributions.Normal(mean, log_std.exp(), validate_args=False)


@dataclass(frozen=True)
class ActorNetworkConfig(ContextNetworkConfig):
    """An MLP on state features and prompt vectors."""

    hidden_dim: Width = 256
    """Width of the hidden layers."""

    @classmethod
    def from_preset(cls, start: Any) -> ActorNetworkConfig:
        """The sizes of a preset's policy diffusion, without prompts; `start`: see `llmdpd.methods.base.Start`."""
        network = start.diffusion.network
        return cls(network.action_bound, start.promptless, network.hidden_dim)


class ActorPolicy(ConditionedNetwork):
    """Encoders, context, and an MLP of `layers` hidden layers on state features and prompt vectors."""

    config: Any
    outputs = 1
    """Numbers of the network's output for each of the action's."""
    layers = 2
    """Hidden layers, `hidden_dim` wide."""

    def __init__(self, spaces: Spaces, config: Any, context: ContextConfig | None = None) -> None:
        super().__init__(spaces, config, context)
        inputs = self.context.state_dim + self.context.prompt_dim
        self.net = mlp(inputs, (config.hidden_dim,) * self.layers, self.outputs * spaces.action_dim)

    def sample_conditioned(
        self, observations: Tensor, condition: Condition, acting: ActingConfig, seeds: Tensor, critic: Any
    ) -> Tensor:
        return self.action(condition, acting, seeds)[:, None]

    def action(self, condition: Condition, acting: Any, seeds: Tensor) -> Tensor:
        """An action for each of B states [B, A]; the noise of each depends on its own seed, int64 [B]."""
        raise NotImplementedError


class DeterministicPolicy(ActorPolicy):
    """a = bound tanh(MLP(s, z)): the actor of TD3 (Fujimoto et al. 2018)."""

    def forward(self, condition: Condition) -> Tensor:
        """The condition of B states → actions [B, A]."""
        return self.config.action_bound * torch.tanh(self.net(condition.joined()))

    def action(self, condition: Condition, acting: ActingConfig, seeds: Tensor) -> Tensor:
        """The action, which has no noise."""
        actions: Tensor = self(condition)
        return actions


class GaussianPolicy(ActorPolicy):
    """a ~ N(bound tanh(m), s²), m and log s by an MLP: a Gaussian on the actions themselves.

    Experts' actions often lie on the bound, where a squashed Gaussian has no density.
    """

    outputs = 2
    log_std = (-3.0, 2.0)
    """Bounds of log s. Labels without noise have no greatest likelihood: s would go to 0, and the training apart."""

    def statistics(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """m and log s [B, A], the latter within `log_std`."""
        mean, log_std = self.net(condition.joined()).chunk(2, dim=-1)
        return mean, log_std.clamp(*self.log_std)

    def log_probability(self, condition: Condition, actions: Tensor) -> Tensor:
        """Of actions [B, A] → [B], summed over the action's numbers."""
        mean, log_std = self.statistics(condition)
        centre = self.config.action_bound * torch.tanh(mean)
        return _normal(centre, log_std).log_prob(actions).sum(-1)

    def action(self, condition: Condition, acting: NoisyActing, seeds: Tensor) -> Tensor:
        """The mean and `acting.noise_scale` times the noise, clipped to the bound; 0 is the mode."""
        mean, log_std = self.statistics(condition)
        bound, noise = self.config.action_bound, self._noise(mean, seeds)
        return (bound * torch.tanh(mean) + acting.noise_scale * log_std.exp() * noise).clamp(-bound, bound)

    def _noise(self, like: Tensor, seeds: Tensor) -> Tensor:
        return philox_normal(seeds, len(like), 1, 1, like.shape[1], like.device)[0, :, 0].to(like.dtype)


class SquashedGaussianPolicy(GaussianPolicy):
    """a = bound tanh(u), u ~ N(m, s²): the actor of SAC (Haarnoja et al. 2018), three hidden layers as in CQL's."""

    layers = 3
    log_std = (-20.0, 2.0)
    """As in SAC's reference implementation."""

    def rsample(self, condition: Condition, count: int = 1) -> tuple[Tensor, Tensor]:
        """Actions [N, B, A] that the gradient goes through, and their log-probabilities [N, B]."""
        mean, log_std = self.statistics(condition)
        normal = _normal(mean, log_std)
        raw = normal.loc + randn((count, *mean.shape), mean.device, dim=1) * normal.scale
        return self.config.action_bound * torch.tanh(raw), self._log_probability(normal, raw)

    def log_probability(self, condition: Condition, actions: Tensor) -> Tensor:
        """Of actions [B, A] → [B]; those on the bound are taken a little within."""
        mean, log_std = self.statistics(condition)
        unit = (actions / self.config.action_bound).clamp(-_INSIDE, _INSIDE)
        return self._log_probability(_normal(mean, log_std), torch.atanh(unit))

    def action(self, condition: Condition, acting: NoisyActing, seeds: Tensor) -> Tensor:
        """bound tanh(m + `acting.noise_scale` s noise); 0 is the median."""
        mean, log_std = self.statistics(condition)
        noise = acting.noise_scale * log_std.exp() * self._noise(mean, seeds)
        return self.config.action_bound * torch.tanh(mean + noise)

    def _log_probability(self, normal: torch.distributions.Normal, raw: Tensor) -> Tensor:
        # log(1 - tanh(u)²) = 2 (log 2 - u - softplus(-2 u)), exact where tanh has rounded to 1.
        slope = 2 * (torch.log(torch.tensor(2.0)) - raw - nn.functional.softplus(-2 * raw))
        bound = torch.log(torch.tensor(self.config.action_bound))
        return (normal.log_prob(raw) - slope - bound).sum(-1)
