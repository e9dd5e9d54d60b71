"""CQL(H) (Kumar et al. 2020): SAC (Haarnoja et al. 2018) whose critics are pressed down where the data says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.methods.actor_critic import ActorCritic, ActorCriticConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.acting import NoisyActing
from llmdpd.nn.actor import SquashedGaussianPolicy
from llmdpd.nn.context import Condition
from llmdpd.utils.bounds import Bounds, NonNegative


@dataclass(frozen=True)
class CQLConfig(ActorCriticConfig):
    """CQL(H) with a fixed weight of its penalty. Defaults are those of its code for locomotion."""

    name = "cql"
    action_use = "learns from"
    legacy: ClassVar[Mapping[str, str]] = {"cql": "method."}
    former: ClassVar[Mapping[str, str]] = {"draws": "samples"}

    acting: NoisyActing = field(default_factory=NoisyActing)
    lr: NonNegative = 1e-4
    """Learning rate of policy and encoders."""
    penalty: NonNegative = 10.0
    """Weight of the conservative term."""
    samples: Annotated[int, Bounds(1, 1000)] = 10
    """Actions by which log Σ exp Q is estimated: so many uniform ones, the policy's, and its in the next state."""
    temperature_lr: NonNegative = 1e-4
    """Learning rate of the entropy's temperature."""


class Temperature(nn.Module):
    """The entropy's weight, exp of what is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))


class CQL(ActorCritic[SquashedGaussianPolicy, CQLConfig]):
    """Actor, critics with targets, and the temperature; the entropy aimed at is - A."""

    Config = CQLConfig
    network_class = SquashedGaussianPolicy
    critic_layers = 3

    def __init__(self, network: SquashedGaussianPolicy, config: CQLConfig, iterations: int) -> None:
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

    def critic_loss(self, batch: PromptedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors to r + gamma (1 - terminal) min Q̄(s', a'), and the penalty of both critics (equation 4)."""
        config = self.config
        with torch.no_grad():
            prompts = self.encode(batch)  # anew: the actor's step has changed the encoders
            now, following = self.condition(batch, prompts), self.condition(batch, prompts, following=True)
            actions = self.policy.rsample(following)[0][0]
            value = self.target_critic.minimum(following, actions)
            target = batch.rewards * config.reward_scale + config.gamma * (1 - batch.terminals) * value
            others, density = self._others(now, following)
        q1, q2 = self.critic(now, batch.actions)
        bellman = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        penalty = self._penalty(now, others, density, (q1, q2))
        metrics = {"q/mean": q1.detach().mean(), "q/target": target.mean(), "loss/penalty": penalty.detach()}
        return bellman + config.penalty * penalty, metrics

    def _others(self, now: Condition, following: Condition) -> tuple[Tensor, Tensor]:
        """Actions [3 N, B, A] that Q is pressed down at, and the log of the density that each is sampled from [3 N, B].

        A third is uniform, a third the policy's, a third the policy's in the next state.
        """
        count, bound, numbers = self.config.samples, self.policy.config.action_bound, self.policy.action_dim
        shape = (count, len(now.state), numbers)
        uniform = bound * (2 * torch.rand(shape, device=now.state.device) - 1)
        flat = torch.full(shape[:2], -numbers * float(torch.log(torch.tensor(2 * bound))), device=uniform.device)
        (own, own_density), (next_own, next_density) = (self.policy.rsample(c, count) for c in (now, following))
        return torch.cat([uniform, own, next_own]), torch.cat([flat, own_density, next_density])

    def _penalty(self, now: Condition, others: Tensor, density: Tensor, values: tuple[Tensor, Tensor]) -> Tensor:
        """mean (log Σ exp Q - Q(s, a)), the sum estimated by importance; of both critics together."""
        count, batch = density.shape
        repeated = Condition(now.state.repeat(count, 1), now.prompt.expand(batch, -1).repeat(count, 1))
        total = torch.zeros((), device=density.device)
        for at_others, value in zip(self.critic(repeated, others.flatten(0, 1)), values, strict=True):
            high = torch.logsumexp(at_others.view(count, batch) - density, dim=0)
            total = total + (high - value).mean()
        return total
