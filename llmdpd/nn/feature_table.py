"""State features as tables: what each number of them is made of, which the C++ code reads one after another."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmdpd.nn.features import FAR, NEAR, VELOCITY, StateFeatures, compared_pairs
from llmdpd.tasks.layout import Layout


class _Kind(IntEnum):
    """As in csrc/tile/context_kernels.h."""

    VALUE = 0
    NORMALISED = 1
    DIFFERENCE = 2
    NEAR = 3


class _Row(NamedTuple):
    kind: _Kind
    one: int
    other: int = 0
    present: tuple[int, int] = (-1, -1)
    """Points without which the number is 0."""
    scale: float = 1.0
    offset: float = 0.0


Table = tuple[NDArray[np.int32], NDArray[np.float32]]
"""[F, 5]: kind, one, other, two points; and [F, 2]: scale, offset."""


class FeatureTables(NamedTuple):
    """The features of `StateFeatures`, its `geometry`, and the points [columns] that either asks for."""

    points: list[list[int]]
    own: Table
    geometry: Table


def feature_tables(features: StateFeatures) -> FeatureTables:
    """The tables of features with the statistics that they have now."""
    layout, every = features.layout, range(features.state_dim)
    if features.kind == "raw":
        rows = [_Row(_Kind.VALUE, column) for column in every]
        return FeatureTables([], _table(rows), _table(rows))
    if features.kind == "normalised":
        rows = _normalised(features, every)
        return FeatureTables([], _table(rows), _table(rows))
    assert layout is not None, "checked when the features were made"
    relations = _Relations(layout)
    scalars = _normalised(features, layout.scalars)
    gripper = [_Row(_Kind.VALUE, column) for column in layout.gripper]
    if features.kind == "relative":
        own = [*gripper, *relations.heights(), *scalars, *relations.rows(present_only=True)]
    else:
        own = [*_normalised(features, every), *relations.rows(present_only=False)]
    geometry = [*relations.differences(True, compared_pairs(layout)), *gripper, *scalars]
    return FeatureTables(relations.points, _table(own), _table(geometry))


class _Relations:
    """See `llmdpd.nn.features`."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._columns = layout, {point.name: point.at for point in layout.points}
        self._number = {point.name: number for number, point in enumerate(layout.points)}
        self.points = [list(point.at) for point in layout.points]

    def rows(self, present_only: bool) -> list[_Row]:
        """Differences in two units, and velocities."""
        far = self.differences(present_only, self._layout.differences)
        near = [row._replace(kind=_Kind.NEAR, scale=NEAR * self._layout.unit) for row in far]
        velocity = [
            _Row(_Kind.DIFFERENCE, before, now, scale=VELOCITY * self._layout.unit)
            for point in self._layout.moving
            for now, before in zip(point.at, point.previous, strict=True)
        ]
        return [*far, *near, *velocity]

    def differences(self, present_only: bool, pairs: Iterable[tuple[str, str]]) -> list[_Row]:
        """Between the points of each pair, in units of 25 cm."""
        scale, rows = FAR * self._layout.unit, []
        for one, other in pairs:
            present = (self._presence(one), self._presence(other)) if present_only else (-1, -1)
            for here, there in zip(self._columns[one], self._columns[other], strict=True):
                rows.append(_Row(_Kind.DIFFERENCE, here, there, present, scale))
        return rows

    def heights(self) -> list[_Row]:
        """Of every point, where an axis is up."""
        up, scale = self._layout.up, FAR * self._layout.unit
        if up is None:
            return []
        return [_Row(_Kind.VALUE, point.at[up], scale=scale) for point in self._layout.points]

    def _presence(self, name: str) -> int:
        # The body is always there, wherever it is.
        return -1 if name == self._layout.body.name else self._number[name]


def _normalised(features: StateFeatures, columns: Iterable[int]) -> list[_Row]:
    mean, std = features.mean.tolist(), features.std.tolist()
    return [_Row(_Kind.NORMALISED, column, scale=std[column], offset=mean[column]) for column in columns]


def _table(rows: list[_Row]) -> Table:
    kinds = np.array([(row.kind, row.one, row.other, *row.present) for row in rows], np.int32).reshape(-1, 5)
    return kinds, np.array([(row.scale, row.offset) for row in rows], np.float32).reshape(-1, 2)
