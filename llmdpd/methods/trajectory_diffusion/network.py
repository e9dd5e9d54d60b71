"""The policy of trajectory diffusion: reverse diffusion of a trajectory of states and actions → its first action."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmdpd.nn.acting import ChainActing
from llmdpd.nn.context import Condition
from llmdpd.nn.policy_network import ChainConfig, ConditionedNetwork, ContextNetworkConfig, Spaces, Window
from llmdpd.nn.trajectory_denoiser import TrajectoryConfig, TrajectoryDenoiser, reverse_trajectory


@dataclass(frozen=True)
class TrajectoryNetworkConfig(ContextNetworkConfig, ChainConfig):
    """The denoiser of trajectories and its diffusion chain."""

    plan: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    """What is denoised in place of an action, and the transformer that does it."""


class TrajectoryPolicy(ConditionedNetwork):
    """p(s_t, a_t … s_{t+H-1}, a_{t+H-1} | s_t, z_text, z_traj): encoders and a denoiser of trajectories.

    The states of a trajectory are scaled to ± the action bound by the least and the greatest that the training tasks
    have, so that the sampler's clip fits states and actions alike.
    """

    config: TrajectoryNetworkConfig
    alpha_bar: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, spaces: Spaces, config: TrajectoryNetworkConfig) -> None:
        super().__init__(spaces, config)
        self.register_buffer("alpha_bar", config.alpha_bar(), persistent=False)
        self.net = TrajectoryDenoiser(
            spaces.state_dim + spaces.action_dim,
            self.context.state_dim,
            self.context.prompt_dim,
            config.time_dim,
            config.plan,
        )
        self.register_buffer("low", -torch.ones(spaces.state_dim))
        self.register_buffer("high", torch.ones(spaces.state_dim))

    @property
    def window(self) -> Window:
        """The trajectory's steps."""
        return Window(self.config.plan.horizon)

    def fit(self, observations: Tensor, returns: Callable[[], Tensor]) -> None:
        super().fit(observations, returns)
        self.low.copy_(observations.amin(0))
        self.high.copy_(observations.amax(0))

    def scaled(self, states: Tensor) -> Tensor:
        """States [..., S] scaled to ± the action bound, 0 where the training tasks have one value alone."""
        span = self.high - self.low
        unit = torch.where(span > 0, (states - self.low) / span.clamp_min(1e-12) * 2 - 1, 0.0)
        return self.config.action_bound * unit.clamp(-1.0, 1.0)

    def sample_conditioned(
        self, observations: Tensor, condition: Condition, acting: ChainActing, seeds: Tensor, critic: Any
    ) -> Tensor:
        """The first action of a trajectory for each state, [B, 1, A]: it is sampled anew at every step."""
        return self.trajectories(observations, condition, acting, seeds)[:, :1, self.state_dim :]

    def trajectories(self, observations: Tensor, condition: Condition, acting: ChainActing, seeds: Tensor) -> Tensor:
        """Trajectories [B, H, S + A] from observations [B, S] on, in their condition; seeds int64 [B]."""
        present = self.scaled(observations)
        return reverse_trajectory(self.net, present, *condition, acting.coefficients(self.config), seeds)
