"""The tasks: what is to be done, with which thing. Imports no simulator.

Lengths are metres in OGBench's frame: x away from the robot, y to its left, z up. In the scene the drawer is on the
right, the window on the left, both buttons at the far end; the table lies between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmdpd.tasks.base import Split
from llmdpd.tasks.ogbench.layout import COLUMNS, ROWS, SPACES, Kind

Thing = Literal["cube", "button", "drawer", "window"]

MAX_STEPS = 200

# Where rows are along x and columns along y; in the scene within reach beside the window's handle.
_SCENE_PLACES = (0.30, 0.375, 0.45), (-0.06, 0.035, 0.13)
_TABLE_PLACES = (0.325, 0.425, 0.525), (-0.15, 0.0, 0.15)
_CUBE_HEIGHT = 0.02
_DRAWER_OPEN, _DRAWER_CLOSED = -0.16, 0.0
_WINDOW_OPEN, _WINDOW_CLOSED = 0.2, 0.0
IN_DRAWER = (0.33, -0.24, 0.066)
"""The middle of the open drawer."""


@dataclass(frozen=True)
class Manipulation:
    """One thing to do.

    Args:
        kind: the kind of the task, which decides the environment and its spaces.
        thing: what is manipulated, as OGBench's own `privileged/target_task`.
        objective: the objective, in words.
        number: of cubes and buttons, which.
        place: of a cube, where it is to be [3].
        slide: of drawer and window, the position of their joint that is to be reached.
    """

    kind: Kind
    thing: Thing
    objective: str
    number: int = 0
    place: tuple[float, float, float] | None = None
    slide: float = 0.0


def _places(
    kind: Kind, prefix: str, number: int, places: tuple[tuple[float, ...], tuple[float, ...]]
) -> dict[str, Manipulation]:
    """The tasks of moving one cube to one of nine places."""
    cube = SPACES[kind].cubes[number]
    return {
        f"{prefix}-{row}-{column}": Manipulation(
            *(kind, "cube"),
            f"grasp the {cube} and place it in the {row} row on the table, "
            + ("in the middle of the row" if column == "centre" else f"at its {column} end"),
            *(number, (x, y, _CUBE_HEIGHT)),
        )
        for row, x in zip(ROWS, places[0], strict=True)
        for column, y in zip(COLUMNS, places[1], strict=True)
    }


def _slide(thing: Thing, objective: str, slide: float) -> Manipulation:
    return Manipulation("scene", thing, objective, slide=slide)


_SCENE_TASKS = {
    **_places("scene", "scene-cube", 0, _SCENE_PLACES),
    "scene-cube-drawer": Manipulation(
        "scene", "cube", "grasp the cube and place it in the open drawer", place=IN_DRAWER
    ),
    "scene-button-right": Manipulation("scene", "button", "press the right button", 0),
    "scene-button-left": Manipulation("scene", "button", "press the left button", 1),
    "scene-drawer-open": _slide("drawer", "pull the drawer open by its handle", _DRAWER_OPEN),
    "scene-drawer-close": _slide("drawer", "push the drawer shut by its handle", _DRAWER_CLOSED),
    "scene-window-open": _slide("window", "slide the window open by its handle", _WINDOW_OPEN),
    "scene-window-close": _slide("window", "slide the window shut by its handle", _WINDOW_CLOSED),
}

TASKS: Mapping[str, Manipulation] = {
    **_SCENE_TASKS,
    **_places("cube-single", "cube-single", 0, _TABLE_PLACES),
    **_places("cube-double", "cube-double-red", 0, _TABLE_PLACES),
    **_places("cube-double", "cube-double-blue", 1, _TABLE_PLACES),
    **{
        f"puzzle-3x3-{button.removesuffix(' button').replace(' ', '-')}": Manipulation(
            "puzzle-3x3", "button", f"press the {button}", number
        )
        for number, button in enumerate(SPACES["puzzle-3x3"].buttons)
    },
}
"""The tasks by name."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(task for task, own in TASKS.items() if own.kind == kind)
    for group, kind in {
        "ogbench-scene": "scene",
        "ogbench-cube": "cube-single",
        "ogbench-cube-double": "cube-double",
        "ogbench-puzzle": "puzzle-3x3",
    }.items()
}
"""The tasks of each kind."""

