"""The scene's tasks: what is to be done, with which thing. Imports no simulator.

Lengths are metres in OGBench's frame: x away from the robot, y to its left, z up. The drawer is on the right, the
window on the left, both buttons at the far end; the table lies between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Thing = Literal["cube", "button", "drawer", "window"]

_ROWS = {"near": 0.30, "middle": 0.375, "far": 0.45}
_COLUMNS = {"right": -0.06, "centre": 0.035, "left": 0.13}
_CUBE_HEIGHT = 0.02
_DRAWER_OPEN, _DRAWER_CLOSED = -0.16, 0.0
_WINDOW_OPEN, _WINDOW_CLOSED = 0.2, 0.0
IN_DRAWER = (0.33, -0.24, 0.066)
"""The middle of the open drawer."""


@dataclass(frozen=True)
class SceneTask:
    """One thing to do in the scene.

    Args:
        thing: what is manipulated, as OGBench's own `privileged/target_task`.
        objective: the objective, in words.
        place: of the cube, where it is to be [3].
        number: of a button, which.
        slide: of drawer and window, the position of their joint that is to be reached.
    """

    thing: Thing
    objective: str
    place: tuple[float, float, float] | None = None
    number: int = 0
    slide: float = 0.0


def _cube_tasks() -> dict[str, SceneTask]:
    places = {
        f"scene-cube-{row}-{column}": SceneTask(
            "cube",
            f"grasp the cube and place it in the {row} row on the table, "
            + ("in the middle of the row" if column == "centre" else f"at its {column} end"),
            (x, y, _CUBE_HEIGHT),
        )
        for row, x in _ROWS.items()
        for column, y in _COLUMNS.items()
    }
    return {
        **places,
        "scene-cube-drawer": SceneTask("cube", "grasp the cube and place it in the open drawer", IN_DRAWER),
    }


TASKS: Mapping[str, SceneTask] = {
    **_cube_tasks(),
    "scene-button-right": SceneTask("button", "press the right button", number=0),
    "scene-button-left": SceneTask("button", "press the left button", number=1),
    "scene-drawer-open": SceneTask("drawer", "pull the drawer open by its handle", slide=_DRAWER_OPEN),
    "scene-drawer-close": SceneTask("drawer", "push the drawer shut by its handle", slide=_DRAWER_CLOSED),
    "scene-window-open": SceneTask("window", "slide the window open by its handle", slide=_WINDOW_OPEN),
    "scene-window-close": SceneTask("window", "slide the window shut by its handle", slide=_WINDOW_CLOSED),
}
"""The tasks by name."""

UNSEEN = ("scene-cube-middle-centre", "scene-cube-near-left", "scene-button-left", "scene-window-close")
"""Held out: two places of the cube, a button that nothing else touches, and a direction of the window."""

SEEN = tuple(task for task in TASKS if task not in UNSEEN)

DESIGN = ("scene-cube-far-centre", "scene-drawer-close")
"""The seen tasks that designs are chosen on, held out like the unseen ones."""

_SUCCESS = {
    "cube": "the cube's centre is within 4 cm of its place",
    "button": "the button was pressed and has changed its colour",
    "drawer": "the drawer is within 4 cm of its end",
    "window": "the window is within 4 cm of its end",
}
_OBSERVATIONS = (
    "56 numbers: arm joints and their speeds; hand position, turn, gripper opening and contact; cube position and "
    "turn; buttons; drawer; window; positions of buttons and handles; turn of the cube from the hand's."
)
_ACTIONS = "5 numbers in [-1, 1]: hand motion in x (away), y (left), z (up), turn of the hand, closing of the gripper."


def describe(name: str) -> str:
    """The text prompt of a task, rendered."""
    task = TASKS[name]
    return "\n".join(
        [
            f"Task: OGBench {name.replace('-', ' ')}.",
            f"Objective: {task.objective}.",
            "Constraints: Randomize arm, cube, drawer and window; the other things stay as they are.",
            "Objects: a cube on a table; a drawer on the right; a window on the left; two buttons at the far end.",
            f"Success: {_SUCCESS[task.thing]}.",
            f"Actions: {_ACTIONS}",
            f"Observations: {_OBSERVATIONS}",
        ]
    )
