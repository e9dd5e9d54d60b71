"""TD3+BC (Fujimoto & Gu 2021): TD3 whose actor clones beside; under RAD and S4RL, which change the states.

Critics learn the smaller of two targets at a smoothed next action, as in TD3 (Fujimoto et al. 2018); at every second
iteration the actor follows lambda Q - (pi(s) - a)², lambda = alpha / mean |Q|.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.methods.actor_critic import ActorCritic, TD3Config
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.actor import DeterministicPolicy
from llmdpd.nn.context import EncodedPrompts
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Fraction, NonNegative
from llmdpd.utils.sharding import drawn, rand, randint, randn

Value = Callable[[PromptedBatch], Tensor]
"""A batch → a scalar whose gradient says in which direction its states are worth more."""


@dataclass(frozen=True)
class StateAugmentation:
    """Batches [1 …] from a batch; the first is the one that an actor learns from. Here the batch as it is."""

    def batches(self, batch: PromptedBatch, value: Value) -> list[PromptedBatch]:
        """The changed batches."""
        return [batch]


@dataclass(frozen=True)
class RADAugmentation(StateAugmentation):
    """RAD: random amplitude scaling, or Gaussian noise; the same change for a state and the one after it."""

    kind: Literal["scale", "gaussian"] = "scale"
    """`scale`: every number of a state times one factor; `gaussian`: noise added."""
    scale_low: NonNegative = 0.6
    """Least factor."""
    scale_high: NonNegative = 1.2
    """Greatest factor."""
    sigma: NonNegative = 0.003
    """Standard deviation of the noise, in the observation's units."""

    def check(self) -> None:
        """Raise `InputError` for factors of which the least is greater than the greatest."""
        if self.scale_low > self.scale_high:
            raise InputError(
                "the least factor is greater than the greatest",
                field="scale_low",
                found=self.scale_low,
                expected=f"at most {self.scale_high} (scale_high)",
            )

    def batches(self, batch: PromptedBatch, value: Value) -> list[PromptedBatch]:
        """One batch, sampled for each of its transitions."""
        now, later = batch.observations, batch.next_observations
        if self.kind == "scale":
            uniform = rand((len(now), 1), now.device)
            factor = self.scale_low + (self.scale_high - self.scale_low) * uniform
            return [replace(batch, observations=now * factor, next_observations=later * factor)]
        noise = self.sigma * randn(now.shape, now.device)
        return [replace(batch, observations=_plus(now, noise), next_observations=_plus(later, noise))]


def _plus(states: Tensor, noise: Tensor) -> Tensor:
    """States with noise where they are not exactly 0: that is how Meta-World's observations say that nothing is there.

    Noise there would have every task show an object that it does not have, and then none when acting.
    """
    return states + noise * (states != 0)


@dataclass(frozen=True)
class S4RLAugmentation(StateAugmentation):
    """S4RL: critics learn the mean over several changed batches.

    Noise and dropout change states and next states apart, the others states alone.
    """

    kind: Literal["gaussian", "uniform", "dropout", "mixup", "adversarial"] = "gaussian"
    """Zero-mean Gaussian or uniform noise; single numbers of a state put to 0; a state mixed with the one after it;
    a step against the gradient of Q."""
    sigma: NonNegative = 3e-4
    """Standard deviation of the Gaussian noise, in the observation's units."""
    width: NonNegative = 1e-4
    """The uniform noise lies within ± this."""
    dropout: Fraction = 0.5
    """Probability that a state loses one of its numbers, chosen at random."""
    mixup: Annotated[float, Bounds(1e-6)] = 0.4
    """Both parameters of the Beta distribution of a state's own share in a mixture."""
    step: NonNegative = 1e-4
    """Length of the adversarial step in each number of the state: against the sign of Q's gradient there."""
    copies: Annotated[int, Bounds(1, 64)] = 2
    """Changed batches whose values and targets are averaged; `adversarial` makes one."""

    def batches(self, batch: PromptedBatch, value: Value) -> list[PromptedBatch]:
        """`copies` batches; the adversarial step is the same every time, so that one is enough."""
        if self.kind == "adversarial":
            return [self._adversarial(batch, value)]
        return [self._changed(batch) for _ in range(self.copies)]

    def _changed(self, batch: PromptedBatch) -> PromptedBatch:
        now, later = batch.observations, batch.next_observations
        if self.kind == "mixup":
            # The state after the next one is not in the batch: the next one stays as it is.
            return replace(batch, observations=torch.lerp(later, now, drawn(self._shares(now.device), (len(now), 1))))
        return replace(batch, observations=self._noisy(now), next_observations=self._noisy(later))

    def _shares(self, device: torch.device) -> Callable[[tuple[int, ...]], Tensor]:
        """What draws a state's own shares in mixtures, of a shape."""

        def draw(shape: tuple[int, ...]) -> Tensor:
            both = torch.full(shape, self.mixup, device=device)
            return torch.distributions.Beta(both, both).sample()

        return draw

    def _noisy(self, states: Tensor) -> Tensor:
        if self.kind == "gaussian":
            return _plus(states, self.sigma * randn(states.shape, states.device))
        if self.kind == "uniform":
            return _plus(states, self.width * (2 * rand(states.shape, states.device) - 1))
        rows, width = states.shape
        lost = randint(width, (rows, 1), states.device)
        lost = lost.where(rand((rows, 1), states.device) < self.dropout, -1)
        return states.masked_fill(torch.arange(width, device=states.device) == lost, 0.0)

    def _adversarial(self, batch: PromptedBatch, value: Value) -> PromptedBatch:
        states = batch.observations.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(replace(batch, observations=states)), states)
        step = self.step * gradient.sign()
        return replace(batch, observations=_plus(batch.observations, -step))


@dataclass(frozen=True)
class TD3BCConfig(TD3Config):
    """TD3+BC. Defaults are its paper's, and its code's."""

    name = "td3-bc"
    legacy: ClassVar[Mapping[str, str]] = {"td3_bc": "method."}

    alpha: NonNegative = 2.5
    """Weight of Q against cloning."""


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
        acting = self.target_policy(self.condition(batch, target_prompts, following=True, network=self.target_policy))
        actions = self.config.smoothed(acting, self.policy.config.action_bound)
        return self.target_critic.minimum(self.condition(batch, prompts, following=True), actions)

    def actor_loss(self, batch: PromptedBatch, prompts: EncodedPrompts) -> tuple[Tensor, dict[str, Tensor]]:
        """- lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)², lambda = alpha / mean |Q_1|."""
        condition = self.condition(batch, prompts)
        actions = self.policy(condition)
        q = self.critic(condition.detached(), actions)[0]
        cloning = F.mse_loss(actions, batch.actions)
        weight = self.config.alpha / sharding.mean(q.detach().abs().mean()).clamp_min(1e-6)
        return cloning - weight * q.mean(), {"loss/cloning": cloning.detach()}


class RAD(TD3BC):
    """TD3+BC on states under random amplitude scaling, or noise (Laskin et al. 2020)."""

    Config = RADConfig


class S4RL(TD3BC):
    """TD3+BC on states under S4RL's augmentations (Sinha et al. 2021)."""

    Config = S4RLConfig
