"""A family of tasks as a user would bring it along: a hand, an object, a box and a goal above a table, no physics.

It knows nothing of llmdpd: the tests copy it beside a `tasks.toml` and name it there as "tabletop:make".

Observations are 13 numbers: hand (3), gripper's opening (1), object (3), box (3), goal (3), in metres. Actions are 4
numbers within ±1: the hand's movement, 3 cm a step at most, and the gripper's command, positive to close. Every task
has the same scene: what is to be done is only in its text and in a demonstration.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict
from minari.data_collector import EpisodeBuffer

Array = npt.NDArray[np.float64]
STEP, GRASP_WITHIN, TOUCH_WITHIN, FALL, CLOSED = 0.03, 0.04, 0.05, 0.06, 0.5
MAX_STEPS = 70
UP = np.array([0.0, 0.0, 1.0])
OPEN, CLOSE = -1.0, 1.0


class Scene:
    """Where everything is. A hand that closes around the object holds it; a closed one on top of it drags it along."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        places: list[Array] = []
        while len(places) < 3:
            place = rng.uniform(-0.2, 0.2, 2)
            if all(np.linalg.norm(place - other) > 0.13 for other in places):
                places.append(place)
        self.object, self.box, self.goal = (np.append(place, 0.0) for place in places)
        self.goal[2] = rng.uniform(0.08, 0.2)
        self.hand = np.append(rng.uniform(-0.2, 0.2, 2), rng.uniform(0.12, 0.25))
        self.opening, self.held = 1.0, False

    def move(self, action: Array) -> None:
        before, opening = self.hand.copy(), self.opening
        self.hand = np.clip(self.hand + STEP * action[:3], [-0.35, -0.35, 0.0], [0.35, 0.35, 0.35])
        self.opening = float(np.clip(self.opening - 0.5 * action[3], 0.0, 1.0))
        if self.opening > CLOSED:
            self.held = False
        elif opening > CLOSED and np.linalg.norm(self.hand - self.object) < GRASP_WITHIN:
            self.held = True
        if self.held:
            self.object = self.hand.copy()
            return
        self.object[2] = max(self.object[2] - FALL, 0.0)
        touches = np.linalg.norm((before - self.object)[:2]) < TOUCH_WITHIN and before[2] < TOUCH_WITHIN
        if self.opening <= CLOSED and touches:
            self.object[:2] += (self.hand - before)[:2]

    def numbers(self) -> Array:
        return np.concatenate([self.hand, [self.opening], self.object, self.box, self.goal])


def near(first: Array, second: Array, limit: float = 0.035) -> bool:
    return bool(np.linalg.norm(first - second) < limit)


def flat(place: Array, height: float = 0.0) -> Array:
    return np.append(place[:2], height)


# What each task asks: its text, when it has succeeded, and the way there as (place, gripper's command).
Way = Callable[[Scene], tuple[Array, float]]
ABOVE: Way = lambda s: (s.object + 0.1 * UP, OPEN)  # noqa: E731
DOWN: Way = lambda s: (s.object, OPEN)  # noqa: E731
GRASP: Way = lambda s: (s.hand, CLOSE)  # noqa: E731
_PICK = [ABOVE, DOWN, GRASP]


TASKS: dict[str, tuple[str, Callable[[Scene], bool], list[Way]]] = {
    "reach": ("Move the hand to the goal.", lambda s: near(s.hand, s.goal), [lambda s: (s.goal, OPEN)]),
    "visit": ("Move the hand to the box.", lambda s: near(s.hand, s.box), [lambda s: (s.box, OPEN)]),
    "press": (
        "Close the gripper above the object and press it down.",
        lambda s: near(s.hand, s.object) and s.opening < CLOSED and not s.held,
        [lambda s: (s.object + 0.1 * UP, CLOSE), lambda s: (s.object, CLOSE)],
    ),
    "pick": (
        "Grasp the object and hold it at the goal in the air.",
        lambda s: s.held and near(s.object, s.goal),
        [*_PICK, lambda s: (s.goal, CLOSE)],
    ),
    "drop": (
        "Grasp the object, carry it to the goal in the air and let it fall there.",
        lambda s: near(flat(s.object), flat(s.goal), 0.04) and s.opening > CLOSED and s.object[2] < 0.05,
        [*_PICK, lambda s: (s.goal, CLOSE), lambda s: (s.hand, OPEN)],
    ),
    "slide": (
        "Slide the object over the table to the box, with the closed hand on top of it.",
        lambda s: near(s.object, s.box) and not s.held and s.opening < CLOSED,
        [lambda s: (s.object + 0.1 * UP, CLOSE), lambda s: (s.object, CLOSE), lambda s: (flat(s.box), CLOSE)],
    ),
    "raise": (
        "Grasp the object and hold it ten centimetres above the goal.",
        lambda s: s.held and near(s.object, s.goal + 0.1 * UP),
        [*_PICK, lambda s: (s.goal + 0.1 * UP, CLOSE)],
    ),
    "hover": (
        "Hold the open hand ten centimetres above the box.",
        lambda s: near(s.hand, s.box + 0.1 * UP, 0.03) and s.opening > CLOSED,
        [lambda s: (s.box + 0.1 * UP, OPEN)],
    ),
}
UNSEEN = ("raise", "hover")


