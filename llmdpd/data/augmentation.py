"""Augmentation of Meta-World's geometry: states and demonstration of a task moved alike, so that the latter is read.

Where an object's reported point lies on it, which way things stand, and which task it is can be memorised for 45 tasks,
and not for an unseen one. Moved at random for each prompt of a batch, they can only be read from the demonstration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmdpd.tasks.metaworld.layout import GOAL, GRIPPER, OBJECT, SECOND, previous
from llmdpd.tasks.metaworld.scene import rotated, rotated_actions, rotation
from llmdpd.utils.bounds import Fraction, NonNegative

_JITTERED = ((OBJECT, previous(OBJECT)), (SECOND, previous(SECOND)), (GOAL,))


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes in training, one for each prompt, the same for its states; none without a demonstration."""

    offset: NonNegative = 0.0
    """Standard deviation in metres of the jitter of each object's and of the goal's reported position."""
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
        prompts: P, prompts a batch.
        random: every draw comes from here.
        given: [P, 1], 0 where the demonstration is left out: nothing is changed there; None where none is.
    """

    def __init__(
        self, config: AugmentationConfig, prompts: int, random: np.random.Generator, given: Tensor | None = None
    ) -> None:
        def uniform(*shape: int) -> Tensor:
            return torch.from_numpy(random.random((prompts, *shape), np.float32))

        self._random, self._config = random, config
        there = torch.ones(prompts) if given is None else given[:, 0]
        jittered = there[:, None, None] * (uniform(3, 1) < config.offset_probability)
        normal = torch.from_numpy(random.standard_normal((prompts, 3, 3), np.float32))
        self._jitter = config.offset * normal * jittered  # of object, second object, goal
        angle = 2 * np.pi * uniform() * (uniform() < config.rotate) * there
        side = 1 - 2 * (uniform() < config.mirror).float() * there
        self._matrix = rotation(angle, side)
        # Version 0.1 drew four numbers for changes that are gone: a run goes on with the same draws as it began with.
        random.random((prompts, 4), np.float32)

    def states(self, states: Tensor) -> Tensor:
        """Observations [P, M, 39], changed."""
        jittered = states.clone()
        for number, places in enumerate(_JITTERED if self._config.offset else ()):
            for place in places:
                points = states[..., place]
                there = (points != 0).any(-1, keepdim=True)  # what an observation doesn't have stays absent
                jittered[..., place] = torch.where(there, points + self._jitter[:, None, number], points)
        changed = rotated(jittered, self._matrix)
        for part in (GRIPPER, previous(GRIPPER)):
            # Version 0.1 could stretch this reading: the rounding of its factor 1 is kept, for the same reason.
            changed[..., part] = 1 - (1 - changed[..., part])
        return changed

    def actions(self, actions: Tensor) -> Tensor:
        """Actions [P, M, 4] in the same scene, within their bounds."""
        return rotated_actions(actions, self._matrix)

    def demonstration_actions(self, actions: Tensor) -> Tensor:
        """The demonstration's actions [P, T, 4] in the same scene, within their bounds."""
        self._random.standard_normal(actions.shape, np.float32)  # as above: of noise that is gone
        return self.actions(actions).clamp(-1, 1)
