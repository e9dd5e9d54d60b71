"""What methods share whose actor and critics are SAC's (Haarnoja et al. 2018): the actor's loss, the temperature's."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmdpd.methods.actor_critic import ActorCritic, ActorCriticConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.acting import NoisyActing
from llmdpd.nn.actor import SquashedGaussianPolicy
from llmdpd.nn.context import Condition
from llmdpd.utils.bounds import NonNegative

Config = TypeVar("Config", bound="SoftActorCriticConfig")


@dataclass(frozen=True)
class SoftActorCriticConfig(ActorCriticConfig):
    """A squashed Gaussian actor, two critics, and a temperature."""

    acting: NoisyActing = field(default_factory=NoisyActing)
    temperature_lr: NonNegative = 3e-4
    """Learning rate of the entropy's temperature."""


class Temperature(nn.Module):
    """The entropy's weight, exp of what is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))


class SoftActorCritic(ActorCritic[SquashedGaussianPolicy, Config]):
    """Actor, critics with targets, and the temperature; the entropy aimed at is - A."""

    network_class: ClassVar[type[SquashedGaussianPolicy]] = SquashedGaussianPolicy

    def __init__(self, network: SquashedGaussianPolicy, config: Config, iterations: int) -> None:
        super().__init__(network, config, iterations)
        self.temperature = Temperature().to(network.device)
        self.modules["temperature"] = self.temperature
        self._optimise("temperature", [self.temperature.log], config.temperature_lr)

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """A step of temperature, actor and critics each, and of the targets."""
        self.policy.train()
        condition = self.condition(batch, self.encode(batch))
        actor_loss, log_probability = self.actor_loss(condition)
        aim = (log_probability.detach() - self.policy.action_dim).mean()
        metrics = {"loss/actor": actor_loss.detach(), "grad/policy": self.step("policy", actor_loss)}
        self.step("temperature", -self.temperature.log.exp() * aim)
        loss, parts = self.critic_loss(batch)
        metrics |= parts | {"loss/critic": loss.detach(), "grad/critic": self.step("critic", loss)}
        self.track("critic", self.config.tau)
        return metrics | {"temperature": self.temperature.log.detach().exp()}

    def actor_loss(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """mean (temperature log pi(a | s) - min Q(s, a)), a from the policy; and log pi(a | s) [B]."""
        actions, log_probability = self.policy.rsample(condition)
        value = self.critic.minimum(condition.detached(), actions[0])
        weight = self.temperature.log.detach().exp()
        return (weight * log_probability[0] - value).mean(), log_probability[0]

    @abstractmethod
    def critic_loss(self, batch: PromptedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of both critics together, and metrics."""
