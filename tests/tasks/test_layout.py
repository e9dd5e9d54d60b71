"""Layouts that fit and layouts that are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.layout import Layout, Point
from llmdpd.tasks.metaworld.layout import LAYOUT
from llmdpd.utils.plain import from_plain, to_plain

HAND, CUBE, GOAL = Point("hand", (0, 1, 2), (9, 10, 11)), Point("cube", (3, 4, 5)), Point("goal", (6, 7, 8))
THREE = Layout((HAND, CUBE, GOAL), goal="goal", move=(0, 1, 2), grip=(3,), up=2)


def test_what_follows_from_the_points() -> None:
    assert THREE.differences == (("hand", "cube"), ("hand", "goal"), ("cube", "goal"))
    assert (THREE.body, THREE.moving, THREE.horizontal, THREE.rotatable) == (HAND, (HAND,), (0, 1), True)
    assert dataclasses.replace(THREE, up=0).horizontal == (1, 2)
    assert not dataclasses.replace(THREE, up=None).rotatable
    assert not dataclasses.replace(THREE, move=()).rotatable
    plane = Layout((Point("a", (0, 1)), Point("b", (2, 3))), move=(0, 1))
    assert (plane.dimensions, plane.horizontal, plane.rotatable) == (2, (0, 1), True)


@pytest.mark.parametrize("layout", [THREE, LAYOUT])
def test_a_layout_is_kept_as_json(layout: Layout) -> None:
    assert from_plain(Layout, to_plain(layout), "policy.json") == layout


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"points": ()}, "points"),
        ({"points": (HAND, Point("cube", (3, 4)))}, "points.cube"),
        ({"points": (Point("hand", (0,)),), "goal": None, "move": ()}, "points.hand"),
        ({"points": (HAND, Point("cube", (3, 4, 5), (6,)), GOAL)}, "previous.cube"),
        ({"points": (HAND, CUBE, GOAL, CUBE)}, "points"),
        ({"goal": "gaol"}, "points"),
        ({"pairs": (("hand", "cup"),)}, "points"),
        ({"velocities": ("cup",)}, "points"),
        ({"gripper": (5,)}, "gripper"),
        ({"scalars": (-1,)}, "scalars"),
        ({"grip": (2,)}, "action.gripper"),
        ({"move": (0, 1)}, "action.move"),
        ({"up": 3}, "up"),
        ({"pivot": (0.0,)}, "pivot"),
        ({"unit": 0.0}, "unit"),
    ],
)
def test_a_layout_that_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match="wrong layout") as error:
        dataclasses.replace(THREE, **changes)
    assert error.value.field == field


@pytest.mark.parametrize(("state_dim", "action_dim", "field"), [(11, 4, "previous.hand"), (12, 3, "action.gripper")])
def test_indices_beyond_the_numbers(state_dim: int, action_dim: int, field: str) -> None:
    THREE.check(12, 4)
    with pytest.raises(InputError) as error:
        THREE.check(state_dim, action_dim)
    assert error.value.field == field


def test_previous_positions_that_are_not_carried_are_remembered() -> None:
    layout, remembered = THREE.completed(12)
    assert remembered == (3, 4, 5, 6, 7, 8)
    assert [point.previous for point in layout.points] == [(9, 10, 11), (12, 13, 14), (15, 16, 17)]
    assert layout.moving == layout.points
    layout.check(18, 4)
    one, remembered = dataclasses.replace(THREE, velocities=("hand", "goal")).completed(12)
    assert (remembered, one.points[1].previous, one.points[2].previous) == ((6, 7, 8), (), (12, 13, 14))
    assert dataclasses.replace(THREE, velocities=()).completed(12) == (dataclasses.replace(THREE, velocities=()), ())
    assert LAYOUT.completed(39) == (LAYOUT, ())
