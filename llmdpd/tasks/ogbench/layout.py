"""The layout of the scene's observations and actions.

The first 40 numbers are OGBench's own, of whose positions 1 is 10 cm, measured from (0.425, 0, 0). The suite adds where
the things are that OGBench gives as states alone, in the same frame, and how the cube is turned from the hand.
"""

from __future__ import annotations

from llmdpd.tasks.layout import Layout, Point

ACTION_DIM = 5
"""Of actions: the hand's movement (3), its turn, the gripper's closing, all within ±1."""
OGBENCH_DIM = 40
STATE_DIM = 56
CENTRE = (0.425, 0.0, 0.0)
SCALE = 10.0

LAYOUT = Layout(
    points=(
        Point("hand", (12, 13, 14)),
        Point("cube", (19, 20, 21)),
        Point("right button", (40, 41, 42)),
        Point("left button", (43, 44, 45)),
        Point("drawer handle", (46, 47, 48)),
        Point("window handle", (49, 50, 51)),
    ),
    gripper=(17,),
    # Contact of the fingers; whether the buttons are on; the cube's turn and the hand's own, up to their symmetries.
    scalars=(18, 29, 33, 52, 53, 54, 55),
    move=(0, 1, 2),
    grip=(4,),
    up=2,
    unit=1.0 / SCALE,
    velocities=(),  # everything here moves slowly, and the hand's own velocity is not needed to know what is next
    pairs=(
        ("hand", "cube"),
        ("hand", "right button"),
        ("hand", "left button"),
        ("hand", "drawer handle"),
        ("hand", "window handle"),
        ("cube", "right button"),
        ("right button", "drawer handle"),
        ("left button", "window handle"),
    ),
)
