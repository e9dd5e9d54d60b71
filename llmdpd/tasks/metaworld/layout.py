"""The layout of Meta-World's observations of 39 numbers: two frames of 18, the current one first, then the goal.

A frame is the hand's position (3), the gripper's opening (1, from closed at 0 to open at 1), and each of two objects'
position (3) and orientation (4). What a task doesn't have is zeros. Positions are in metres.
"""

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
