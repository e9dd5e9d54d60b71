"""CQL(H) (Kumar et al. 2020): SAC (Haarnoja et al. 2018) whose critics are pressed down where the data says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.soft_actor_critic import SoftActorCritic, SoftActorCriticConfig
from llmdpd.nn.context import Condition
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, NonNegative

Config = TypeVar("Config", bound="CQLConfig")


@dataclass(frozen=True)
class CQLConfig(SoftActorCriticConfig):
    """CQL(H) with a fixed weight of its penalty. Defaults are those of its code for locomotion."""

    name = "cql"
    action_use = "learns from"
    legacy: ClassVar[Mapping[str, str]] = {"cql": "method."}
    former: ClassVar[Mapping[str, str]] = {"draws": "samples"}

    lr: NonNegative = 1e-4
    """Learning rate of policy and encoders."""
    penalty: NonNegative = 10.0
    """Weight of the conservative term."""
    samples: Annotated[int, Bounds(1, 1000)] = 10
    """Actions by which log Σ exp Q is estimated: so many uniform ones, the policy's, and its in the next state."""
    temperature_lr: NonNegative = 1e-4
    """Learning rate of the entropy's temperature."""


class CQL(SoftActorCritic[Config]):
    """SAC with the conservative term in its critics' loss."""

    Config: ClassVar[type[CQLConfig]] = CQLConfig
    critic_layers = 3

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
        uniform = bound * (2 * sharding.rand(shape, now.state.device, dim=1) - 1)
        flat = torch.full(shape[:2], -numbers * float(torch.log(torch.tensor(2 * bound))), device=uniform.device)
        (own, own_density), (next_own, next_density) = (self.policy.rsample(c, count) for c in (now, following))
        return torch.cat([uniform, own, next_own]), torch.cat([flat, own_density, next_density])

    def _penalty(self, now: Condition, others: Tensor, density: Tensor, values: tuple[Tensor, Tensor]) -> Tensor:
        """mean (log Σ exp Q - Q(s, a)), the sum estimated by importance; of both critics together."""
        count, batch = density.shape
        repeated = Condition(now.state.repeat(count, 1), now.prompt.expand(batch, -1).repeat(count, 1))
        total, held = torch.zeros((), device=density.device), self.held_up(batch, density.device)
        count_held = sharding.mean(torch.full((), float(len(values[0][held])), device=density.device))
        for at_others, value in zip(self.critic(repeated, others.flatten(0, 1)), values, strict=True):
            high = torch.logsumexp(at_others.view(count, batch) - density, dim=0)
            total = total + high.mean() - value[held].sum() / count_held
        return total

    def held_up(self, count: int, device: torch.device) -> Tensor | slice:
        """Which of a batch's transitions the conservative term holds up: all of them."""
        return slice(None)
