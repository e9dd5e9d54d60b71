"""Two ways to act that learn nothing: what a policy must beat to have learned anything from its data.

`replay` does what was done in the example, step by step, and looks at nothing. `tracker` follows the example's hand,
shifted to where the object and the goal are now. Both take the examples of an evaluation's prompts and no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import MakeAct, prompt_rows
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
    """The example's actions, whatever is observed; after its end the hand stands still and the gripper is held."""
    examples, rows = _examples(prompts, requests)

    def act(
        observations: FloatArray, index: NDArray[np.int64], steps: NDArray[np.int64], rewards: FloatArray
    ) -> FloatArray:
        actions = np.zeros((len(index), 4), np.float32)
        for row, (request, step) in enumerate(zip(index, steps, strict=True)):
            done = examples[rows[request]].actions
            if step < len(done):
                actions[row] = done[step]
            else:
                actions[row, 3] = done[-1, 3]
        return actions

    return act


def tracker(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """Proportional control along the example's hand positions, in the frame that the example moved in.

    Until the hand moves the first object, that frame hangs on the object; from then on it goes over to the goal, as the
    object goes its way. Where the object is never moved, it hangs on whichever of the two the hand ends nearer to. The
    gripper command is the example's. A waypoint counts as reached within 2 cm or after 10 steps.
    """
    examples, rows = _examples(prompts, requests)
    plans = [_Plan.of(example) for example in examples]
    walks: dict[int, _Walk] = {}

    def act(
        observations: FloatArray, index: NDArray[np.int64], steps: NDArray[np.int64], rewards: FloatArray
    ) -> FloatArray:
        actions = np.empty((len(index), 4), np.float32)
        for row, (request, step) in enumerate(zip(index.tolist(), steps, strict=True)):
            if step == 0:
                walks[request] = _Walk(plans[rows[request]], observations[row])
            actions[row] = walks[request].act(observations[row])
        return actions

    return act


CONTROLS: dict[str, MakeAct] = {"replay": replay, "tracker": tracker}
"""Controls by name."""


@dataclass(frozen=True)
class _Plan:
    """An example as the tracker reads it, T steps."""

    hand: FloatArray  # [T, 3], after each step
    grip: FloatArray  # [T]
    to_goal: FloatArray  # [T], how far the frame has gone over from the object (0) to the goal (1)
    object: FloatArray  # [T, 3]
    goal: FloatArray  # [3]

    @classmethod
    def of(cls, example: Trajectory) -> _Plan:
        observations = np.asarray(example.observations, np.float32)
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
        return cls(hand, example.actions[:, 3], to_goal.astype(np.float32), things, goal)


class _Walk:
    """One episode along a plan."""

    def __init__(self, plan: _Plan, start: FloatArray) -> None:
        self._plan = plan
        self._by_object = start[OBJECT] - plan.object[0]
        self._by_goal = start[GOAL] - plan.goal
        self._step = self._waited = 0

    def act(self, observation: FloatArray) -> FloatArray:
        plan, last = self._plan, len(self._plan.hand) - 1
        if not plan.to_goal[self._step]:
            self._by_object = observation[OBJECT] - plan.object[self._step]  # it may have been pushed
        way = self._waypoint() - observation[HAND]
        self._waited += 1
        if self._step < last and (np.linalg.norm(way) < _NEAR or self._waited >= _TIMEOUT):
            self._step, self._waited = self._step + 1, 0
            way = self._waypoint() - observation[HAND]
        return np.append(np.clip(_GAIN * way, -1.0, 1.0), plan.grip[self._step]).astype(np.float32)

    def _waypoint(self) -> FloatArray:
        share = self._plan.to_goal[self._step]
        return np.asarray(self._plan.hand[self._step] + (1 - share) * self._by_object + share * self._by_goal)


def _examples(
    prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]
) -> tuple[list[Trajectory], NDArray[np.int64]]:
    rows = prompt_rows(prompts, requests)
    examples = [example for example in rows.examples if example is not None]
    if len(examples) < len(rows.examples):
        raise InputError("a control follows an example", field="--control", expected="an example of every task")
    return examples, rows.of_request
