"""RD (Ma et al. 2023): an ensemble of TD3's critics that tell the policy's actions from the data's in their features.

Beside the squared error the critics learn weight mean phi(s, pi(s)) . phi(s, a'), phi the last hidden layer of each:
a' is the data's action, or, where the policy already does what the data did, that of an out-of-distribution policy, so
that alike actions are not torn apart. The backbone is TD3-N-UNC: N critics whose targets, and whose actor, go by
mean - uncertainty x deviation over the ensemble.

Sources: the abstract says what is told apart, when, and that a generator of out-of-distribution data adjusts it; Moalla
et al. (2024, arXiv 2405.00662) write the loss as that product of features. Neither the paper's text nor code of the
authors could be had. So these are this project's: the generator (uniformly random actions), when the policy counts as
near the data, the backbone's uncertainty, the loss's weight and all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from llmdpd.methods.actor_critic import TD3Config
from llmdpd.methods.base import Method
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.actor import DeterministicPolicy
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.critic import EnsembleQ
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, NonNegative


@dataclass(frozen=True)
class RDConfig(TD3Config):
    """TD3-N-UNC+RD."""

    name = "rd"
    action_use = "learns from"

    members: Annotated[int, Bounds(2, 1000)] = 10
    """N, critics."""
    uncertainty: NonNegative = 2.0
    """Standard deviations over the critics that a value is lowered by."""
    distinction: NonNegative = 1e-3
    """Weight of the product of features."""
    near: NonNegative = 0.1
    """The policy does what the data did where their actions differ by less, root mean square, of the action bound."""


class RD(Method[DeterministicPolicy, RDConfig]):
    """Actor, ensemble of critics, and the targets of both."""

    Config = RDConfig
    network_class = DeterministicPolicy
    same_work = False  # the actor learns at every second iteration

    def __init__(self, network: DeterministicPolicy, config: RDConfig, iterations: int) -> None:
        super().__init__(network, config, iterations)
        context, widths = network.context, (config.critic_hidden,) * 2
        critic = EnsembleQ(config.members, context.state_dim, network.action_dim, context.prompt_dim, widths)
        self.critic = critic.to(network.device)
        self.target_critic = self._add("critic", self.critic, config.critic_lr)
        self.target_policy = self._add_target("policy", network)
        self._iteration = 0

    def schedule(self, iteration: int) -> None:
        """The learning rates, and whether it is the actor's turn."""
        super().schedule(iteration)
        self._iteration = iteration

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """A step of the critics, and at its turn one of the actor and of all targets."""
        self.policy.train()
        prompts = self.encode(batch)
        loss, metrics = self.critic_loss(batch, prompts)
        metrics |= {"loss/critic": loss.detach(), "grad/critic": self.step("critic", loss)}
        if (self._iteration + 1) % self.config.policy_every == 0:
            loss = self.actor_loss(batch, prompts)
            metrics |= {"loss/actor": loss.detach(), "grad/policy": self.step("policy", loss)}
            for name in ("critic", "policy"):
                self.track(name, self.config.tau)
        return metrics

    def critic_loss(self, batch: PromptedBatch, prompts: EncodedPrompts) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors of all critics to r + gamma (1 - terminal) lowered Q̄(s', a'), and the product of features."""
        config, bound = self.config, self.policy.config.action_bound
        with torch.no_grad():
            now, following = self.condition(batch, prompts), self.condition(batch, prompts, following=True)
            acting = self.encode(batch, self.target_policy)
            later = self.condition(batch, acting, following=True, network=self.target_policy)
            actions = config.smoothed(self.target_policy(later), bound)
            value = self.lowered(self.target_critic(following, actions))
            target = batch.rewards * config.reward_scale + config.gamma * (1 - batch.terminals) * value
            own = self.policy(now)
            partner, near = self.partners(batch.actions, own)
        features = self.critic.features(now, batch.actions)
        values = self.critic.value(features)
        bellman = (values - target).square().mean(1).sum()
        others = torch.where(near[:, None], self.critic.features(now, partner), features)
        product = (self.critic.features(now, own) * others).sum(-1).mean(1).sum()
        metrics = {"q/mean": values.detach().mean(), "q/target": target.mean(), "share/near": near.float().mean()}
        metrics["loss/distinction"] = product.detach() / config.members
        return bellman + config.distinction * product, metrics

    def partners(self, data: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, A] that the policy's `own` are told from, and where they are the generator's [B]."""
        bound = self.policy.config.action_bound
        near = (own - data).square().mean(-1).sqrt() < self.config.near * bound
        generated = bound * (2 * sharding.rand(own.shape, own.device) - 1)
        return torch.where(near[:, None], generated, data), near

    def lowered(self, values: Tensor) -> Tensor:
        """Values [N, B] → mean less `uncertainty` standard deviations over the critics [B]."""
        return values.mean(0) - self.config.uncertainty * values.std(0, correction=0)

    def actor_loss(self, batch: PromptedBatch, prompts: EncodedPrompts) -> Tensor:
        """- mean of the lowered Q(s, pi(s)), in units of its mean size."""
        condition = self.condition(batch, prompts)
        with self.frozen("critic"):
            q = self.lowered(self.critic(condition.detached(), self.policy(condition)))
        return -q.mean() / sharding.mean(q.detach().abs().mean()).clamp_min(1e-6)
