"""Augmentations of states, without any geometry: RAD's (Laskin et al. 2020) and S4RL's (Sinha et al. 2021).

A batch becomes one or more batches whose states and next states are changed; everything else stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.methods.batch import PromptedBatch
from llmdpd.utils.bounds import Bounds, Fraction, NonNegative

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
            uniform = torch.rand(len(now), 1, device=now.device)
            factor = self.scale_low + (self.scale_high - self.scale_low) * uniform
            return [dataclasses.replace(batch, observations=now * factor, next_observations=later * factor)]
        noise = self.sigma * torch.randn_like(now)
        return [dataclasses.replace(batch, observations=_plus(now, noise), next_observations=_plus(later, noise))]


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
            beta = torch.distributions.Beta(*(torch.full((len(now), 1), self.mixup, device=now.device),) * 2)
            # The state after the next one is not in the batch: the next one stays as it is.
            return dataclasses.replace(batch, observations=torch.lerp(later, now, beta.sample()))
        return dataclasses.replace(batch, observations=self._noisy(now), next_observations=self._noisy(later))

    def _noisy(self, states: Tensor) -> Tensor:
        if self.kind == "gaussian":
            return _plus(states, self.sigma * torch.randn_like(states))
        if self.kind == "uniform":
            return _plus(states, self.width * (2 * torch.rand_like(states) - 1))
        rows, width = states.shape
        lost = torch.randint(width, (rows, 1), device=states.device)
        lost = lost.where(torch.rand(rows, 1, device=states.device) < self.dropout, -1)
        return states.masked_fill(torch.arange(width, device=states.device) == lost, 0.0)

    def _adversarial(self, batch: PromptedBatch, value: Value) -> PromptedBatch:
        states = batch.observations.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(dataclasses.replace(batch, observations=states)), states)
        step = self.step * gradient.sign()
        return dataclasses.replace(batch, observations=_plus(batch.observations, -step))
