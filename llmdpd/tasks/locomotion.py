"""MuJoCo locomotion of D4RL: Hopper, HalfCheetah, Walker2d on Gymnasium, and D4RL's normalised score."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.base import Environment, FloatArray, Reading, TaskSpec, TaskSuite
from llmdpd.tasks.names import up_to_version
from llmdpd.utils.extras import extra

REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
}
"""Returns of a random and of an expert policy, from D4RL (arXiv 2004.07219)."""

FRAME_WIDTH, FRAME_HEIGHT = 320, 240
_GYMNASIUM = {"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}
_VERSIONS = ("v4", "v5")
_NAME = re.compile(
    r"^(?:(?:mujoco|d4rl)-)?(?P<base>[a-z0-9]+)(?:-(?:simple|medium|random|expert|full|replay|-)+)?(?:-(?P<version>v\d+))?$"
)


def _split(name: str) -> tuple[str, str | None] | None:
    """("hopper", "v5") of "Hopper-v5"; no version where it is D4RL's own or absent; None for other names."""
    match = _NAME.match(re.sub("[_/]", "-", name.strip().lower()))
    if match is None or match["base"] not in REFERENCE_RETURNS:
        return None
    return match["base"], match["version"] if match["version"] in _VERSIONS else None


def is_locomotion(name: str) -> bool:
    """Whether `name` is one of the three environments, such as "hopper", "hopper-medium-replay-v2" or "Hopper-v5"."""
    return _split(name) is not None


def locomotion_base(name: str) -> str | None:
    """ "hopper" of "Hopper-v4", "hopper_medium_replay-v2" (D4RL's file) or "mujoco/hopper/medium-v0" (Minari's)."""
    parts = _split(name)
    return None if parts is None else parts[0]


def locomotion_id(name: str) -> str:
    """The Gymnasium id of an environment named in D4RL's or Gymnasium's way. Raises InputError for another name.

    Without one of Gymnasium's versions in the name it is v4, the closest to D4RL's, or v5 where Gymnasium has no v4.
    """
    parts = _split(name)
    if parts is None:
        expected = "one of " + ", ".join(sorted(REFERENCE_RETURNS))
        hint = "nearest: " + nearest_names(name.lower(), REFERENCE_RETURNS)
        raise InputError(f"unknown environment {name!r}", field="task", found=name, expected=expected, hint=hint)
    with extra("d4rl"):
        import gymnasium

    base, version = parts
    candidates = [f"{_GYMNASIUM[base]}-{v}" for v in ([version] if version else _VERSIONS)]
    found = next((candidate for candidate in candidates if candidate in gymnasium.registry), None)
    if found is not None:
        return found
    raise InputError(f"this Gymnasium has no {' or '.join(candidates)}", field="task", found=name)


def normalised_score(name: str, episode_return: float) -> float:
    """D4RL's score: 0 for a random policy's return, 100 for an expert's. Raises InputError for other environments."""
    base, expected = locomotion_base(name), sorted(REFERENCE_RETURNS)
    if base is None:
        raise InputError("no reference returns for this environment", field="task", found=name, expected=expected)
    low, high = REFERENCE_RETURNS[base]
    return 100.0 * (episode_return - low) / (high - low)


class LocomotionTask:
    """A locomotion environment with the interface of `MetaWorldTask`; there is no success, the return counts.

    Attributes:
        terminated: whether the last step ended in a terminal state (a fall), not at the time limit.
    """

    def __init__(self, name: str, *, render: bool = False) -> None:
        with extra("d4rl"):
            import gymnasium

        self.task = locomotion_id(name)
        self.terminated = False
        options: dict[str, Any] = {"render_mode": "rgb_array", "width": FRAME_WIDTH, "height": FRAME_HEIGHT}
        with warnings.catch_warnings():
            # "Hopper-v4 is out of date": chosen on purpose, see `locomotion_id`.
            warnings.filterwarnings("ignore", message=".*out of date.*")
            self._env = gymnasium.make(self.task, disable_env_checker=True, **(options if render else {}))
        state: Any = self._env.observation_space
        action: Any = self._env.action_space
        self._low, self._high = action.low, action.high
        self.state_dim, self.action_dim = int(state.shape[0]), int(action.shape[0])
        self.max_steps = int(getattr(self._env.spec, "max_episode_steps", None) or 1000)

    @property
    def action_bounds(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The lowest and the highest action [A]."""
        return tuple(map(float, self._low)), tuple(map(float, self._high))

    def reset(self, seed: int) -> FloatArray:
        """Start the episode of `seed`; returns obs f32 [S]."""
        self.terminated = False
        return np.asarray(self._env.reset(seed=int(seed))[0], np.float32)

    def step(self, action: npt.ArrayLike) -> tuple[FloatArray, float, bool, bool]:
        """Execute `action` [A], clipped to its bounds: obs f32 [S], reward, success (always False), over.

        Over is a fall or the time limit; `terminated` tells them apart.
        """
        clipped = np.clip(np.asarray(action, np.float32), self._low, self._high)
        observation, reward, terminated, truncated, _ = self._env.step(clipped)
        self.terminated = bool(terminated)
        return np.asarray(observation, np.float32), float(reward), False, bool(terminated or truncated)

    def render(self) -> npt.NDArray[np.uint8]:
        """The present state as a picture, uint8 [240, 320, 3]; needs `render=True` at construction."""
        return np.ascontiguousarray(np.asarray(self._env.render(), np.uint8))

    def close(self) -> None:
        """Free the renderer, if there is one."""
        self._env.close()


class LocomotionSuite(TaskSuite):
    """Hopper, HalfCheetah and Walker2d: no success, the return counts."""

    name = "locomotion"
    tasks = tuple(REFERENCE_RETURNS)
    collector = "sac"
    steps_per_second = 120  # steps of 8 ms (walker2d, hopper) and 50 ms (halfcheetah): real time for the first two

    def knows(self, task: str) -> bool:
        return is_locomotion(task)

    def canonical(self, task: str) -> str:
        return locomotion_id(task)

    def spec(self, task: str) -> TaskSpec:
        made = LocomotionTask(task)
        made.close()
        low, high = made.action_bounds
        return TaskSpec(
            *(task, made.state_dim, made.action_dim, made.max_steps, self.name),
            has_success=False,
            action_low=low,
            action_high=high,
        )

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        return LocomotionTask(task, render=render)

    def description(self, task: str) -> str:
        from llmdpd.tasks.texts.gymnasium_docs import environment_prompt

        return environment_prompt(task).render()

    def reading(self, task: str) -> Reading:
        return Reading(terminates=True)

    def recorded_name(self, name: str) -> str:
        return name  # of several data sets of one environment

    def named_by(self, name: str) -> str | None:
        versioned = up_to_version(name)
        return versioned if versioned is not None and self.knows(versioned) else None

    def data_key(self, name: str) -> str:
        return str(locomotion_base(name))

    def in_environment_of(self, task: str, environment: str) -> str:
        ours, theirs = _split(task), _split(environment)
        follows = ours is not None and theirs is not None and ours == (theirs[0], None)
        return locomotion_id(environment if follows else task)

    def normalised_score(self, task: str, mean_return: float, max_steps: int) -> float:
        return normalised_score(task, mean_return)


SUITE = LocomotionSuite()
