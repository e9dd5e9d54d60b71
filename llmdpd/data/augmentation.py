"""Augmentation of a layout's geometry: states and demonstration of a task moved alike, so that the latter is read.

Where an object's reported point lies on it, which way things stand, and which task it is can be memorised for the tasks
of the training data, and not for an unseen one. Moved at random for each prompt of a batch, they can only be read from
the demonstration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmdpd.data.scene import Turning, rotation
from llmdpd.tasks.layout import Layout, columns_of
from llmdpd.utils.bounds import Fraction, NonNegative


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes in training, one for each prompt, the same for its states; none without a demonstration."""

    offset: NonNegative = 0.0
    """Standard deviation in metres of the jitter of each point's reported position, the body's aside."""
    offset_probability: Fraction = 0.7
    """Probability that a position is jittered, each by itself."""
    rotate: Fraction = 0.0
    """Probability that the scene is rotated about the vertical by a random angle."""
    mirror: Fraction = 0.0
    """Probability that left and right are exchanged."""

    @property
    def active(self) -> bool:
        """Whether anything is ever changed."""
        return any((self.offset, self.rotate, self.mirror))


class Augmentation:
    """Draws one change for each prompt, and applies it to everything that belongs to the prompt.

    Args:
        config: see `AugmentationConfig`.
        layout: of the observations and actions; `rotatable`, where scenes are rotated or mirrored.
        prompts: P, prompts a batch.
        random: every draw comes from here.
        given: [P, 1], 0 where the demonstration is left out: nothing is changed there; None where none is.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        layout: Layout,
        prompts: int,
        random: np.random.Generator,
        given: Tensor | None = None,
    ) -> None:
        def uniform(*shape: int) -> Tensor:
            return torch.from_numpy(random.random((prompts, *shape), np.float32))

        self._random, self._config, self._layout = random, config, layout
        self._things = layout.points[1:]
        there = torch.ones(prompts) if given is None else given[:, 0]
        count = len(self._things)
        jittered = there[:, None, None] * (uniform(count, 1) < config.offset_probability)
        normal = torch.from_numpy(random.standard_normal((prompts, count, layout.dimensions), np.float32))
        self._jitter = config.offset / layout.unit * normal * jittered
        angle = 2 * np.pi * uniform() * (uniform() < config.rotate) * there
        side = 1 - 2 * (uniform() < config.mirror).float() * there
        self._matrix = rotation(angle, side)
        self._turning = Turning(layout) if layout.rotatable else None
        # Version 0.1 drew four numbers for changes that are gone: a run goes on with the same draws as it began with.
        random.random((prompts, 4), np.float32)

    def states(self, states: Tensor) -> Tensor:
        """Observations [P, M, S], changed."""
        changed = states.clone()
        for number, thing in enumerate(self._things if self._config.offset else ()):
            for place in map(columns_of, filter(None, (thing.at, thing.previous))):
                points = states[..., place]
                there = (points != 0).any(-1, keepdim=True)  # an absent point stays absent
                changed[..., place] = torch.where(there, points + self._jitter[:, None, number], points)
        if self._turning is not None:
            changed = self._turning.states(changed, self._matrix)
        gripper = columns_of(self._layout.gripper)
        # Version 0.1 could stretch this reading: the rounding of its factor 1 is kept, for the same reason.
        changed[..., gripper] = 1 - (1 - changed[..., gripper])
        return changed

    def actions(self, actions: Tensor) -> Tensor:
        """Actions [P, M, A], within ±1, in the same scene."""
        return actions if self._turning is None else self._turning.actions(actions, self._matrix)

    def demonstration_actions(self, actions: Tensor) -> Tensor:
        """The demonstration's actions [P, T, A] in the same scene, within ±1."""
        self._random.standard_normal(actions.shape, np.float32)  # as above: of noise that is gone
        return self.actions(actions).clamp(-1, 1)
