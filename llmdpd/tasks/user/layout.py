"""The table [suite.layout] of a task file: what the numbers of observations and actions are.

    [suite.layout]
    points = { hand = [0, 1, 2], cube = [3, 4, 5], goal = [10, 11, 12] }   # positions in one frame; all zeros: absent
    body = "hand"                          # the point that actions move; by default the first
    goal = "goal"                          # the point that something is to be brought to, where observations show it
    gripper = [9]                          # how far it is open
    scalars = [13]                         # numbers that say nothing of places or directions
    previous = { hand = [20, 21, 22] }     # the same point one step before, where observations carry it
    action = { move = [0, 1, 2], gripper = [3] }
    up = "z"                               # the vertical axis
    unit = 1.0                             # metres of one unit
    pivot = [0.0, 0.6, 0.0]                # what scenes are rotated about; by default the origin
    velocities = ["hand"]                  # points whose velocity is read; by default all, and remembered where needed

Indices are those of the numbers after Dict observations were put together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmdpd.errors import InputError, located, nearest_names
from llmdpd.tasks.layout import Layout, Point

_KEYS = ("points", "body", "goal", "gripper", "scalars", "previous", "action", "up", "unit", "pivot", "velocities")
_ACTION_KEYS = ("move", "gripper")
_AXES = ("x", "y", "z")
_LONG = 100


def read_layout(table: Mapping[str, Any]) -> Layout:
    """The layout that a table says, whose fields are named by `layout.KEY` in errors.

    Raises:
        InputError: an unknown key (the nearest are offered), a value of another type, and as `Layout`.
    """
    with located(field="layout"):
        _check_keys(table, _KEYS)
        action = _mapping(table, "action")
        with located(field="action"):
            _check_keys(action, _ACTION_KEYS)
            move, grip = _indices(action, "move"), _indices(action, "gripper")
        return Layout(
            points=_points(table),
            goal=_known(table, "goal", _mapping(table, "points")),
            gripper=_indices(table, "gripper"),
            scalars=_indices(table, "scalars"),
            move=move,
            grip=grip,
            up=None if (up := _known(table, "up", _AXES)) is None else _AXES.index(up),
            unit=_number(table["unit"], "unit") if "unit" in table else 1.0,
            pivot=tuple(_number(value, "pivot") for value in _list(table, "pivot")),
            velocities=tuple(map(str, _list(table, "velocities"))) if "velocities" in table else None,
        )


def _points(table: Mapping[str, Any]) -> tuple[Point, ...]:
    """The points, the body first."""
    places, before = _mapping(table, "points"), _mapping(table, "previous")
    if not places:
        raise InputError("a layout without points", field="points", found="none", expected="{ hand = [0, 1, 2], … }")
    for name in before:
        _known({"previous": name}, "previous", places)
    with located(field="points"):
        at = {name: _indices(places, name) for name in places}
    with located(field="previous"):
        earlier = {name: _indices(before, name) for name in before}
    body = _known(table, "body", places) or next(iter(places))
    names = [body, *(name for name in places if name != body)]
    return tuple(Point(name, at[name], earlier.get(name, ())) for name in names)


def _known(table: Mapping[str, Any], key: str, names: Any) -> str | None:
    """The value of a key that is one of some names; None where it is left out."""
    if key not in table:
        return None
    value = table[key]
    if not isinstance(value, str) or value not in names:
        hint = f"nearest: {nearest_names(value, names)}" if isinstance(value, str) else None
        raise InputError(
            "no such name", field=key, found=shown(value), expected=f"one of {', '.join(names)}", hint=hint
        )
    return value


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            expected, hint = f"one of {', '.join(known)}", f"nearest: {nearest_names(key, known)}"
            raise InputError("unknown key in the task file", field=key, expected=expected, hint=hint)


def _mapping(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise InputError("names with their values are expected here", field=key, found=shown(value), expected="{ … }")
    return value


def _list(table: Mapping[str, Any], key: str) -> list[Any]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise InputError("a list is expected here", field=key, found=shown(value), expected="[…]")
    return value


def _indices(table: Mapping[str, Any], key: str) -> tuple[int, ...]:
    values = _list(table, key)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError("not an index", field=key, found=shown(value), expected="whole numbers from 0 on")
    return tuple(values)


def _number(value: Any, key: str) -> float:
    number = finite(value)
    if number is None:
        raise InputError("not a number", field=key, found=shown(value), expected="a finite number")
    return number


def finite(value: Any) -> float | None:
    """A number of a task file, which may be an integer of any size; None for what is not a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def shown(value: Any) -> str:
    """A value of a task file in a message, cut where it is long."""
    try:
        whole = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} of too many digits"
    return whole if len(whole) <= _LONG else f"{whole[:_LONG]}…"
