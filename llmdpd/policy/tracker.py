"""A hand-written rule that follows a demonstration: proportional control along the body's way, moved with the scene.

The way is that of the layout's body, in a frame that is attached to the first other point, the object, and from where
the body moves that on to the goal. Nothing of it is learned. It is a baseline (`llmdpd.evaluation.non_learned`), and
what policies hand over to (`llmdpd.policy.takeover`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmdpd.errors import InputError
from llmdpd.tasks.layout import Layout

FloatArray = NDArray[np.float32]

# Of metres, and of the units of the layout where they are others.
_REACH = 0.15  # from body to object within which what moves the object is the body
_MOVED = 0.02  # that an object has gone before it counts as moved
_NEAR = 0.02  # from a waypoint at which the next one is taken
_TIMEOUT = 10  # steps after which it is taken anyway
_COVERED = 4  # steps in which what is left of the way would be covered at the demonstration's own speed
# By which moments of a demonstration are like the present one: differences of these sizes weigh the same.
_ON_THE_WAY = 0.05  # metres from the body to the waypoint
_HELD = 0.03  # metres by which the object lies otherwise about the body
_OPEN = 0.2  # of the range of the gripper's readings in the demonstration, beyond which they are as unlike as can be
_LEAST = 0.1  # of the greatest reading, that this range is at least: what hardly moves says nothing


class Scene:
    """What the tracker reads of observations and writes into actions, by the tasks' layout.

    Args:
        layout: of observations and actions. low, high: bounds f32 [A] of actions.
        field, hint: what asks for the tracker, and what helps where there is none, for the error's words.

    Raises:
        InputError: no layout, or one that lacks a goal, or does not say how actions move the body.
    """

    def __init__(self, layout: Layout | None, low: FloatArray, high: FloatArray, field: str, hint: str) -> None:
        if layout is None or layout.goal is None or not layout.trackable:
            raise InputError(
                "the tracker needs to know where body and goal are, and how actions move the body",
                field=field,
                found="no layout" if layout is None else "a layout that lacks one of them",
                expected="a layout with a goal and action.move",
                hint=hint,
            )
        others = [point for point in layout.points[1:] if point.name != layout.goal]
        goal = layout.point(layout.goal)
        self.body, self.object, self.goal = list(layout.body.at), list((others or [goal])[0].at), list(goal.at)
        self.metres, self.gripper = layout.unit, list(layout.gripper)
        self.move, self.grip, self.low, self.high = list(layout.move), list(layout.grip), low, high

    def gain(self, observations: FloatArray, actions: FloatArray) -> float:
        """Action for each unit of way that is left: what moved the demonstration's body, by least squares."""
        moved = np.diff(observations[:, self.body], axis=0).ravel()
        commands = actions[:-1, self.move].ravel()
        return float(commands @ moved / max(float(moved @ moved), 1e-12)) / _COVERED

    def command(self, way: FloatArray, shown: FloatArray, again: bool) -> FloatArray:
        """The action [A] that goes `way` with the gripper command that was shown, and what else was shown, but once."""
        action = np.zeros_like(shown) if again else shown.copy()
        action[self.grip] = shown[self.grip]
        action[self.move] = way
        return action.clip(self.low, self.high)


@dataclass(frozen=True)
class Track:
    """A demonstration of T steps as the tracker reads it, D coordinates a point."""

    body: FloatArray  # [T, D], after each step
    actions: FloatArray  # [T, A]
    to_goal: FloatArray  # [T], how far the frame has shifted from the object (0) to the goal (1)
    object: FloatArray  # [T, D]
    goal: FloatArray  # [D]
    held: FloatArray  # [T, D], the object less the body
    open: FloatArray  # [T, G], the gripper's readings
    gain: float  # 0 where the body does not move

    @classmethod
    def of(cls, observations: FloatArray, actions: FloatArray, scene: Scene) -> Track:
        """Of observations [T, S] and actions [T, A].

        Until the body moves the object, the frame is attached to the object; from then on it shifts to the goal as the
        object moves along. Where the object is never moved, the frame is attached to whichever of the two the body ends
        nearer to; where there is no object (zeros), to the goal.
        """
        observations, actions = np.asarray(observations, np.float32), np.asarray(actions, np.float32)
        things, goal = observations[:, scene.object], observations[0, scene.goal]
        bodies, moved = observations[:, scene.body], _MOVED / scene.metres
        after = np.concatenate([bodies[1:], bodies[-1:]])
        # Some objects fall or settle by themselves: only what goes along with a body nearby is moved by it.
        steps, own = (np.diff(part, axis=0, append=part[-1:]) for part in (things, bodies))
        lengths = np.linalg.norm(steps, axis=1)
        along = (steps * own).sum(1) > 0.5 * lengths * np.linalg.norm(own, axis=1)
        near = np.linalg.norm(bodies - things, axis=1) < _REACH / scene.metres
        way = np.cumsum(lengths * along * near)
        if not things.any(1).all():
            to_goal = np.full(len(things), float(goal.any()))
        elif way[-1] > moved:
            to_goal = np.clip((way - moved) / (way[-1] - moved), 0.0, 1.0)
        else:
            nearer = np.linalg.norm(after[-1] - goal) < np.linalg.norm(after[-1] - things[-1])
            to_goal = np.full(len(things), float(nearer and goal.any()))
        opening, gain = observations[:, scene.gripper], scene.gain(observations, actions)
        return cls(after, actions, to_goal.astype(np.float32), things, goal, things - bodies, opening, gain)

    def __len__(self) -> int:
        return len(self.body)


