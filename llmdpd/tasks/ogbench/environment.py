"""OGBench's tasks, each with its own start and target, as small, reproducible environments with scripted experts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from llmdpd.tasks.base import FloatArray
from llmdpd.tasks.ogbench.layout import CENTRE, SCALE, SPACES, Kind
from llmdpd.tasks.ogbench.tasks import IN_DRAWER, MAX_STEPS, TASKS, Manipulation
from llmdpd.utils.extras import extra

with warnings.catch_warnings(), extra("ogbench"):
    # OGBench imports MuJoCo's viewer, which warns where there is no screen; nothing here needs one.
    warnings.simplefilter("ignore")
    import mujoco
    from ogbench.manipspace.envs.cube_env import CubeEnv
    from ogbench.manipspace.envs.puzzle_env import PuzzleEnv
    from ogbench.manipspace.envs.scene_env import SceneEnv
    from ogbench.manipspace.lie import SO3
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

FRAME_WIDTH, FRAME_HEIGHT = 320, 240

_DRAWER_LENGTH, _WINDOW_LENGTH = 0.16, 0.2
_START = 0.04  # metres from its end, at most, at which a drawer or window starts that is to reach the other
_CLEAR = 0.08  # metres between a cube's start and the place, or another cube, at least
_LEFTMOST = 0.13  # where the arm can grasp the scene's cube without pushing the window's handle
_HALF_OPEN = 0.08  # a drawer that is open wider stands over the places on the table's right
_AWAY = (0.0, 0.0, -0.3)  # under the table
_OPTIONS: dict[str, Any] = {"mode": "data_collection", "terminate_at_goal": False, "visualize_info": False}


class _Owned:
    """What the kinds share: an environment of OGBench's whose start and target are those of a task."""

    _data: Any
    _model: Any
    _cube_target_mocap_ids: list[int]
    _object_sampling_bounds: npt.NDArray[np.float64]
    np_random: np.random.Generator

    def __init__(self, own: Manipulation, **options: Any) -> None:
        self._own = own
        super().__init__(**{**_OPTIONS, **options})

    def set_new_target(self, return_info: bool = True, p_stack: float = 0.5) -> None:
        """Arrange things for the task; called by `reset` once everything was placed at random."""
        self._arrange()
        mujoco.mj_kinematics(self._model, self._data)

    def _arrange(self) -> None:
        raise NotImplementedError

    def _place_cubes(self, leftmost: float = math.inf) -> None:
        """Put the target where the cube is to be, and the cubes away from there and from each other."""
        own, taken = self._own, []
        if own.place is not None:
            taken.append(np.array(own.place[:2]))
        for number in range(len(SPACES[own.kind].cubes)):
            cube = self._data.joint(f"object_joint_{number}").qpos
            while taken and (cube[1] > leftmost or min(np.linalg.norm(cube[:2] - each) for each in taken) < _CLEAR):
                cube[:2] = self.np_random.uniform(*self._object_sampling_bounds)
            if own.place is not None:
                taken.append(cube[:2].copy())
        for number, target in enumerate(self._cube_target_mocap_ids):
            self._data.mocap_pos[target] = own.place if own.place is not None and number == own.number else _AWAY
            yaw = self.np_random.uniform(0, 2 * np.pi)
            self._data.mocap_quat[target] = SO3.from_z_radians(yaw).wxyz


class _Scene(_Owned, SceneEnv):  # type: ignore[misc]
    """A cube, two buttons, a drawer and a window."""

    def _arrange(self) -> None:
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
        self._place_cubes(_LEFTMOST)
        self._apply_button_states()


class _Cubes(_Owned, CubeEnv):  # type: ignore[misc]
    """Cubes alone on the table."""

    def _arrange(self) -> None:
        self._target_block = self._own.number
        self._place_cubes()


class _Puzzle(_Owned, PuzzleEnv):  # type: ignore[misc]
    """Buttons in rows; one that is pressed changes its own colour and those of its neighbours."""

    def _arrange(self) -> None:
        number, states = self._own.number, self._cur_button_states
        self._target_button = number
        row, column = divmod(number, self._num_cols)
        for other, state in enumerate(states):
            away = abs(other // self._num_cols - row) + abs(other % self._num_cols - column)
            self._target_button_states[other] = 1 - state if away <= 1 else state

    def post_step(self) -> None:
        super().post_step()
        # OGBench asks for the one button's colour alone, which pressing a neighbour changes as well.
        self._success = all(self._compute_successes())


_ENVIRONMENTS: Mapping[Kind, Callable[..., Any]] = {
    "scene": partial(_Scene, env_type="scene"),
    "cube-single": partial(_Cubes, env_type="single"),
    "cube-double": partial(_Cubes, env_type="double"),
    "puzzle-3x3": partial(_Puzzle, env_type="3x3"),
}
_ORACLES: Mapping[str, Callable[..., Any]] = {
    "cube": CubeMarkovOracle,
    "button": ButtonMarkovOracle,
    "drawer": DrawerMarkovOracle,
    "window": WindowMarkovOracle,
}


class OGBenchTask:
    """One task: S observations (see `SPACES`), 5 actions in [-1, 1], 200 steps, a new start for every seed.

    A roll-out is bit-identical for a seed and a sequence of actions, on a fresh and on a used environment.

    Args:
        task: a name in `TASKS`.
        render: whether `render()` will be called; it needs an off-screen renderer (see `simulation.render`).
    """

    def __init__(self, task: str, *, render: bool = False) -> None:
        self.task = task
        size = {"width": FRAME_WIDTH, "height": FRAME_HEIGHT} if render else {}
        own = TASKS[task]
        self._space = SPACES[own.kind]
        self._env = _ENVIRONMENTS[own.kind](own, **size)
        # As OGBench's own data of the puzzle: open fingers would reach the buttons beside.
        fingers = {"gripper_always_closed": True} if own.kind == "puzzle-3x3" else {}
        self._oracle = _ORACLES[own.thing](env=self._env, **fingers)
        self._steps = MAX_STEPS
        self._info: dict[str, Any] = {}

    def reset(self, seed: int) -> FloatArray:
        """Start the episode of `seed`; returns obs f32 [S]."""
        self._steps = 0
        observation, self._info = self._env.reset(seed=int(seed))
        return self._observation(observation)

    def step(self, action: npt.ArrayLike) -> tuple[FloatArray, float, bool, bool]:
        """Execute `action` [5], clipped to [-1, 1]: obs f32 [S], reward (1 with success), success, over.

        Success is OGBench's own, of the task's thing (of the puzzle: of all buttons). An episode has 200 steps.

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
        """OGBench's observation and what the suite adds: see `SPACES`."""
        env, info, space = self._env, self._info, self._space
        places = [
            *(env._data.site_xpos[env._button_site_ids[number]] for number in range(len(space.buttons))),
            *(info[f"privileged/{handle.replace(' ', '_')}_pos"] for handle in space.handles),
        ]
        hand = float(info["proprio/effector_yaw"][0])
        # A cube looks the same after a quarter of a turn, the open hand after half of one.
        turns = [4 * (float(info[f"privileged/block_{cube}_yaw"][0]) - hand) for cube in range(len(space.cubes))]
        added = [turned(turn) for turn in (*turns, 2 * hand) for turned in (math.cos, math.sin)]
        points = (np.reshape(places, (-1, 3)) - CENTRE) * SCALE
        return np.concatenate([own, points.ravel(), added]).astype(np.float32)


@contextmanager
def _global_random(seed: int) -> Iterator[None]:
    """NumPy's global generator, which OGBench's oracles draw from, seeded for a while."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
