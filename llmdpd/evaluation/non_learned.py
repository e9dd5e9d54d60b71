"""Two non-learned baselines: what a policy must beat to have learned anything from its data.

`replay` repeats the demonstration's actions open-loop. `tracker` follows the demonstration's hand, translated to where
the object and the goal are now. Both take the demonstrations of an evaluation's prompts and read no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import Index, MakeAct, prompt_rows
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.tasks.metaworld.layout import GOAL, HAND, OBJECT
from llmdpd.tasks.simulation.rollout import Act, EpisodeRequest

FloatArray = NDArray[np.float32]

_REACH = 0.15  # metres from hand to object within which what moves the object is the hand
_MOVED = 0.02  # metres that an object has gone before it counts as moved
_GAIN = 25.0  # the scripted experts' most frequent one
_NEAR = 0.02  # metres from a waypoint at which the next one is taken
_TIMEOUT = 10  # steps after which it is taken anyway


def replay(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """The demonstration's actions, whatever is observed; after its end zero motion and the last gripper command."""
    demonstrations, rows = _demonstrations(prompts, requests)

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        actions = np.zeros((len(index), 4), np.float32)
        for row, (request, step) in enumerate(zip(index, steps, strict=True)):
            done = demonstrations[rows[request]].actions
            if step < len(done):
                actions[row] = done[step]
            else:
                actions[row, 3] = done[-1, 3]
        return actions

    return act


def tracker(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """Proportional control along the demonstration's hand positions, in a frame that moves with the scene.

    Until the hand moves the first object, that frame is attached to the object; from then on it shifts to the goal as
    the object moves along. Where the object is never moved, the frame is attached to whichever of the two the hand ends
    nearer to. The gripper command is the demonstration's. A waypoint counts as reached within 2 cm or after 10 steps.
    """
    demonstrations, rows = _demonstrations(prompts, requests)
    paths = [_Path.of(demonstration) for demonstration in demonstrations]
    followers: dict[int, _Follower] = {}

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        actions = np.empty((len(index), 4), np.float32)
        for row, (request, step) in enumerate(zip(index.tolist(), steps, strict=True)):
            if step == 0:
                followers[request] = _Follower(paths[rows[request]], observations[row])
            actions[row] = followers[request].act(observations[row])
        return actions

    return act


BASELINES: dict[str, MakeAct] = {"replay": replay, "tracker": tracker}
"""Non-learned baselines by name."""


@dataclass(frozen=True)
class _Path:
    """A demonstration of T steps as the tracker reads it."""

    hand: FloatArray  # [T, 3], after each step
    grip: FloatArray  # [T]
    to_goal: FloatArray  # [T], how far the frame has shifted from the object (0) to the goal (1)
    object: FloatArray  # [T, 3]
    goal: FloatArray  # [3]

    @classmethod
    def of(cls, demonstration: Trajectory) -> _Path:
        observations = np.asarray(demonstration.observations, np.float32)
        things, goal = observations[:, OBJECT], observations[0, GOAL]
        hand = np.concatenate([observations[1:, HAND], observations[-1:, HAND]])
        # Some objects fall or settle by themselves: only what goes along with a hand nearby is moved by it.
        steps, hands = (np.diff(part, axis=0, append=part[-1:]) for part in (things, observations[:, HAND]))
        lengths = np.linalg.norm(steps, axis=1)
        along = (steps * hands).sum(1) > 0.5 * lengths * np.linalg.norm(hands, axis=1)
        near = np.linalg.norm(observations[:, HAND] - things, axis=1) < _REACH
        way = np.cumsum(lengths * along * near)
        if way[-1] > _MOVED:
            to_goal = np.clip((way - _MOVED) / (way[-1] - _MOVED), 0.0, 1.0)
        else:
            nearer = np.linalg.norm(hand[-1] - goal) < np.linalg.norm(hand[-1] - things[-1])
            to_goal = np.full(len(things), float(nearer))
        return cls(hand, demonstration.actions[:, 3], to_goal.astype(np.float32), things, goal)


class _Follower:
    """One episode along a path."""

    def __init__(self, path: _Path, start: FloatArray) -> None:
        self._path = path
        self._by_object = start[OBJECT] - path.object[0]
        self._by_goal = start[GOAL] - path.goal
        self._step = self._waited = 0

    def act(self, observation: FloatArray) -> FloatArray:
        path, last = self._path, len(self._path.hand) - 1
        if not path.to_goal[self._step]:
            self._by_object = observation[OBJECT] - path.object[self._step]  # it may have been pushed
        way = self._waypoint() - observation[HAND]
        self._waited += 1
        if self._step < last and (np.linalg.norm(way) < _NEAR or self._waited >= _TIMEOUT):
            self._step, self._waited = self._step + 1, 0
            way = self._waypoint() - observation[HAND]
        return np.append(np.clip(_GAIN * way, -1.0, 1.0), path.grip[self._step]).astype(np.float32)

    def _waypoint(self) -> FloatArray:
        share = self._path.to_goal[self._step]
        return np.asarray(self._path.hand[self._step] + (1 - share) * self._by_object + share * self._by_goal)


def _demonstrations(
    prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]
) -> tuple[list[Trajectory], Index]:
    rows = prompt_rows(prompts, requests)
    demonstrations = [demonstration for demonstration in rows.demonstrations if demonstration is not None]
    if len(demonstrations) < len(rows.demonstrations):
        raise InputError(
            "a non-learned baseline follows a demonstration", field="--baseline", expected="one of every task"
        )
    return demonstrations, rows.of_request
