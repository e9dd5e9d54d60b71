"""Augmentation of Meta-World's geometry: state and example of a task moved alike, so that the example must be read.

Where an object's reported point lies on it, which way things stand, how wide the gripper is around a thing that it
holds, and which task it is can be known by heart of 45 tasks, and not of an unseen one. Moved at random for each prompt
of a batch, they can only be read from the example.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmdpd.tasks.metaworld.layout import GOAL, GRIPPER, OBJECT, SECOND, previous
from llmdpd.tasks.metaworld.scene import turn_matrix, turned, turned_actions

_SHIFTED = ((OBJECT, previous(OBJECT)), (SECOND, previous(SECOND)), (GOAL,))


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes in training, one draw a prompt, the same for its states; none where the example is left out."""

    offset: float = 0.0
    """Standard deviation in metres of a shift of each object's and of the goal's reported position."""
    offset_probability: float = 0.7
    """Probability that a position is shifted, each by itself."""
    turn: float = 0.0
    """Probability that the scene is turned about the vertical by a random angle."""
    mirror: float = 0.0
    """Probability that left and right are exchanged."""
    gripper: float = 0.0
    """How far the gripper's reading is stretched: its distance from open by a factor of 1 ± up to this."""
    example_noise: float = 0.0
    """Probability that noise is put on the example's recorded actions (sigma uniform up to 0.5)."""
    clock_scale: float = 0.0
    """Probability that the example's clock runs at another speed (by a factor of 1/2 to 2)."""

    @property
    def active(self) -> bool:
        """Whether anything is ever changed."""
        return any((self.offset, self.turn, self.mirror, self.gripper, self.example_noise, self.clock_scale))


class Augmentation:
    """Draws one change a prompt, and applies it to everything that belongs to the prompt.

    Args:
        config: see `AugmentationConfig`.
        prompts: P, prompts a batch.
        random: every draw comes from here.
        given: [P, 1], 0 where the example is left out: nothing is changed there; None where none is.
    """

    def __init__(
        self, config: AugmentationConfig, prompts: int, random: np.random.Generator, given: Tensor | None = None
    ) -> None:
        def uniform(*shape: int) -> Tensor:
            return torch.from_numpy(random.random((prompts, *shape), np.float32))

        def normal(*shape: int) -> Tensor:
            return torch.from_numpy(random.standard_normal((prompts, *shape), np.float32))

        self._random, self._config = random, config
        told = torch.ones(prompts) if given is None else given[:, 0]
        shifted = told[:, None, None] * (uniform(3, 1) < config.offset_probability)
        self._shift = config.offset * normal(3, 3) * shifted  # of object, second object, goal
        angle = 2 * np.pi * uniform() * (uniform() < config.turn) * told
        side = 1 - 2 * (uniform() < config.mirror).float() * told
        self._matrix = turn_matrix(angle, side)
        # Drawn where it is asked for alone: a run from before there was such a thing goes on with the same draws.
        stretch = 2 * uniform(1, 1) - 1 if config.gripper else torch.zeros(prompts, 1, 1)
        self._grip = 1 + config.gripper * stretch * told[:, None, None]
        self._action_noise = 0.5 * uniform(1, 1) * (uniform(1, 1) < config.example_noise)
        faster = 2 ** (2 * uniform(1) - 1)
        self._clock = torch.where(uniform(1) < config.clock_scale, faster, 1.0)

    def states(self, states: Tensor) -> Tensor:
        """Observations [P, M, 39], changed."""
        shifted = states.clone()
        for number, places in enumerate(_SHIFTED if self._config.offset else ()):
            for place in places:
                points = states[..., place]
                there = (points != 0).any(-1, keepdim=True)  # what an observation doesn't have stays absent
                shifted[..., place] = torch.where(there, points + self._shift[:, None, number], points)
        changed = turned(shifted, self._matrix)
        for part in (GRIPPER, previous(GRIPPER)):
            changed[..., part] = 1 - (1 - changed[..., part]) * self._grip
        return changed

    def actions(self, actions: Tensor) -> Tensor:
        """Actions [P, M, 4] in the same turned scene, within their bounds."""
        return turned_actions(actions, self._matrix)

    def example_actions(self, actions: Tensor) -> Tensor:
        """The example's actions [P, T, 4]: turned, and noisy where that was drawn."""
        noise = torch.from_numpy(self._random.standard_normal(actions.shape, np.float32))
        return (self.actions(actions) + self._action_noise * noise).clamp(-1, 1)

    def times(self, times: Tensor) -> Tensor:
        """The example's clock [P, T]."""
        return times * self._clock
