"""Episodes of behaviour policies made from Meta-World's scripted experts; runs inside worker processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmdpd.tasks.metaworld.behaviours import Behaviour
from llmdpd.tasks.metaworld.environment import FloatArray, MetaWorldTask, make_task


@dataclass(frozen=True)
class ScriptedRequest:
    """One episode to collect; its content depends only on these fields.

    Args:
        task: Meta-World task.
        seed: of the environment: start and goal.
        noise_seed: of the behaviour policy's random numbers.
        behaviour: the behaviour policy, a name in `BEHAVIOURS`.
        max_steps: the episode ends here at the latest.
        post_success_steps: steps kept after the first success, unless the behaviour defines its own number; the
            episode ends there (a truncation, not a terminal).
    """

    task: str
    seed: int
    noise_seed: int
    behaviour: str
    max_steps: int
    post_success_steps: int


@dataclass(frozen=True)
class ScriptedEpisode:
    """A collected episode of T steps."""

    observations: FloatArray  # [T + 1, 39], the one after the last action included
    actions: FloatArray  # [T, 4], as executed
    expert_actions: FloatArray  # [T, 4], the expert's clean action in the visited state
    rewards: FloatArray  # [T]
    success: bool
    noise_level: float
    success_step: int = -1  # the step, from 0, after which the success flag was first up; -1: none


class ScriptedExpert:
    """Runs episodes; keeps the environment of the last task, since consecutive requests mostly share the task."""

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
    behaviour = Behaviour(request.behaviour, np.random.default_rng(request.noise_seed))
    observations = [task.reset(request.seed)]
    taken: list[tuple[FloatArray, FloatArray, float]] = []
    last = request.max_steps
    first, over = -1, False
    while not over and len(taken) < last:
        expert = task.expert_action(observations[-1])
        action = behaviour(expert, observations[-1][:3])
        observation, reward, now, over = task.step(action)
        observations.append(observation)
        taken.append((action, expert, reward))
        if now:
            first = len(taken) - 1 if first < 0 else first
            # The first success decides: later ones would postpone the end.
            last = min(last, len(taken) + behaviour.post_success_steps(request.post_success_steps))
    actions, experts, rewards = (np.array(column, np.float32) for column in zip(*taken, strict=True))
    return ScriptedEpisode(np.stack(observations), actions, experts, rewards, first >= 0, behaviour.level, first)
