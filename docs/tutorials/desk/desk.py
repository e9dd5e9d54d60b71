"""A simulated desk with a hand, a cup and a plate: a Gymnasium environment with eight tasks."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box

CUP, PLATE, OPEN, CLOSED = slice(3, 5), slice(5, 7), 0.0, 1.0
# The places that the hand goes through: at which thing, how far beside it, the gripper there.
PICK = [(CUP, (0, 0), OPEN), (CUP, (0, 0), CLOSED)]
TASKS = {
    "touch-cup": ("Touch the cup.", [(CUP, (0, 0), OPEN)]),
    "touch-plate": ("Touch the plate.", [(PLATE, (0, 0), OPEN)]),
    "point-at-cup": ("Hold the hand behind the cup.", [(CUP, (0, 0.1), OPEN)]),
    "serve": ("Put the cup on the plate.", [*PICK, (PLATE, (0, 0), CLOSED)]),
    "set-left": ("Put the cup left of the plate.", [*PICK, (PLATE, (-0.15, 0), CLOSED)]),
    "set-behind": ("Put the cup behind the plate.", [*PICK, (PLATE, (0, 0.15), CLOSED)]),
    "set-right": ("Put the cup right of the plate.", [*PICK, (PLATE, (0.15, 0), CLOSED)]),
    "point-at-plate": ("Hold the hand in front of the plate.", [(PLATE, (0, -0.1), OPEN)]),
}


class Desk(gymnasium.Env):
    """Numbers: hand (2), gripper, cup (2), plate (2), in metres. Actions: the hand's way, the gripper."""

    observation_space = Box(-1.0, 1.0, (7,), np.float64)
    action_space = Box(-1.0, 1.0, (3,), np.float32)

    def __init__(self, task, render_mode=None):
        self.places = TASKS[task][1]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        draw = self.np_random.uniform(-0.3, 0.3, 6)
        self.state, self.reached = np.insert(draw, 2, OPEN), 0
        return self.state.copy(), {"success": False}

    def target(self):
        thing, beside, gripper = self.places[self.reached]
        return self.state[thing] + beside, gripper

    def step(self, action):
        hand = self.state[:2]
        holds = self.state[2] == CLOSED and np.linalg.norm(hand - self.state[CUP]) < 0.03
        hand += 0.03 * np.clip(action[:2], -1, 1)
        if holds:
            self.state[CUP] = hand
        self.state[2] = CLOSED if action[2] > 0 else OPEN
        place, gripper = self.target()
        there = np.linalg.norm(hand - place) < 0.02 and self.state[2] == gripper
        success = bool(there and self.reached == len(self.places) - 1)
        self.reached += bool(there and not success)
        return self.state.copy(), float(success), False, False, {"success": success}

    def expert(self):
        place, gripper = self.target()
        move = np.clip((place - self.state[:2]) / 0.03, -1, 1)
        return np.append(move, 1 if gripper else -1).astype(np.float32)
