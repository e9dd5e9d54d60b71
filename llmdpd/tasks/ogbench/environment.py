"""OGBench's scene with one task, as a small, reproducible environment with its scripted expert."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from llmdpd.tasks.base import FloatArray
from llmdpd.tasks.ogbench.layout import ACTION_DIM, CENTRE, SCALE, STATE_DIM
from llmdpd.tasks.ogbench.tasks import IN_DRAWER, TASKS, SceneTask

with warnings.catch_warnings():
    # OGBench imports MuJoCo's viewer, which warns where there is no screen; nothing here needs one.
    warnings.simplefilter("ignore")
    from ogbench.manipspace.envs.scene_env import SceneEnv
    from ogbench.manipspace.lie import SO3
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

MAX_STEPS = 200
FRAME_WIDTH, FRAME_HEIGHT = 320, 240

_ORACLES = {
    "cube": CubeMarkovOracle,
    "button": ButtonMarkovOracle,
    "drawer": DrawerMarkovOracle,
    "window": WindowMarkovOracle,
}
_DRAWER_LENGTH, _WINDOW_LENGTH = 0.16, 0.2
_START = 0.04  # metres from its end, at most, at which a drawer or window starts that is to reach the other
_CLEAR = 0.08  # metres between the cube's start and its place, at least
_LEFTMOST = 0.13  # where the arm can grasp the cube without pushing the window's handle
_HALF_OPEN = 0.08  # a drawer that is open wider stands over the places on the table's right


class _Scene(SceneEnv):  # type: ignore[misc]
    """OGBench's scene, whose start and target are those of a task."""

    def __init__(self, own: SceneTask, **options: Any) -> None:
        self._own = own
        super().__init__(
            env_type="scene", mode="data_collection", terminate_at_goal=False, visualize_info=False, **options
        )

    def set_new_target(self, return_info: bool = True, p_stack: float = 0.5) -> None:
        """Arrange the scene for the task; called by `reset` once everything was placed at random."""
        own, random = self._own, self.np_random
        self._target_task, self._target_block, self._target_button = own.thing, 0, own.number
        drawer, window = random.uniform(-_DRAWER_LENGTH, 0), random.uniform(0, _WINDOW_LENGTH)
        if own.thing == "button":
            self._cur_button_states[own.number] = 0
        elif own.thing == "drawer":
            self._cur_button_states[0] = 1  # unlocked
            drawer = -_DRAWER_LENGTH - own.slide + random.uniform(-_START, _START)
            drawer = float(np.clip(drawer, -_DRAWER_LENGTH, 0))
        elif own.thing == "window":
            self._cur_button_states[1] = 1
            window = float(np.clip(_WINDOW_LENGTH - own.slide + random.uniform(-_START, _START), 0, _WINDOW_LENGTH))
        elif own.place == IN_DRAWER:
            drawer = -_DRAWER_LENGTH
        else:
            drawer = random.uniform(-_HALF_OPEN, 0)
        self._data.joint("drawer_slide").qpos[0] = drawer
        self._data.joint("window_slide").qpos[0] = window
        self._target_button_states[:] = self._cur_button_states
        if own.thing == "button":
            self._target_button_states[own.number] = 1
        self._target_drawer_pos = own.slide if own.thing == "drawer" else 0.0
        self._target_window_pos = own.slide if own.thing == "window" else 0.0
        self._model.site("drawer_handle_center_target").pos[1] = self._target_drawer_pos
        self._model.site("window_handle_center_target").pos[0] = self._target_window_pos
        self._place_cube()
        self._apply_button_states()
        mujoco.mj_kinematics(self._model, self._data)

    def _place_cube(self) -> None:
        """Put the target where the cube is to be, and the cube away from there."""
        cube, target = self._data.joint("object_joint_0").qpos, self._cube_target_mocap_ids[0]
        place = np.array(self._own.place or (0.0, 0.0, -0.3))
        while self._own.place and (np.linalg.norm(cube[:2] - place[:2]) < _CLEAR or cube[1] > _LEFTMOST):
            cube[:2] = self.np_random.uniform(*self._object_sampling_bounds)
        self._data.mocap_pos[target] = place
        yaw = self.np_random.uniform(0, 2 * np.pi)
        self._data.mocap_quat[target] = SO3.from_z_radians(yaw).wxyz