_UNSEEN = {
    # Two places of the cube, a button that nothing else touches, and a direction of the window.
    "ogbench-scene": ("scene-cube-middle-centre", "scene-cube-near-left", "scene-button-left", "scene-window-close"),
    "ogbench-cube": ("cube-single-middle-centre", "cube-single-near-left"),
    # Of each cube, places at which the other one is seen.
    "ogbench-cube-double": (
        *("cube-double-red-middle-centre", "cube-double-red-near-left"),
        *("cube-double-blue-middle-left", "cube-double-blue-far-right"),
    ),
    # One of each row and of each column.
    "ogbench-puzzle": ("puzzle-3x3-near-left", "puzzle-3x3-middle-right", "puzzle-3x3-far-centre"),
}

DESIGN = ("scene-cube-far-centre", "scene-drawer-close")
"""The scene's seen tasks that designs are chosen on, held out like the unseen ones."""


def _without(tasks: tuple[str, ...], held_out: tuple[str, ...]) -> Split:
    return tuple(task for task in tasks if task not in held_out), held_out


_SPLITS = {group: _without(tasks, _UNSEEN[group]) for group, tasks in GROUPS.items()}

PROTOCOLS: Mapping[str, Split] = {
    "ogbench-scene": _SPLITS["ogbench-scene"],
    # Without its unseen tasks: for choosing a design.
    "ogbench-scene-design": _without(_SPLITS["ogbench-scene"][0], DESIGN),
    **_SPLITS,
}
"""Seen and unseen tasks, by name."""

_SUCCESS = {
    "cube": "the cube's centre is within 4 cm of its place",
    "button": "the button was pressed and has changed its colour",
    "drawer": "the drawer is within 4 cm of its end",
    "window": "the window is within 4 cm of its end",
}
_PRESSED_ALONE = "the button and its neighbours have changed their colours, all others have not"
_ACTIONS = "5 numbers in [-1, 1]: hand motion in x (away), y (left), z (up), turn of the hand, closing of the gripper."
_ARM_OBSERVED = "arm joints and their speeds; hand position, turn, gripper opening and contact"


@dataclass(frozen=True)
class _Words:
    """What the text prompts of a kind say besides the objective."""

    constraints: str
    objects: str
    observed: str


_WORDS: Mapping[Kind, _Words] = {
    "scene": _Words(
        "Randomize arm, cube, drawer and window; the other things stay as they are",
        "a cube on a table; a drawer on the right; a window on the left; two buttons at the far end",
        "cube position and turn; buttons; drawer; window; positions of buttons and handles; turn of the cube from the "
        "hand's",
    ),
    "cube-single": _Words(
        "Randomize arm and cube", "a cube on a table", "cube position and turn; turn of the cube from the hand's"
    ),
    "cube-double": _Words(
        "Randomize arm and cubes; the other cube stays where it is",
        "a red and a blue cube on a table",
        "positions and turns of the red and the blue cube; turns of the cubes from the hand's",
    ),
    "puzzle-3x3": _Words(
        "Randomize arm and colours; a button that is pressed changes its colour and those of its neighbours",
        "nine buttons in three rows, near, middle and far, each with a right, a centre and a left one",
        "buttons; positions of buttons; turn of the hand",
    ),
}


def describe(name: str) -> str:
    """The text prompt of a task, rendered."""
    task = TASKS[name]
    words, space = _WORDS[task.kind], SPACES[task.kind]
    success = _PRESSED_ALONE if task.kind == "puzzle-3x3" else _SUCCESS[task.thing]
    return "\n".join(
        [
            f"Task: OGBench {name.replace('-', ' ')}.",
            f"Objective: {task.objective}.",
            f"Constraints: {words.constraints}.",
            f"Objects: {words.objects}.",
            f"Success: {success}.",
            f"Actions: {_ACTIONS}",
            f"Observations: {space.state_dim} numbers: {_ARM_OBSERVED}; {words.observed}.",
        ]
    )
