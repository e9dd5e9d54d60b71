"""Three non-learned baselines: what a policy must beat to have learned anything from its data.

`replay` repeats the demonstration's actions open-loop. `tracker` follows the demonstration's hand (the layout's body),
translated to where the object (its first other point) and the goal are now. `retrieve-and-play` takes the action of the
nearest demonstrated state. All take the demonstrations of an evaluation's prompts and read no text.
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
from llmdpd.tasks.simulation.rollout import Act, EpisodeRequest
from llmdpd.tasks.specs import TaskSpec, common_spec

FloatArray = NDArray[np.float32]

# Of metres, and of the units of the layout where they are others.
_REACH = 0.15  # from hand to object within which what moves the object is the hand
_MOVED = 0.02  # that an object has gone before it counts as moved
_NEAR = 0.02  # from a waypoint at which the next one is taken
_TIMEOUT = 10  # steps after which it is taken anyway
_COVERED = 4  # steps in which what is left of the way would be covered at the demonstration's own speed


def replay(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """The demonstration's actions, whatever is observed; after its end its last action.

    Where a layout says what actions are, there is no motion after the end, and the last gripper command.
    """
    demonstrations, rows = _demonstrations(prompts, requests)
    layout = common_spec(list(prompts)).layout

    def after(last: FloatArray) -> FloatArray:
        if layout is None or not layout.move:
            return last
        still, grip = np.zeros_like(last), list(layout.grip)
        still[grip] = last[grip]
        return still

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        done = [demonstrations[row].actions for row in rows[index]]
        pairs = zip(done, steps.tolist(), strict=True)
        return np.stack([own[step] if step < len(own) else after(own[-1]) for own, step in pairs]).astype(np.float32)

    return act


def tracker(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """Proportional control along the demonstration's hand positions, in a frame that moves with the scene.

    Raises InputError for tasks whose layout does not say how actions move the hand, or lacks an object or a goal.

    Until the hand moves the first object, that frame is attached to the object; from then on it shifts to the goal as
    the object moves along. Where the object is never moved, the frame is attached to whichever of the two the hand ends
    nearer to. The gripper command is the demonstration's. A waypoint counts as reached within 2 cm or after 10 steps.
    """
    demonstrations, rows = _demonstrations(prompts, requests)
    spec = common_spec(list(prompts))
    scene = _Scene(spec)
    paths = [_Path.of(demonstration, scene) for demonstration in demonstrations]
    followers: dict[int, _Follower] = {}

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        actions = np.empty((len(index), spec.action_dim), np.float32)
        for row, (request, step) in enumerate(zip(index.tolist(), steps, strict=True)):
            if step == 0:
                followers[request] = _Follower(paths[rows[request]], scene, observations[row])
            actions[row] = followers[request].act(observations[row])
        return actions

    return act


def retrieve_and_play(prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]) -> Act:
    """The action of the demonstrated state that is nearest to what is observed, the earliest of equally near ones.

    Nearest by the Euclidean distance of observations as they are, among all steps of a prompt's demonstrations, several
    of one prompt together included. Source: «Retrieve and Play» of REGENT (arXiv 2412.04759, section 4).
    """
    rows = prompt_rows(prompts, requests)
    shown = [[d] if isinstance(d, Trajectory) else d for d in rows.demonstrations]
    own = [row for row in shown if row]
    if len(own) < len(shown):
        raise _no_demonstration()
    states = [np.concatenate([demonstration.observations for demonstration in row]) for row in own]
    actions = [np.concatenate([demonstration.actions for demonstration in row]) for row in own]

    def act(observations: FloatArray, index: Index, steps: Index, rewards: FloatArray) -> FloatArray:
        chosen = []
        for row, observation in zip(rows.of_request[index], observations, strict=True):
            distances = np.linalg.norm(states[row] - observation, axis=1)
            chosen.append(actions[row][int(distances.argmin())])
        return np.stack(chosen).astype(np.float32)

    return act


BASELINES: dict[str, MakeAct] = {"replay": replay, "tracker": tracker, "retrieve-and-play": retrieve_and_play}
"""Non-learned baselines by name."""


class _Scene:
    """What the tracker reads of observations and writes into actions, by the tasks' layout."""

    def __init__(self, spec: TaskSpec) -> None:
        layout = spec.layout
        if layout is None or layout.goal is None or len(layout.points) < 2 or not layout.move:
            raise InputError(
                "the tracker needs to know where hand, object and goal are, and how actions move the hand",
                field="--baseline",
                found=f"{spec.family}: " + ("no layout" if layout is None else "a layout that lacks one of them"),
                expected="a layout with an object, a goal and action.move",
                hint="use the baseline replay",
            )
        others = [point for point in layout.points[1:] if point.name != layout.goal]
        goal = layout.point(layout.goal)
        self.hand, self.object, self.goal = list(layout.body.at), list((others or [goal])[0].at), list(goal.at)
        self.metres, self._move, self._grip = layout.unit, list(layout.move), list(layout.grip)
        self._low = np.array(spec.action_low or [-np.inf] * spec.action_dim, np.float32)
        self._high = np.array(spec.action_high or [np.inf] * spec.action_dim, np.float32)

    def gain(self, observations: FloatArray, actions: FloatArray) -> float:
        """Action for each unit of way that is left: what moved the demonstration's hand, by least squares."""
        moved = np.diff(observations[:, self.hand], axis=0).ravel()
        commands = actions[:-1, self._move].ravel()
        return float(commands @ moved / max(float(moved @ moved), 1e-12)) / _COVERED

    def command(self, way: FloatArray, shown: FloatArray, again: bool) -> FloatArray:
        """The action [A] that goes `way` with the gripper command that was shown, and what else was shown, but once."""
        action = np.zeros_like(shown) if again else shown.copy()
        action[self._grip] = shown[self._grip]
        action[self._move] = way
        return action.clip(self._low, self._high)


