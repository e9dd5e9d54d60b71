"""TD3+BC (Fujimoto & Gu 2021): TD3 whose actor clones beside; under RAD and S4RL, which change the states.

Critics learn the smaller of two targets at a smoothed next action, as in TD3 (Fujimoto et al. 2018); at every second
iteration the actor follows lambda Q - (pi(s) - a)², lambda = alpha / mean |Q|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.methods.actor_critic import ActorCritic, ActorCriticConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.td3_bc.state_augmentation import RADAugmentation, S4RLAugmentation, StateAugmentation
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.actor import DeterministicPolicy
from llmdpd.nn.context import EncodedPrompts
from llmdpd.utils.bounds import Count, NonNegative


@dataclass(frozen=True)
class TD3BCConfig(ActorCriticConfig):
    """TD3+BC. Defaults are its paper's, and its code's."""

    name = "td3-bc"
    legacy: ClassVar[Mapping[str, str]] = {"td3_bc": "method."}

    acting: ActingConfig = field(default_factory=ActingConfig)
    alpha: NonNegative = 2.5
    """Weight of Q against cloning."""
    policy_noise: NonNegative = 0.2
    """Standard deviation of the target actions' noise, of the action bound."""
    noise_clip: NonNegative = 0.5
    """Where that noise is cut, of the action bound."""
    policy_every: Count = 2
    """Critic steps from one step of the actor to the next."""


@dataclass(frozen=True)
class RADConfig(TD3BCConfig):
    """TD3+BC on states that RAD changes."""

    name = "rad"
    legacy: ClassVar[Mapping[str, str]] = {"td3_bc": "method.", "rad": "method.states."}

    states: RADAugmentation = field(default_factory=RADAugmentation)
    """How states are changed."""


@dataclass(frozen=True)
class S4RLConfig(TD3BCConfig):
    """TD3+BC on states that S4RL changes."""

    name = "s4rl"
    legacy: ClassVar[Mapping[str, str]] = {"td3_bc": "method.", "s4rl": "method.states."}

    states: S4RLAugmentation = field(default_factory=S4RLAugmentation)
    """How states are changed."""


class TD3BC(ActorCritic[DeterministicPolicy, TD3BCConfig]):
    """Actor, critics, and the targets of both."""

    Config = TD3BCConfig
    network_class = DeterministicPolicy
    same_work = False  # the actor learns at every second iteration

    def __init__(self, network: DeterministicPolicy, config: TD3BCConfig, iterations: int) -> None:
        super().__init__(network, config, iterations)
        self.target_policy = self._add_target("policy", network)
        self.augmentation: StateAugmentation = getattr(config, "states", StateAugmentation())
        self._iteration = 0

    def schedule(self, iteration: int) -> None:
        """The learning rates, and whether it is the actor's turn."""
        super().schedule(iteration)
        self._iteration = iteration

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """A step of the critics, and at its turn one of the actor and of all targets."""
        self.policy.train()
        prompts = self.encode(batch)  # states are augmented, prompts are not
        batches = self.augmentation.batches(batch, partial(self.value, prompts=prompts))
        loss, metrics = self.critic_loss(batches, prompts)
        metrics |= {"loss/critic": loss.detach(), "grad/critic": self.step("critic", loss)}
        if (self._iteration + 1) % self.config.policy_every == 0:
            loss, parts = self.actor_loss(batches[0], prompts)
            metrics |= parts | {"loss/actor": loss.detach(), "grad/policy": self.step("policy", loss)}
            for name in ("critic", "policy"):
                self.track(name, self.config.tau)
        return metrics

    def value(self, batch: PromptedBatch, prompts: EncodedPrompts) -> Tensor:
        """Sum of Q_1 at the batch's states and the policy's actions there: what adversarial states go against."""
        condition = self.condition(batch, prompts)
        return self.critic(condition, self.policy(condition))[0].sum()

    def critic_loss(
        self, batches: Sequence[PromptedBatch], prompts: EncodedPrompts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors of Q_1 and Q_2 to r + gamma (1 - terminal) min Q̄(s', a'), a' = pi̅(s') + clipped noise.

        Of several augmented batches, values and targets are means over them (S4RL, equation 3).
        """
        config, first = self.config, batches[0]
        with torch.no_grad():
            target_prompts = self.encode(first, self.target_policy)
            following = torch.stack([self._next_value(batch, prompts, target_prompts) for batch in batches]).mean(0)
            target = first.rewards * config.reward_scale + config.gamma * (1 - first.terminals) * following
        values = [self.critic(self.condition(batch, prompts).detached(), batch.actions) for batch in batches]
        q1, q2 = (torch.stack(part).mean(0) for part in zip(*values, strict=True))
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        return loss, {"q/mean": q1.detach().mean(), "q/target": target.mean()}

    def _next_value(self, batch: PromptedBatch, prompts: EncodedPrompts, target_prompts: EncodedPrompts) -> Tensor:
        bound, config = self.policy.config.action_bound, self.config
        acting = self.target_policy(self.condition(batch, target_prompts, following=True, network=self.target_policy))
        noise = (torch.randn_like(acting) * config.policy_noise).clamp(-config.noise_clip, config.noise_clip)
        actions = (acting + bound * noise).clamp(-bound, bound)
        return self.target_critic.minimum(self.condition(batch, prompts, following=True), actions)

    def actor_loss(self, batch: PromptedBatch, prompts: EncodedPrompts) -> tuple[Tensor, dict[str, Tensor]]:
        """- lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)², lambda = alpha / mean |Q_1|."""
        condition = self.condition(batch, prompts)
        actions = self.policy(condition)
        q = self.critic(condition.detached(), actions)[0]
        cloning = F.mse_loss(actions, batch.actions)
        weight = self.config.alpha / q.detach().abs().mean().clamp_min(1e-6)
        return cloning - weight * q.mean(), {"loss/cloning": cloning.detach()}


class RAD(TD3BC):
    """TD3+BC on states under random amplitude scaling, or noise (Laskin et al. 2020)."""

    Config = RADConfig


class S4RL(TD3BC):
    """TD3+BC on states under S4RL's augmentations (Sinha et al. 2021)."""

    Config = S4RLConfig