class OGBenchTask:
    """One task of the scene: 56 observations, 5 actions in [-1, 1], 200 steps, a new start for every seed.

    A roll-out is bit-identical for a seed and a sequence of actions, on a fresh and on a used environment.

    Args:
        task: a name in `TASKS`.
        render: whether `render()` will be called; it needs an off-screen renderer (see `simulation.render`).
    """

    state_dim, action_dim, max_steps = STATE_DIM, ACTION_DIM, MAX_STEPS

    def __init__(self, task: str, *, render: bool = False) -> None:
        self.task = task
        size = {"width": FRAME_WIDTH, "height": FRAME_HEIGHT} if render else {}
        self._env = _Scene(TASKS[task], **size)
        self._oracle = _ORACLES[TASKS[task].thing](env=self._env)
        self._steps = MAX_STEPS
        self._info: dict[str, Any] = {}

    def reset(self, seed: int) -> FloatArray:
        """Start the episode of `seed`; returns obs f32 [56]."""
        self._steps = 0
        observation, self._info = self._env.reset(seed=int(seed))
        return self._observation(observation)

    def step(self, action: npt.ArrayLike) -> tuple[FloatArray, float, bool, bool]:
        """Execute `action` [5], clipped to [-1, 1]: obs f32 [56], reward (1 with success), success, over.

        Success is OGBench's own, of the task's thing; an episode is over after 200 steps.

        Raises:
            RuntimeError: no `reset` before, or the episode is over.
        """
        if self._steps >= MAX_STEPS:
            raise RuntimeError(f"{self.task}: reset(seed) comes before step()")
        self._steps += 1
        clipped = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        observation, reward, _, _, self._info = self._env.step(clipped)
        success = bool(self._info["success"])
        return self._observation(observation), float(reward), success, self._steps >= MAX_STEPS

    def start_expert(self, seed: int) -> None:
        """Let the expert choose, by `seed`, where it goes once the task is done. Comes after `reset`."""
        with _global_random(seed):
            self._oracle.reset(None, self._info)

    def expert_action(self, observation: FloatArray) -> FloatArray:
        """The oracle's action f32 [5] in the present state, which it reads from the simulator."""
        return np.asarray(self._oracle.select_action(observation, self._info), np.float32)

    def render(self) -> npt.NDArray[np.uint8]:
        """The present state as a picture, uint8 [240, 320, 3]; needs `render=True` at construction."""
        return np.ascontiguousarray(np.asarray(self._env.render(), np.uint8))

    def _observation(self, own: npt.NDArray[np.float64]) -> FloatArray:
        """OGBench's observation [40] and what the suite adds: see `LAYOUT`."""
        scene, info = self._env, self._info
        places = [
            *(scene._data.site_xpos[site] for site in scene._button_site_ids),
            *(info["privileged/drawer_handle_pos"], info["privileged/window_handle_pos"]),
        ]
        hand, cube = float(info["proprio/effector_yaw"][0]), float(info["privileged/block_0_yaw"][0])
        # A cube looks the same after a quarter of a turn, the open hand after half of one.
        turns = [math.cos(4 * (cube - hand)), math.sin(4 * (cube - hand)), math.cos(2 * hand), math.sin(2 * hand)]
        points = (np.array(places) - CENTRE) * SCALE
        return np.concatenate([own, points.ravel(), turns]).astype(np.float32)


@contextmanager
def _global_random(seed: int) -> Iterator[None]:
    """NumPy's global generator, which OGBench's oracles draw from, seeded for a while."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