class Tabletop(gymnasium.Env):
    """One task of the family; `keyed` observations are a Dict as those of goal-conditioned environments.

    Actions have bounds of `strength`; beyond 1 there is no effect.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, task: str, keyed: bool = False, render_mode: str | None = None, strength: float = 1.0) -> None:
        self.text, self._succeeds, self._ways = TASKS[task]
        self.keyed, self.render_mode = keyed, render_mode
        box = Box(-1.0, 1.0, (13,), np.float64)
        three = Box(-1.0, 1.0, (3,), np.float64)
        ten = Box(-1.0, 1.0, (10,), np.float64)
        keys = {"achieved_goal": three, "desired_goal": three, "observation": ten}
        self.observation_space = Dict(keys) if keyed else box
        self.action_space = Box(-strength, strength, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.scene = Scene(int(self.np_random.integers(2**31)))
        self._way, self._waited = 0, 0
        return self._observe(), {"is_success": False}

    def step(self, action: npt.ArrayLike) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.scene.move(np.clip(np.asarray(action, np.float64), -1.0, 1.0))
        success = self._succeeds(self.scene)
        return self._observe(), float(success), False, False, {"is_success": success}

    def expert(self) -> npt.NDArray[np.float32]:
        """The scripted expert's action in the present state."""
        place, grip = self._ways[self._way](self.scene)
        there = np.linalg.norm(place - self.scene.hand) < 0.025
        done = there and (self.scene.opening < CLOSED) == (grip == CLOSE)
        if done and self._way + 1 < len(self._ways):
            self._way += 1
            place, grip = self._ways[self._way](self.scene)
        move = np.clip((place - self.scene.hand) / STEP, -1.0, 1.0)
        return np.append(move, grip).astype(np.float32)

    def render(self) -> npt.NDArray[np.uint8]:
        picture = np.full((96, 96, 3), 255, np.uint8)
        scene = self.scene
        for place, colour in ((scene.box, 120), (scene.goal, 180), (scene.object, 60), (scene.hand, 0)):
            x, y = (int(48 + 130 * coordinate) for coordinate in place[:2])
            picture[max(y - 3, 0) : y + 3, max(x - 3, 0) : x + 3] = colour
        return picture

    def _observe(self) -> Any:
        numbers = self.scene.numbers()
        if not self.keyed:
            return numbers
        return {"achieved_goal": numbers[4:7], "desired_goal": numbers[10:], "observation": numbers[:10]}


def make(task: str, limit: int = MAX_STEPS, **options: Any) -> gymnasium.Env:
    """What a task file names as "tabletop:make"; no limit of steps where `limit` is 0."""
    env: gymnasium.Env = Tabletop(task, **options)
    return gymnasium.wrappers.TimeLimit(env, limit) if limit else env


def episode(task: str, seed: int, keyed: bool = False, noise: float = 0.0, after: int = 3) -> EpisodeBuffer:
    """An episode by the expert, with Gaussian noise on its actions, that ends some steps `after` its success."""
    env, rng = Tabletop(task, keyed), np.random.default_rng(seed)
    observations, actions, rewards, successes, left = [env.reset(seed=seed)[0]], [], [], [False], after
    while len(actions) < MAX_STEPS and left >= 0:
        action = env.expert()
        action[:3] = np.clip(action[:3] + rng.normal(0.0, noise, 3), -1.0, 1.0)
        observation, reward, _, _, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
        successes.append(info["is_success"])
        left -= any(successes)
    over = np.arange(len(actions)) == len(actions) - 1
    stacked: Any = (
        {key: np.stack([each[key] for each in observations]) for key in observations[0]}
        if keyed
        else np.stack(observations)
    )
    return EpisodeBuffer(
        seed=seed,
        observations=stacked,
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminations=np.zeros(len(actions), np.bool_),
        truncations=over,
        infos={"is_success": np.array(successes)},
    )


def record(root: Path, task: str, episodes: int, keyed: bool = False, first_seed: int = 0) -> Path:
    """Record episodes as a Minari data set below `root`; the folder. Every other one is noisy."""
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    env = Tabletop(task, keyed)
    name = f"tabletop/{task}/expert-v0"
    buffers = [episode(task, first_seed + n, keyed, noise=0.3 * (n % 2)) for n in range(episodes)]
    minari.create_dataset_from_buffers(
        name, buffers, observation_space=env.observation_space, action_space=env.action_space
    )
    return root / name
