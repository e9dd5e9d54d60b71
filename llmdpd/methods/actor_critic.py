"""What methods share whose actor is an MLP: their configuration, and critics with their targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

from torch import Tensor

from llmdpd.methods.base import Method, Start, UnaveragedConfig
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.actor import ActorNetworkConfig, ActorPolicy
from llmdpd.nn.critic import TwinQ
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Count, Fraction, NonNegative, Width

if TYPE_CHECKING:
    from typing_extensions import Self

Actor = TypeVar("Actor", bound=ActorPolicy)
Config = TypeVar("Config", bound="ActorCriticConfig")


@dataclass(frozen=True)
class ActorConfig(UnaveragedConfig):
    """A method whose policy is an MLP, by default without prompts."""

    network: ActorNetworkConfig = field(default_factory=ActorNetworkConfig)

    @classmethod
    def from_preset(cls, start: Start) -> Self:
        """The sizes of the preset's policy diffusion, and its batches."""
        return cls(network=ActorNetworkConfig.from_preset(start), **start.batches)


@dataclass(frozen=True)
class ActorCriticConfig(ActorConfig):
    """An actor and two critics."""

    critic_lr: NonNegative = 3e-4
    """Learning rate of the critics."""
    critic_hidden: Width = 256
    """Width of the critics' hidden layers."""
    gamma: Fraction = 0.99
    """Discount a step."""
    tau: Fraction = 0.005
    """Polyak rate of the target networks, at each of their steps."""
    reward_scale: NonNegative = 1.0
    """Factor on rewards in the critics' targets."""


@dataclass(frozen=True)
class TD3Config(ActorCriticConfig):
    """What methods have whose targets and steps are TD3's."""

    acting: ActingConfig = field(default_factory=ActingConfig)
    policy_noise: NonNegative = 0.2
    """Standard deviation of the target actions' noise, of the action bound."""
    noise_clip: NonNegative = 0.5
    """Where that noise is cut, of the action bound."""
    policy_every: Count = 2
    """Critic steps from one step of the actor to the next."""

    def smoothed(self, actions: Tensor, bound: float) -> Tensor:
        """Target actions with noise that is cut, within ± the bound."""
        noise = (sharding.randn(actions.shape, actions.device) * self.policy_noise).clamp(
            -self.noise_clip, self.noise_clip
        )
        return (actions + bound * noise).clamp(-bound, bound)


class ActorCritic(Method[Actor, Config]):
    """An actor, two critics (`TwinQ`), and the critics' targets."""

    critic_layers: ClassVar[int] = 2

    def __init__(self, network: Actor, config: Config, iterations: int) -> None:
        super().__init__(network, config, iterations)
        context, widths = network.context, (config.critic_hidden,) * self.critic_layers
        self.critic = TwinQ(context.state_dim, network.action_dim, context.prompt_dim, widths).to(network.device)
        self.target_critic = self._add("critic", self.critic, config.critic_lr)