class Follower:
    """One episode along a track.

    A waypoint counts as reached within 2 cm, or after 10 steps. The gripper's command is the demonstration's.

    Args:
        track: what is followed. scene: of its task. start: the episode's first observation [S], where the object and
            the goal are taken from.
    """

    def __init__(self, track: Track, scene: Scene, start: FloatArray) -> None:
        self._track, self._scene = track, scene
        self._has_object = bool(track.object.any(1).all() and start[scene.object].any())
        has_goal = bool(track.goal.any() and start[scene.goal].any())
        # What is absent (zeros) has no place: without a goal its place moves with the object's first one.
        self._by_object = (start[scene.object] - track.object[0]) * self._has_object
        self._by_goal = start[scene.goal] - track.goal if has_goal else self._by_object
        self._to_goal = track.to_goal if self._has_object else np.full_like(track.to_goal, float(has_goal))
        self._step = self._waited = 0

    def act(self, observation: FloatArray) -> FloatArray:
        """The action [A] in a state [S], in the environment's own numbers."""
        track, scene, last = self._track, self._scene, len(self._track) - 1
        if self._has_object and not self._to_goal[self._step]:
            self._by_object = observation[scene.object] - track.object[self._step]  # it may have been pushed
        way = self._waypoint() - observation[scene.body]
        self._waited += 1
        near = np.linalg.norm(way) < _NEAR / scene.metres
        if self._step < last and (near or self._waited >= _TIMEOUT):
            self._step, self._waited = self._step + 1, 0
            way = self._waypoint() - observation[scene.body]
        return scene.command(track.gain * way, track.actions[self._step], again=self._waited > 1)

    def _waypoint(self) -> FloatArray:
        share = self._to_goal[self._step]
        return np.asarray(self._track.body[self._step] + (1 - share) * self._by_object + share * self._by_goal)

    def join(self, observation: FloatArray) -> float:
        """Go on from the moment of the track that is most like the state [S]; how unlike it is, 0 for the same.

        Alike are moments whose waypoint is near the body, at which the object lies alike about the body, and at which
        the gripper is as far open; of equally like ones it is the last.
        """
        track, scene = self._track, self._scene
        body, thing = observation[scene.body], observation[scene.object]
        share, by_object, unlike = self._to_goal[:, None], self._by_object, np.zeros(len(track))
        if self._has_object:
            by_object = np.where(share == 0, thing - track.object, self._by_object)
            unlike += (((track.held - (thing - body)) * scene.metres / _HELD) ** 2).sum(1)
        away = track.body + (1 - share) * by_object + share * self._by_goal - body
        unlike += ((away * scene.metres / _ON_THE_WAY) ** 2).sum(1)
        span = np.maximum(np.ptp(track.open, axis=0), _LEAST * np.abs(track.open).max(0)) + 1e-9
        opening = np.abs(track.open - observation[scene.gripper]) / span
        unlike += (np.minimum(opening, 1) ** 2).sum(1) / _OPEN**2
        self._step, self._waited = len(track) - 1 - int(unlike[::-1].argmin()), 0
        return float(unlike[self._step])


def nearest(tracks: Sequence[Track], scene: Scene, start: FloatArray, now: FloatArray) -> Follower:
    """What follows that one of several tracks that is most like the state `now` [S], from that moment on.

    Args:
        tracks: one at least. scene: of their task. start: the episode's first observation [S].
    """
    followers = [Follower(track, scene, start) for track in tracks]
    unlike = [follower.join(now) for follower in followers]
    return followers[int(np.argmin(unlike))]
