"""The layout of Meta-World's observations of 39 numbers: two frames of 18, the current one first, then the goal.

A frame is the hand's position (3), the gripper's opening (1, from closed at 0 to open at 1), and each of two objects'
position (3) and orientation (4). What a task doesn't have is zeros. Positions are in metres.
"""

from llmdpd.tasks.layout import Layout, Point

STATE_DIM = 39
ACTION_DIM = 4
"""Of actions: the hand's movement (3) and the gripper's command, all within ±1."""
FRAME = 18
"""Numbers of a frame: index FRAME + i holds the value that index i had one step before."""
HAND, GRIPPER, OBJECT, SECOND = slice(0, 3), slice(3, 4), slice(4, 7), slice(11, 14)
GOAL = slice(36, 39)


def previous(part: slice) -> slice:
    """The same part of the previous frame."""
    return slice(part.start + FRAME, part.stop + FRAME)


def _indices(part: slice) -> tuple[int, ...]:
    return tuple(range(part.start, part.stop))


LAYOUT = Layout(
    points=(
        Point("hand", _indices(HAND), _indices(previous(HAND))),
        Point("object", _indices(OBJECT), _indices(previous(OBJECT))),
        Point("second", _indices(SECOND), _indices(previous(SECOND))),
        Point("goal", _indices(GOAL)),
    ),
    goal="goal",
    gripper=_indices(GRIPPER),
    move=(0, 1, 2),
    grip=(3,),
    up=2,
    pivot=(0.0, 0.6, 0.0),  # the table's middle: rotated about it, places stay on the table
    pairs=(("hand", "object"), ("hand", "second"), ("hand", "goal"), ("object", "goal"), ("object", "second")),
    velocities=("hand", "object"),
)
"""What every suite declares of its numbers, of Meta-World's."""
