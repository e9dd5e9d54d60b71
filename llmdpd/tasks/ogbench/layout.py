"""The kinds of tasks, and the layout of each kind's observations and actions.

An observation begins with OGBench's own numbers, of whose positions 1 is 10 cm, measured from (0.425, 0, 0): the arm,
each cube, each button, each handle. The suite adds where the things are that OGBench gives as states alone, in the same
frame, how each cube is turned from the hand, and how the hand is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmdpd.tasks.layout import Layout, Point

Kind = Literal["scene", "cube-single", "cube-double", "puzzle-3x3"]

ACTION_DIM = 5
"""Of actions: the hand's movement (3), its turn, the gripper's closing, all within ±1."""
CENTRE = (0.425, 0.0, 0.0)
SCALE = 10.0

ROWS, COLUMNS = ("near", "middle", "far"), ("right", "centre", "left")
"""Of the puzzle's buttons, in OGBench's order, and of the cubes' places: x away from the robot, y to its left."""

# How many of OGBench's numbers are the arm's, each cube's, each button's, each handle's.
_ARM, _CUBE, _BUTTON, _HANDLE = 19, 9, 4, 2


@dataclass(frozen=True)
class Space:
    """What the observations of a kind hold.

    Args:
        cubes, buttons, handles: the names of the things, in OGBench's order.
        pairs: of the layout; none: all pairs of points.
    """

    cubes: tuple[str, ...] = ()
    buttons: tuple[str, ...] = ()
    handles: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()

    @property
    def ogbench_dim(self) -> int:
        """How many numbers are OGBench's own."""
        return _ARM + _CUBE * len(self.cubes) + _BUTTON * len(self.buttons) + _HANDLE * len(self.handles)

    @property
    def state_dim(self) -> int:
        """S: OGBench's numbers, the places of buttons and handles, the turns of cubes and hand."""
        return self._turns + 2 * len(self.cubes) + 2

    @property
    def _turns(self) -> int:
        return self.ogbench_dim + 3 * len((*self.buttons, *self.handles))

    @property
    def button_states(self) -> tuple[int, ...]:
        """For each button the index of the number that is 1 where it is on, and 0 otherwise."""
        first = _ARM + _CUBE * len(self.cubes)
        return tuple(first + _BUTTON * number + 1 for number in range(len(self.buttons)))

    @property
    def layout(self) -> Layout:
        """Which numbers are which."""
        starts = {
            "hand": 12,
            **{name: _ARM + _CUBE * number for number, name in enumerate(self.cubes)},
            **{name: self.ogbench_dim + 3 * number for number, name in enumerate((*self.buttons, *self.handles))},
        }
        return Layout(
            points=tuple(Point(name, (start, start + 1, start + 2)) for name, start in starts.items()),
            gripper=(17,),
            # Contact of the fingers; whether the buttons are on; the cubes' and the hand's turns, up to symmetry.
            scalars=(18, *self.button_states, *range(self._turns, self.state_dim)),
            move=(0, 1, 2),
            grip=(4,),
            up=2,
            unit=1.0 / SCALE,
            velocities=(),  # all moves slowly, and the hand's own velocity is not needed to know what is next
            pairs=self.pairs,
        )


_SCENE = ("cube", "right button", "left button", "drawer handle", "window handle")
_PUZZLE = tuple(f"{row} {column} button" for row in ROWS for column in COLUMNS)

SPACES: Mapping[Kind, Space] = {
    "scene": Space(
        cubes=_SCENE[:1],
        buttons=_SCENE[1:3],
        handles=_SCENE[3:],
        pairs=(
            *(("hand", thing) for thing in _SCENE),
            ("cube", "right button"),
            ("right button", "drawer handle"),
            ("left button", "window handle"),
        ),
    ),
    "cube-single": Space(cubes=("cube",)),
    "cube-double": Space(cubes=("red cube", "blue cube")),
    "puzzle-3x3": Space(buttons=_PUZZLE, pairs=tuple(("hand", button) for button in _PUZZLE)),
}
"""What observations hold, by the kind of tasks. The tasks of one run are of one kind."""
