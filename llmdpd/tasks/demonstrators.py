"""Demonstrators: scripted experts with behaviour policies, of any suite that has them; run inside worker processes.

A suite whose `collector` is "scripted" makes a `Demonstrator` for each of its tasks. Most are `demonstrate` with an
expert of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmdpd.tasks.base import Environment, FloatArray
from llmdpd.tasks.specs import suite_of


@dataclass(frozen=True)
class ScriptedRequest:
    """One episode to collect; its content depends only on these fields.

    Args:
        task: the task's canonical name.
        seed: of the environment: start and goal.
        noise_seed: of all other random numbers, those of the behaviour policy and of the expert.
        behaviour: the behaviour policy, a name in the suite's `behaviours`.
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

    observations: FloatArray  # [T + 1, S], the one after the last action included
    actions: FloatArray  # [T, A], as executed
    expert_actions: FloatArray  # [T, A], the expert's clean action in the visited state
    rewards: FloatArray  # [T]
    success: bool
    noise_level: float
    success_step: int = -1  # the step, from 0, after which the success flag was first up; -1: none


class Demonstrator(Protocol):
    """What a suite provides to collect a task's data."""

    def episode(self, request: ScriptedRequest) -> ScriptedEpisode:
        """Run one episode of the task that it was made for."""


class BehaviourPolicy(Protocol):
    """What is executed in place of an expert's actions, for one episode."""

    level: float
    """How far the episode is from the expert, 0 … 1."""

    def __call__(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        """The action [A] to execute in `observation` [S] where the expert's is `expert` [A]."""

    def post_success_steps(self, default: int) -> int:
        """Steps after the first success: `default`, except for behaviours that define their own number."""


def demonstrate(
    environment: Environment,
    expert: Callable[[FloatArray], FloatArray],
    behaviour: BehaviourPolicy,
    request: ScriptedRequest,
) -> ScriptedEpisode:
    """Roll out `request`: the environment is reset, and `expert` names an action [A] in each observation [S]."""
    observations = [environment.reset(request.seed)]
    taken: list[tuple[FloatArray, FloatArray, float]] = []
    last = request.max_steps
    first, over = -1, False
    while not over and len(taken) < last:
        clean = expert(observations[-1])
        action = behaviour(clean, observations[-1])
        observation, reward, now, over = environment.step(action)
        observations.append(observation)
        taken.append((action, clean, reward))
        if now:
            first = len(taken) - 1 if first < 0 else first
            # The first success decides: later ones would postpone the end.
            last = min(last, len(taken) + behaviour.post_success_steps(request.post_success_steps))
    actions, experts, rewards = (np.array(column, np.float32) for column in zip(*taken, strict=True))
    return ScriptedEpisode(np.stack(observations), actions, experts, rewards, first >= 0, behaviour.level, first)


class Demonstrators:
    """Runs episodes of any tasks; keeps the last task's demonstrator, since consecutive requests mostly share it."""

    def __init__(self, goal_visible: bool) -> None:
        self._goal_visible = goal_visible
        self._last: tuple[str, Demonstrator] | None = None

    def episode(self, request: ScriptedRequest) -> ScriptedEpisode:
        """Run one episode. Raises InputError where the task is unknown."""
        if self._last is None or self._last[0] != request.task:
            made = suite_of(request.task).demonstrator(request.task, goal_visible=self._goal_visible)
            self._last = request.task, made
        return self._last[1].episode(request)
