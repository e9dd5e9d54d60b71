"""Meta-World tasks as small, reproducible environments with their scripted experts.

This module works around several traps of metaworld 3.x: `reset(seed=)` is ignored, the goal is sampled from a generator
that is only used when `seeded_rand_vec` is set, and the cached observation space clips the goal to zero if it was
computed while the goal was hidden.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from llmdpd.tasks.metaworld.layout import ACTION_DIM, GOAL, STATE_DIM
from llmdpd.tasks.metaworld.names import check_task
from llmdpd.utils.extras import extra

with extra("metaworld"):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

CAMERA = "corner4"
FRAME_WIDTH, FRAME_HEIGHT = 320, 240

FloatArray = npt.NDArray[np.float32]


class MetaWorldTask:
    """One Meta-World task: 39 observations, 4 actions in [-1, 1], 500 steps, a new goal for every seed.

    A roll-out is bit-identical for a seed and a sequence of actions, on a fresh and on a used environment.

    Args:
        task: any spelling that `check_task` accepts.
        goal_visible: whether obs[36:39] holds the goal (as in MT1 … MT50) or zeros (as in ML1 … ML45).
        render: whether `render()` will be called; it needs an off-screen renderer (see `simulation.render`).

    Raises:
        InputError: the task is unknown.
    """

    state_dim, action_dim = STATE_DIM, ACTION_DIM

    def __init__(self, task: str, *, goal_visible: bool = True, render: bool = False) -> None:
        self.task = check_task(task)
        self.goal_visible = goal_visible
        size = {"width": FRAME_WIDTH, "height": FRAME_HEIGHT}
        options: dict[str, Any] = {"render_mode": "rgb_array", "camera_name": CAMERA, **size} if render else {}
        self._env = ALL_V3_ENVIRONMENTS[self.task](**options)
        self._env._partially_observable = not goal_visible
        # The space was cached while the goal was hidden, and `step` clips every observation to it.
        self._env.__dict__.pop("sawyer_observation_space", None)
        self._env.observation_space = self._env.sawyer_observation_space
        # A goal sampled at every reset from the environment's own generator, instead of one frozen by `set_task`.
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env._set_task_called = True
        self._expert: Any = ENV_POLICY_MAP[self.task]()  # type: ignore[abstract]
        self._started = False

    @property
    def max_steps(self) -> int:
        """Steps after which an episode is truncated."""
        return int(self._env.max_path_length)

    def reset(self, seed: int) -> FloatArray:
        """Start the episode of `seed`: start and goal depend only on the seed. Returns obs f32 [39]."""
        self._env.seed(int(seed))
        # MuJoCo's instabilities set this flag for good; an episode must not inherit it from the one before.
        self._env._did_see_sim_exception = False
        self._started = True
        return np.asarray(self._env.reset()[0], np.float32)

    def step(self, action: npt.ArrayLike) -> tuple[FloatArray, float, bool, bool]:
        """Execute `action` [4], clipped to [-1, 1].

        Returns:
            obs f32 [39], reward (0 … 10), whether the success flag is up in this step, whether the episode is over
            (here always the time limit: Meta-World has no terminal states).

        Raises:
            RuntimeError: no `reset` before, or the episode is over.
        """
        if not self._started:
            raise RuntimeError(f"{self.task}: reset(seed) comes before step()")
        if self._env.curr_path_length >= self._env.max_path_length:
            raise RuntimeError(f"{self.task}: the episode is over; reset(seed) comes before the next step()")
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        observation, reward, _, truncated, info = self._env.step(action)
        return np.asarray(observation, np.float32), float(reward), bool(info["success"]), bool(truncated)

    def expert_action(self, observation: npt.ArrayLike) -> FloatArray:
        """The scripted expert's action f32 [4] in `observation` [39], clipped to [-1, 1].

        The experts read the goal from obs[36:39]; where it is hidden, they get this episode's.
        """
        full = np.array(observation, np.float64)
        if not self.goal_visible:
            full[GOAL] = np.asarray(self.goal(), np.float32)
        with warnings.catch_warnings():
            # "Constant(s) may be too high": the experts' proportional gains exceed the bound by design; clipped below.
            warnings.simplefilter("ignore", UserWarning)
            action = self._expert.get_action(full)
        return np.clip(np.asarray(action, np.float32), -1.0, 1.0)

    def goal(self) -> npt.NDArray[np.float64]:
        """Where this episode's goal is, in metres: f64 [3], also where the observations hide it."""
        return np.asarray(self._env._get_pos_goal(), np.float64)

    def render(self) -> npt.NDArray[np.uint8]:
        """The present state as an upright picture, uint8 [240, 320, 3]; needs `render=True` at construction."""
        # Gymnasium makes a renderer's GL context current when it is made and never again: with several environments in
        # a process, each would render with the meshes of the one that was made last.
        viewer = self._env.mujoco_renderer.viewer
        if viewer is not None:
            viewer.make_context_current()
        # metaworld's corner cameras hang upside-down: half a turn (a flip would mirror the scene).
        return np.ascontiguousarray(np.asarray(self._env.render(), np.uint8)[::-1, ::-1])

    def close(self) -> None:
        """Free the renderer, if there is one."""
        self._env.close()


def make_task(task: str, *, goal_visible: bool = True, render: bool = False) -> MetaWorldTask:
    """A `MetaWorldTask`; takes 0.1 to 0.3 s and 25 to 55 MB."""
    return MetaWorldTask(task, goal_visible=goal_visible, render=render)
