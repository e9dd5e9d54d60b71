"""The layout of observations and actions: which numbers are positions, and how actions move them.

A suite, or a user's task file, declares it. Relative features, geometry, augmentation and the non-learned tracker are
functions of a layout; without one, observations are plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmdpd.errors import InputError

_UPRIGHT = 3
_MOST_POINTS = 16


@dataclass(frozen=True)
class Point:
    """A position in an observation, in the frame that all points of the layout share."""

    name: str
    at: tuple[int, ...]
    """Indices of its two or three coordinates; all zeros in an observation: the point is absent from it."""
    previous: tuple[int, ...] = ()
    """Indices of the same coordinates one step before, where observations carry them."""


@dataclass(frozen=True)
class Layout:
    """What the numbers of a suite's observations and actions are.

    Every point has as many coordinates, D = 2 or 3. Actions move the first point, the body, along the same axes.

    Raises:
        InputError: no point, points of other than two or three coordinates or of unequal ones, a name or an index
            used twice, a pair, goal or axis that is not there.
    """

    points: tuple[Point, ...]
    """The positions; the first is the body, the point that actions move."""
    goal: str | None = None
    """The point that the task asks something to be brought to, where observations show it."""
    gripper: tuple[int, ...] = ()
    """Indices of the gripper's opening."""
    scalars: tuple[int, ...] = ()
    """Indices of further numbers that say nothing of places or directions, such as how far a drawer is open."""
    move: tuple[int, ...] = ()
    """Indices of the action's numbers that move the body along the points' axes; none where actions do not."""
    grip: tuple[int, ...] = ()
    """Indices of the action's numbers that command the gripper."""
    up: int | None = None
    """The vertical axis of the points, 0 to D - 1; None: there is none, as in a plane seen from above."""
    unit: float = 1.0
    """Metres of one unit of the points' coordinates."""
    pivot: tuple[float, ...] = ()
    """The place [D] about which scenes are rotated and mirrored, in the points' units; by default the origin."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of points whose difference, second less first, is a feature; by default all pairs of points."""
    velocities: tuple[str, ...] | None = None
    """Points whose velocity is a feature; by default all. Where an observation does not carry a point's previous
    position, the position of the step before is remembered."""

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        if not 1 <= len(names) <= _MOST_POINTS:
            raise _wrong("points", f"{len(names)} points", f"1 to {_MOST_POINTS}")
        for point in self.points:
            for what, indices in (("points", point.at), ("previous", point.previous or point.at)):
                if len(indices) != self.dimensions or self.dimensions not in (2, 3):
                    raise _wrong(f"{what}.{point.name}", list(indices), "two or three indices, as in all points")
        for name in (*(n for pair in self.pairs for n in pair), *(self.velocities or ()), *filter(None, [self.goal])):
            if name not in names:
                raise _wrong("points", f"no point {name!r}", f"one of {', '.join(names)}")
        if len(set(names)) != len(names):
            raise _wrong("points", ", ".join(names), "names that differ")
        for uses in (self._observed(), self._acted()):
            first: dict[int, str] = {}
            for name, index in uses:
                if index < 0 or index in first:
                    found = f"index {index}" + (f", as in {first[index]}" if index in first else "")
                    raise _wrong(name, found, "indices from 0 on, each used once")
                first[index] = name
        if self.move and len(self.move) != self.dimensions:
            raise _wrong("action.move", list(self.move), f"{self.dimensions} indices, one for each coordinate")
        if self.up is not None and not 0 <= self.up < self.dimensions == _UPRIGHT:
            raise _wrong("up", self.up, "0, 1 or 2 of points with three coordinates")
        if self.pivot and len(self.pivot) != self.dimensions:
            raise _wrong("pivot", list(self.pivot), f"{self.dimensions} coordinates")
        if not 0 < self.unit < float("inf"):
            raise _wrong("unit", self.unit, "metres, above 0")

    @property
    def dimensions(self) -> int:
        """D, coordinates of a point."""
        return len(self.points[0].at)

    @property
    def body(self) -> Point:
        """The point that actions move."""
        return self.points[0]

    @property
    def differences(self) -> tuple[tuple[str, str], ...]:
        """The pairs whose difference is a feature: `pairs`, or all, those with the body first."""
        names = [point.name for point in self.points]
        every = tuple((a, b) for place, a in enumerate(names) for b in names[place + 1 :])
        return self.pairs or every

    @property
    def moving(self) -> tuple[Point, ...]:
        """The points whose velocity is a feature, as far as their previous position is known."""
        return tuple(point for point in self._chosen if point.previous)

    @property
    def _chosen(self) -> tuple[Point, ...]:
        return self.points if self.velocities is None else tuple(self.point(name) for name in self.velocities)

    def completed(self, state_dim: int) -> tuple[Layout, tuple[int, ...]]:
        """The layout of observations of S numbers to which remembered positions are appended, and which those are.

        They are the previous positions that velocities need and that the observations do not carry: indices into them.
        """
        remembered: list[int] = []
        points = []
        for point in self.points:
            if point in self._chosen and not point.previous:
                start = state_dim + len(remembered)
                remembered += point.at
                point = replace(point, previous=tuple(range(start, start + len(point.at))))
            points.append(point)
        return replace(self, points=tuple(points)), tuple(remembered)

    @property
    def horizontal(self) -> tuple[int, ...]:
        """The two axes that a rotation about the vertical turns; none for points in space without a vertical axis."""
        axes = tuple(axis for axis in range(self.dimensions) if axis != self.up)
        return axes if len(axes) == 2 else ()

    @property
    def rotatable(self) -> bool:
        """Whether scenes can be rotated and mirrored: where it is known what is horizontal, and how actions move."""
        return bool(self.horizontal and self.move)

    @property
    def trackable(self) -> bool:
        """Whether demonstrations can be tracked: there is a goal, and it is known how actions move the body."""
        return bool(self.goal is not None and len(self.points) > 1 and self.move)

    def point(self, name: str) -> Point:
        """The point of this name. Raises InputError where there is none."""
        for point in self.points:
            if point.name == name:
                return point
        raise _wrong("points", name, ", ".join(point.name for point in self.points))

    def check(self, state_dim: int, action_dim: int) -> None:
        """Raise `InputError` for indices beyond observations of S and actions of A numbers."""
        for what, uses, width in (
            ("observations", self._observed(), state_dim),
            ("actions", self._acted(), action_dim),
        ):
            for name, index in uses:
                if index >= width:
                    raise _wrong(name, f"index {index}", f"0 to {width - 1}, for {what} of {width} numbers")

    def _observed(self) -> list[tuple[str, int]]:
        """Each index of observations, with the name of what has it."""
        named = [(f"points.{point.name}", point.at) for point in self.points]
        named += [(f"previous.{point.name}", point.previous) for point in self.points]
        return [(name, i) for name, at in [*named, ("gripper", self.gripper), ("scalars", self.scalars)] for i in at]

    def _acted(self) -> list[tuple[str, int]]:
        return [(name, i) for name, at in (("action.move", self.move), ("action.gripper", self.grip)) for i in at]


def _wrong(field: str, found: object, expected: object) -> InputError:
    return InputError("wrong layout of observations and actions", field=field, found=found, expected=expected)


def columns_of(indices: tuple[int, ...]) -> list[int] | slice:
    """Indices as what picks columns; neighbours as a slice, which makes no copy."""
    if indices and indices == tuple(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[-1] + 1)
    return list(indices)
