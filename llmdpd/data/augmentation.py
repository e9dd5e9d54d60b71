"""Augmentation of a layout's geometry: states and demonstration of a task moved alike, so that the latter is read.

Where an object's reported point lies on it, which way things stand, and which task it is can be memorised for the tasks
of the training data, and not for an unseen one. Moved at random for each prompt of a batch, they can only be read from
the demonstration.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.tasks.layout import Layout, columns_of
from llmdpd.utils.bounds import Fraction, NonNegative

Floats = NDArray[np.float32]


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

    Orientations are left as they are: features of kind `relative` don't read them.

    Args:
        config: see `AugmentationConfig`.
        layout: of the observations and actions; `rotatable`, where scenes are rotated or mirrored.
        prompts: P, prompts a batch.
        random: every draw comes from here.
        given: [P, 1], 0 where the demonstration is left out: nothing is changed there; None where none is.
        shown: T and A, steps and numbers of the demonstrations' actions, where there are demonstrations.
        own: numbers of the prompts whose changes are kept, where not those of all.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        layout: Layout,
        prompts: int,
        random: np.random.Generator,
        given: Tensor | None = None,
        shown: tuple[int, int] = (0, 0),
        own: NDArray[np.int64] | None = None,
    ) -> None:
        def uniform(*shape: int) -> Floats:
            return random.random((prompts, *shape), np.float32)

        self._layout, self._points = layout, _points_of(layout)
        kept: Any = slice(None) if own is None else own
        there = np.ones(prompts, np.float32) if given is None else given[:, 0].numpy()
        count = len(layout.points) - 1
        jittered = there[:, None, None] * (uniform(count, 1) < config.offset_probability)
        normal = random.standard_normal((prompts, count, layout.dimensions), np.float32)
        # That of the body, the first point, is none.
        by_point = np.zeros((layout.dimensions, prompts, count + 1), np.float32)
        by_point[..., 1:] = (np.float32(config.offset / layout.unit) * normal * jittered).transpose(2, 0, 1)
        self._jitter = by_point[:, kept][..., self._points.of][:, :, None] if config.offset else None
        angle = np.float32(2 * np.pi) * uniform() * (uniform() < config.rotate) * there
        side = 1 - 2 * (uniform() < config.mirror) * there
        angle, side = angle[kept], side[kept]
        self._rotation = _Rotation(np.cos(angle), np.sin(angle), side) if layout.rotatable else None
        # Version 0.1 drew four numbers for changes that are gone, and noise of the demonstration's actions: a run goes
        # on with the same draws as it began with.
        random.random((prompts, 4), np.float32)
        random.standard_normal((prompts, *shown), np.float32)

    def numbers(self) -> dict[str, Floats]:
        """What is changed, for who computes it elsewhere: `jitter` [P, D, N]; `cosine`, `sine` and `side` [P]."""
        found = {}
        if self._jitter is not None:
            found["jitter"] = self._jitter[:, :, 0].swapaxes(0, 1)
        return found if self._rotation is None else found | self._rotation.numbers()

    def states(self, states: Tensor) -> Tensor:
        """Observations [P, M, S], changed; absent points (zeros) stay absent."""
        changed, points = states.numpy().copy(), self._points
        places = [changed[..., columns] for columns in points.columns]  # one of [P, M, N] for each axis
        there = np.logical_or.reduce([place != 0 for place in places])
        if self._jitter is not None:
            for place, jitter in zip(places, self._jitter, strict=True):
                place += jitter * there
        if self._rotation is not None:
            first, second = self._layout.horizontal
            turned = self._rotation.of(places[first] - points.pivot[first], places[second] - points.pivot[second])
            for axis, place in zip((first, second), turned, strict=True):
                np.copyto(places[axis], place + points.pivot[axis], where=there)
        for columns, place in zip(points.columns, places, strict=True):
            changed[..., columns] = place
        gripper = columns_of(self._layout.gripper)
        # Version 0.1 could stretch this reading: the rounding of its factor 1 is kept, for the same reason.
        changed[..., gripper] = 1 - (1 - changed[..., gripper])
        return torch.from_numpy(changed)

    def actions(self, actions: Tensor) -> Tensor:
        """Actions [P, M, A], within ±1, in the same scene."""
        if self._rotation is None:
            return actions
        first, second = (self._layout.move[axis] for axis in self._layout.horizontal)
        changed = actions.numpy().copy()
        turned = self._rotation.of(changed[..., first, None], changed[..., second, None])
        for column, moved in zip((first, second), turned, strict=True):
            changed[..., column] = moved[..., 0].clip(-1, 1)
        return torch.from_numpy(changed)

    def demonstration_actions(self, actions: Tensor) -> Tensor:
        """The demonstration's actions [P, T, A] in the same scene, within ±1."""
        return self.actions(actions).clamp(-1, 1)


class _Points(NamedTuple):
    """The places that observations of a layout show, N of them, those of one step before beside the others."""

    columns: tuple[NDArray[np.int64], ...]
    """For each of the D axes the index [N] of its coordinate."""
    of: NDArray[np.int64]
    """The number of the point that the place is of, [N]."""
    pivot: tuple[np.float32, ...]
    """What scenes are rotated about, for each axis."""


@lru_cache(maxsize=64)
def _points_of(layout: Layout) -> _Points:
    shown = [(number, at) for number, point in enumerate(layout.points) for at in (point.at, point.previous) if at]
    columns = tuple(np.array([at[axis] for _, at in shown]) for axis in range(layout.dimensions))
    pivot = layout.pivot or (0.0,) * layout.dimensions
    return _Points(columns, np.array([number for number, _ in shown]), tuple(map(np.float32, pivot)))


def scene_columns(layout: Layout, state_dim: int) -> tuple[NDArray[np.int32], Floats, int]:
    """What each number of a state is to `Augmentation.states`: int32 [S, 6], the pivot [D], and N, the places.

    Of a number: 1 for a coordinate of a point, 2 for the gripper's, 0 for another; a coordinate's axis and place, and
    the place's columns, of two axes the last twice.
    """
    points, table = _points_of(layout), np.zeros((state_dim, 6), np.int32)
    for place in range(len(points.of)):
        columns = [int(axis[place]) for axis in points.columns]
        for axis, column in enumerate(columns):
            table[column] = (1, axis, place, *columns, *columns[-1:] * (3 - len(columns)))
    table[list(layout.gripper), 0] = 2
    return table, np.array(points.pivot, np.float32), len(points.of)


class _Rotation:
    """Scenes mirrored, where `side` [P] is -1, then rotated by an angle of this cosine and sine [P]."""

    def __init__(self, cos: Floats, sin: Floats, side: Floats) -> None:
        self._cos, self._sin, self._side = (part.astype(np.float32)[:, None, None] for part in (cos, sin, side))

    def numbers(self) -> dict[str, Floats]:
        """See `Augmentation.numbers`."""
        return {"cosine": self._cos[:, 0, 0], "sine": self._sin[:, 0, 0], "side": self._side[:, 0, 0]}

    def of(self, first: Floats, second: Floats) -> tuple[Floats, Floats]:
        """The horizontal coordinates [P, M, N] of a scene each, changed."""
        first = self._side * first
        return self._cos * first - self._sin * second, self._sin * first + self._cos * second
