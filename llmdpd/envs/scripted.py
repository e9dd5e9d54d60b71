"""Episodes of Meta-World's scripted experts, with noise on the executed action; runs inside worker processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmdpd.envs.metaworld import FloatArray, MetaWorldTask, make_task

NOISE_KINDS: dict[str, str] = {
    "clean": "the expert's action; level 0",
    "gaussian": "expert + sigma * N(0, 1) in every step, clipped; level = sigma, drawn from 0.1 … 0.5 for an episode",
    "bursts": "the expert, now and then replaced by one random action held for 5 … 15 steps; level = expected share of "
    "such steps, drawn from 0.1 … 0.4",
    "random": "a new random action in most steps, else the expert; level = share of random steps, drawn from 0.8 … 1",
}
"""Kinds of noise by name. A level says how far an episode is from the expert: 0 is clean, 1 is wholly random."""

_SIGMA = (0.1, 0.5)
_BURST_SHARE = (0.1, 0.4)
_BURST_STEPS = (5, 15)
_RANDOM_SHARE = (0.8, 1.0)


class ActionNoise:
    """What is executed instead of the expert's action.

    Args:
        kind: a name in `NOISE_KINDS`.
        rng: every draw comes from here: first the level, then what each step needs.
    """

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        noises: dict[str, tuple[tuple[float, float], Callable[[FloatArray], FloatArray]]] = {
            "clean": ((0.0, 0.0), lambda expert: expert),
            "gaussian": (_SIGMA, self._gaussian),
            "bursts": (_BURST_SHARE, self._bursts),
            "random": (_RANDOM_SHARE, self._random),
        }
        bounds, self._apply = noises[kind]
        self._rng = rng
        self.level = float(rng.uniform(*bounds))
        self._held: FloatArray | None = None
        self._held_for = 0

    def __call__(self, expert: FloatArray) -> FloatArray:
        """The action f32 [A] to execute where the expert's is `expert`; within [-1, 1]."""
        return np.clip(self._apply(expert), -1.0, 1.0).astype(np.float32)

    def _gaussian(self, expert: FloatArray) -> FloatArray:
        return (expert + self.level * self._rng.standard_normal(expert.shape)).astype(np.float32)

    def _uniform(self, like: FloatArray) -> FloatArray:
        return self._rng.uniform(-1.0, 1.0, like.shape).astype(np.float32)

    def _bursts(self, expert: FloatArray) -> FloatArray:
        if self._held_for == 0:
            # A burst of mean length L, begun with probability p after each step outside, covers the share
            # L / (L + (1 - p) / p) of the steps; solved for p.
            mean = sum(_BURST_STEPS) / 2
            if self._rng.random() >= 1.0 / (1.0 + mean * (1.0 - self.level) / self.level):
                return expert
            self._held = self._uniform(expert)
            self._held_for = int(self._rng.integers(_BURST_STEPS[0], _BURST_STEPS[1] + 1))
        self._held_for -= 1
        assert self._held is not None
        return self._held

    def _random(self, expert: FloatArray) -> FloatArray:
        return self._uniform(expert) if self._rng.random() < self.level else expert


@dataclass(frozen=True)
class ScriptedRequest:
    """One episode to collect; its content depends on these fields alone.

    Args:
        task: Meta-World task.
        seed: of the environment: start and goal.
        noise_seed: of the noise.
        noise: a name in `NOISE_KINDS`.
        max_steps: the episode ends here at the latest.
        tail: steps kept after the first success; the episode ends there (a truncation, not a terminal).
    """

    task: str
    seed: int
    noise_seed: int
    noise: str
    max_steps: int
    tail: int


@dataclass(frozen=True)
class ScriptedEpisode:
    """A collected episode of T steps."""

    observations: FloatArray  # [T + 1, 39], the one after the last action included
    actions: FloatArray  # [T, 4], as executed
    expert_actions: FloatArray  # [T, 4], the expert's clean action in the visited state
    rewards: FloatArray  # [T]
    success: bool
    noise_level: float


class ScriptedExpert:
    """Runs episodes; keeps the environment of the last task, since neighbouring requests are of one task mostly."""

    def __init__(self, goal_visible: bool) -> None:
        self._goal_visible = goal_visible
        self._task: MetaWorldTask | None = None

    def episode(self, request: ScriptedRequest) -> ScriptedEpisode:
        """Run one episode. Raises InputError where the task is unknown."""
        if self._task is None or self._task.task != request.task:
            self._task = make_task(request.task, goal_visible=self._goal_visible)
        return run_episode(self._task, request)


def run_episode(task: MetaWorldTask, request: ScriptedRequest) -> ScriptedEpisode:
    """Roll out `request` on `task`."""
    noise = ActionNoise(request.noise, np.random.default_rng(request.noise_seed))
    observations = [task.reset(request.seed)]
    actions: list[FloatArray] = []
    experts: list[FloatArray] = []
    rewards: list[float] = []
    last = request.max_steps
    success = over = False
    while not over and len(actions) < last:
        expert = task.expert_action(observations[-1])
        action = noise(expert)
        observation, reward, now, over = task.step(action)
        observations.append(observation)
        actions.append(action)
        experts.append(expert)
        rewards.append(reward)
        if now:
            success = True
            last = min(last, len(actions) + request.tail)  # the first success decides: later ones are further on
    return ScriptedEpisode(
        observations=np.stack(observations),
        actions=np.stack(actions),
        expert_actions=np.stack(experts),
        rewards=np.array(rewards, np.float32),
        success=success,
        noise_level=noise.level,
    )
