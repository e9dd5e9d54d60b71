"""A Meta-World task under an instruction: who judges it, and the expert that follows the instruction."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmdpd.tasks.instructed.instructions import WAIT, canonical, parts
from llmdpd.tasks.metaworld.environment import make_task
from llmdpd.tasks.metaworld.layout import HAND, OBJECT

FloatArray = npt.NDArray[np.float32]

# Metres, and steps of 12.5 ms.
NEAR = 0.12
"""The hand waits no farther from the object."""
STILL = 0.002
"""The hand goes no farther in a step as it waits."""
MOVED = 0.02
"""The object is no farther from its start."""
WAIT_STEPS = 30
"""Steps of waiting, one after the other, that are a success."""
_STOP = 0.1  # where the expert stops: nearer than it has to be
_GAIN = 10.0  # of the expert that holds its place: an action of 1 moves 1 cm
_OPEN = -1.0  # the gripper's command


class WaitJudge:
    """Whether an episode's hand has waited near the object, without the task's being done or the object's moving.

    Args:
        first: the episode's first observation f32 [39].
    """

    def __init__(self, first: FloatArray) -> None:
        self._first = self._last = first
        self._waited = 0
        self._finished = False

    def step(self, observation: FloatArray, finished: bool) -> bool:
        """Judge the next observation f32 [39]; `finished`: whether Meta-World's own success flag is up.

        Returns whether the hand has waited for `WAIT_STEPS` steps up to this one.
        """
        self._finished = self._finished or finished
        way = np.linalg.norm(observation[HAND] - self._last[HAND])
        away = np.linalg.norm(observation[HAND] - observation[OBJECT])
        moved = np.linalg.norm(observation[OBJECT] - self._first[OBJECT])
        waits = way < STILL and away < NEAR and moved < MOVED and not self._finished
        self._waited = self._waited + 1 if waits else 0
        self._last = observation
        return self._waited >= WAIT_STEPS


class InstructedTask:
    """A Meta-World task under an instruction: 39 observations, 4 actions in [-1, 1], 500 steps.

    Episodes of a seed start alike under either instruction, and as Meta-World's own of that seed.

    Args:
        task: a name of the suite, in any spelling.
        goal_visible, render: as of `MetaWorldTask`.

    Raises:
        InputError: the task is unknown.
    """

    def __init__(self, task: str, *, goal_visible: bool = True, render: bool = False) -> None:
        self.task = canonical(task)
        instruction, base = parts(self.task)
        self._waits = instruction == WAIT
        self._base = make_task(base, goal_visible=goal_visible, render=render)
        self._judge: WaitJudge | None = None
        self._place: FloatArray | None = None  # that the waiting expert holds

    def reset(self, seed: int) -> FloatArray:
        """Start the episode of `seed`; returns obs f32 [39]."""
        observation = self._base.reset(seed)
        self._judge = WaitJudge(observation) if self._waits else None
        self._place = None
        return observation

    def step(self, action: npt.ArrayLike) -> tuple[FloatArray, float, bool, bool]:
        """Execute `action` [4], clipped to [-1, 1]: obs f32 [39], reward, success, over.

        To finish has Meta-World's own reward and success; to wait is rewarded with 1 at each step of success, else 0.

        Raises:
            RuntimeError: no `reset` before, or the episode is over.
        """
        observation, reward, success, over = self._base.step(action)
        if self._judge is not None:
            success = self._judge.step(observation, success)
            reward = float(success)
        return observation, reward, success, over

    def expert_action(self, observation: FloatArray) -> FloatArray:
        """The expert's action f32 [4] in `observation` f32 [39], the last of the present episode.

        It is Meta-World's. To wait, it is until the hand is near the object; from there on it holds that place.
        """
        if self._waits and self._place is None:
            away = np.linalg.norm(observation[HAND] - observation[OBJECT])
            self._place = observation[HAND].copy() if away < _STOP else None
        if self._place is None:
            return self._base.expert_action(observation)
        back = np.clip(_GAIN * (self._place - observation[HAND]), -1.0, 1.0)
        return np.append(back, _OPEN).astype(np.float32)

    def render(self) -> npt.NDArray[np.uint8]:
        """The present state as a picture, uint8 [240, 320, 3]; needs `render=True` at construction."""
        return self._base.render()

    def close(self) -> None:
        """Free the renderer, if there is one."""
        self._base.close()