@dataclass(frozen=True)
class _Path:
    """A demonstration of T steps as the tracker reads it, D coordinates a point."""

    hand: FloatArray  # [T, D], after each step
    actions: FloatArray  # [T, A]
    to_goal: FloatArray  # [T], how far the frame has shifted from the object (0) to the goal (1)
    object: FloatArray  # [T, D]
    goal: FloatArray  # [D]
    gain: float

    @classmethod
    def of(cls, demonstration: Trajectory, scene: _Scene) -> _Path:
        observations = np.asarray(demonstration.observations, np.float32)
        things, goal = observations[:, scene.object], observations[0, scene.goal]
        hands, moved = observations[:, scene.hand], _MOVED / scene.metres
        hand = np.concatenate([hands[1:], hands[-1:]])
        # Some objects fall or settle by themselves: only what goes along with a hand nearby is moved by it.
        steps, own = (np.diff(part, axis=0, append=part[-1:]) for part in (things, hands))
        lengths = np.linalg.norm(steps, axis=1)
        along = (steps * own).sum(1) > 0.5 * lengths * np.linalg.norm(own, axis=1)
        near = np.linalg.norm(hands - things, axis=1) < _REACH / scene.metres
        way = np.cumsum(lengths * along * near)
        if way[-1] > moved:
            to_goal = np.clip((way - moved) / (way[-1] - moved), 0.0, 1.0)
        else:
            nearer = np.linalg.norm(hand[-1] - goal) < np.linalg.norm(hand[-1] - things[-1])
            to_goal = np.full(len(things), float(nearer))
        actions = np.asarray(demonstration.actions, np.float32)
        return cls(hand, actions, to_goal.astype(np.float32), things, goal, scene.gain(observations, actions))


class _Follower:
    """One episode along a path."""

    def __init__(self, path: _Path, scene: _Scene, start: FloatArray) -> None:
        self._path, self._scene = path, scene
        self._by_object = start[scene.object] - path.object[0]
        self._by_goal = start[scene.goal] - path.goal
        self._step = self._waited = 0

    def act(self, observation: FloatArray) -> FloatArray:
        path, scene, last = self._path, self._scene, len(self._path.hand) - 1
        if not path.to_goal[self._step]:
            self._by_object = observation[scene.object] - path.object[self._step]  # it may have been pushed
        way = self._waypoint() - observation[scene.hand]
        self._waited += 1
        near = np.linalg.norm(way) < _NEAR / scene.metres
        if self._step < last and (near or self._waited >= _TIMEOUT):
            self._step, self._waited = self._step + 1, 0
            way = self._waypoint() - observation[scene.hand]
        return scene.command(path.gain * way, path.actions[self._step], again=self._waited > 1)

    def _waypoint(self) -> FloatArray:
        share = self._path.to_goal[self._step]
        return np.asarray(self._path.hand[self._step] + (1 - share) * self._by_object + share * self._by_goal)


def _demonstrations(
    prompts: Mapping[str, TaskPrompt], requests: Sequence[EpisodeRequest]
) -> tuple[list[Trajectory], Index]:
    rows = prompt_rows(prompts, requests)
    demonstrations = [demonstration for demonstration in rows.demonstrations if isinstance(demonstration, Trajectory)]
    if len(demonstrations) < len(rows.demonstrations):
        raise _no_demonstration()
    return demonstrations, rows.of_request


def _no_demonstration() -> InputError:
    return InputError(
        "a non-learned baseline follows a demonstration", field="--baseline", expected="one of every task"
    )
