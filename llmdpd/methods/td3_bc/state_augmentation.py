"""Augmentations of states, without any geometry: RAD's (Laskin et al. 2020) and S4RL's (Sinha et al. 2021).

A batch becomes one or more batches whose states and next states are changed; everything else stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch

Value = Callable[[PromptedBatch], Tensor]
"""A batch → a scalar whose gradient says in which direction its states are worth more."""


class StateAugmentation:
    """Batches [1 …] from a batch; the first is the one that an actor learns from."""

    def batches(self, batch: PromptedBatch, value: Value) -> list[PromptedBatch]:
        """The changed batches."""
        raise NotImplementedError


class NoStateAugmentation(StateAugmentation):
    """The batch as it is."""

    def batches(self, batch: PromptedBatch, value: Value) -> list[PromptedBatch]:
        """The batch itself."""
        return [batch]


@dataclass(frozen=True)
class RADConfig:
    """RAD's two augmentations of states; the same change for a state and the one after it."""

    kind: Literal["scale", "gaussian"] = "scale"
    """`scale`: every number of a state times one factor; `gaussian`: noise added."""
    scale_low: float = 0.6
    """Least factor."""
    scale_high: float = 1.2
    """Greatest factor."""
    sigma: float = 0.003
    """Standard deviation of the noise, in the observation's units."""


class RAD(StateAugmentation):
    """Random amplitude scaling, or Gaussian noise: one changed batch."""

    def __init__(self, config: RADConfig) -> None:
        self.config = config

    def batches(self, batch: PromptedBatch, value: Value) -> list[PromptedBatch]:
        """One batch, a draw for each of its transitions."""
        config, now, later = self.config, batch.observations, batch.next_observations
        if config.kind == "scale":
            draw = torch.rand(len(now), 1, device=now.device)
            factor = config.scale_low + (config.scale_high - config.scale_low) * draw
            return [dataclasses.replace(batch, observations=now * factor, next_observations=later * factor)]
        noise = config.sigma * torch.randn_like(now)
        return [dataclasses.replace(batch, observations=_plus(now, noise), next_observations=_plus(later, noise))]


def _plus(states: Tensor, noise: Tensor) -> Tensor:
    """States with noise where they are not exactly 0: that is how Meta-World's observations say that nothing is there.

    Noise there would have every task show an object that it does not have, and then none when acting.
    """
    return states + noise * (states != 0)


@dataclass(frozen=True)
class S4RLConfig:
    """S4RL's augmentations of states; critics learn the mean over several changed batches."""

    kind: Literal["gaussian", "uniform", "dropout", "mixup", "adversarial"] = "gaussian"
    """Zero-mean Gaussian or uniform noise; single numbers of a state put to 0; a state mixed with the one after it;
    a step against the gradient of Q."""
    sigma: float = 3e-4
    """Standard deviation of the Gaussian noise, in the observation's units."""
    width: float = 1e-4
    """The uniform noise lies within ± this."""
    dropout: float = 0.5
    """Probability that a state loses one of its numbers, drawn at random."""
    mixup: float = 0.4
    """Both parameters of the Beta distribution of a state's own share in a mixture."""
    step: float = 1e-4
    """Length of the adversarial step in each number of the state: against the sign of Q's gradient there."""
    copies: int = 2
    """Changed batches whose values and targets are averaged; `adversarial` makes one."""


class S4RL(StateAugmentation):
    """Several changed batches. Noise and dropout change states and next states apart, the others states alone."""

    def __init__(self, config: S4RLConfig) -> None:
        self.config = config

    def batches(self, batch: PromptedBatch, value: Value) -> list[PromptedBatch]:
        """`copies` batches; the adversarial step is the same every time, so that one is enough."""
        if self.config.kind == "adversarial":
            return [self._adversarial(batch, value)]
        return [self._changed(batch) for _ in range(self.config.copies)]

    def _changed(self, batch: PromptedBatch) -> PromptedBatch:
        now, later = batch.observations, batch.next_observations
        if self.config.kind == "mixup":
            beta = torch.distributions.Beta(*(torch.full((len(now), 1), self.config.mixup, device=now.device),) * 2)
            # The state after the next one is not in the batch: the next one stays as it is.
            return dataclasses.replace(batch, observations=torch.lerp(later, now, beta.sample()))
        return dataclasses.replace(batch, observations=self._noisy(now), next_observations=self._noisy(later))

    def _noisy(self, states: Tensor) -> Tensor:
        config = self.config
        if config.kind == "gaussian":
            return _plus(states, config.sigma * torch.randn_like(states))
        if config.kind == "uniform":
            return _plus(states, config.width * (2 * torch.rand_like(states) - 1))
        rows, width = states.shape
        lost = torch.randint(width, (rows, 1), device=states.device)
        lost = lost.where(torch.rand(rows, 1, device=states.device) < config.dropout, -1)
        return states.masked_fill(torch.arange(width, device=states.device) == lost, 0.0)

    def _adversarial(self, batch: PromptedBatch, value: Value) -> PromptedBatch:
        states = batch.observations.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(dataclasses.replace(batch, observations=states)), states)
        step = self.config.step * gradient.sign()
        return dataclasses.replace(batch, observations=_plus(batch.observations, -step))
