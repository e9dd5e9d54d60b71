"""The policy of policy diffusion: pi(a | s, z_text, z_traj), encoders and noise network (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP
from llmdpd.errors import InputError
from llmdpd.methods.llmdpd.best_of_n import sample_actions
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import Condition
from llmdpd.nn.critic import DoubleQ
from llmdpd.nn.policy_network import ChainConfig, ConditionedNetwork, ContextNetworkConfig, Spaces, Window
from llmdpd.utils.bounds import ACTION_NUMBERS, Steps, Width


@dataclass(frozen=True)
class DiffusionNetworkConfig(ContextNetworkConfig, ChainConfig):
    """The noise network and its diffusion chain. Defaults are Diffusion-QL's."""

    hidden_dim: Width = 256
    """Width of the noise network's three hidden layers."""
    chunk: Steps = 1
    """H, actions that the noise network denoises together: the present one and those that follow."""


class DiffusionPolicy(ConditionedNetwork):
    """Encoders (psi, phi) and noise network (theta).

    With a chunk H above 1 it is pi(a_t … a_{t+H-1} | s_t, z_text, z_traj): to the noise network a chunk is one action
    of H A numbers, step after step (action chunking: Zhao et al. 2023, ACT; Chi et al. 2023, Diffusion Policy).

    Raises:
        InputError: chunks of more numbers than the samplers take.
    """

    config: DiffusionNetworkConfig
    alpha_bar: Tensor

    def __init__(self, spaces: Spaces, config: DiffusionNetworkConfig) -> None:
        numbers = config.chunk * spaces.action_dim
        if numbers > ACTION_NUMBERS.high:
            raise InputError(
                "a chunk has more numbers than the samplers take",
                field="network.chunk",
                found=f"{config.chunk} actions of {spaces.action_dim} numbers: {numbers}",
                expected=f"{ACTION_NUMBERS.high} numbers at most",
            )
        super().__init__(spaces, config)
        self.register_buffer("alpha_bar", config.alpha_bar(), persistent=False)
        self.training_sampler = config.training_sampler()
        self.net = NoiseMLP(
            self.context.state_dim, numbers, self.context.prompt_dim, config.hidden_dim, config.time_dim
        )

    @property
    def window(self) -> Window:
        """The steps of a chunk; of single actions none."""
        return Window(self.config.chunk) if self.config.chunk > 1 else Window()

    def make_critic(self, hidden: int = 256, sees_prompts: bool = False) -> DoubleQ:  # type: ignore[override]
        """Q_1 and Q_2 on this policy's features, of that width; `sees_prompts`: on its prompt vectors too.

        Raises:
            InputError: a policy with chunks, whose critics would value single actions.
        """
        if self.config.chunk > 1:
            raise InputError(
                "critics value single actions, and this policy samples chunks",
                field="network.chunk",
                found=self.config.chunk,
                expected="1, or no critics",
            )
        return DoubleQ(self.context.state_dim, self.action_dim, self.context.prompt_dim if sees_prompts else 0, hidden)

    def sample_conditioned(
        self, observations: Tensor, condition: Condition, acting: BestOfN, seeds: Tensor, critic: Any
    ) -> Tensor:
        coefficients = acting.coefficients(self.config)
        actions = sample_actions(self.net, critic, condition, coefficients, acting, seeds)
        return torch.unflatten(actions, 1, (self.config.chunk, self.action_dim))
