"""Which part of a recorded demonstration shows the task: recordings go on after the success, often for long.

The end is looked for in what is known best: the step of the first success, the reward, where things came to be relative
to the goal, and where everything comes to rest. Some steps after it are kept, as many as collected training data have:
they show how to stay. Of a recording that wanders off they may show anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmdpd.tasks.layout import Layout, Point

FloatArray = NDArray[np.float32]
Reason = Literal["whole", "success", "reward", "goal", "rest"]

TAIL = 20
"""Steps that are kept after the end of the useful part; of one that wanders off after a known success, `FEW`."""
FEW = 1

_NEAR_BEST = 0.02  # of the range of rewards, within which one counts as the highest
_STAY = 0.5  # share of the later steps with such a reward, where it is not known whether there was a success
_APPROACHED = 0.02  # metres that a thing must have come nearer to the goal
_ARRIVED = 0.05  # of its way to the goal, within which a thing has arrived
_STILL = 0.01  # of each number's range over the demonstration, within which it does not move
_AWAY = 0.2  # metres: in nine of ten collected episodes the hand stays within 0.14 after the success
_STANDS = 0.01  # metres, within which a point stands still: a hand that waits trembles
_STANDS_RANGE = 0.05  # of any other number's range over the demonstration


class Recorded(NamedTuple):
    """A demonstration of T steps as it was recorded; what is not known as None or -1."""

    observations: FloatArray  # [T, S]
    actions: FloatArray  # [T, A]
    rewards: FloatArray | None = None  # [T]
    success: int = -1  # 1, 0, or -1 where unknown
    success_step: int = -1  # the step, from 0, after which the success flag was first up


class UsefulPart(NamedTuple):
    """The first steps of a demonstration that are read, how many, and what their end was found by."""

    steps: int
    by: Reason


def useful_part(demonstration: Recorded, layout: Layout | None = None) -> UsefulPart:
    """The part of a demonstration of T ≥ 1 steps up to its success and `TAIL` steps further.

    Where the step of the success is known, and the body of the layout goes more than 20 cm away from there later on, it
    is cut right after it: such steps do not show how to stay, as those of collected training data do.

    The end is, by what is known: the step of the first success; of one that is known to have succeeded at some step, or
    whose rewards then stay at their highest for the most part, the first step at which the reward is within 2 % of its
    range of the highest; with a layout whose goal is observed, the step at which the thing that came nearer to the goal
    than any other had made 95 % of its way; else the last step at which anything moved. A demonstration that is known
    to have failed is left whole.

    The arrays must be finite and fit together.
    """
    length = len(demonstration.observations)
    end, by = _end(demonstration, layout)
    if end is None or end + 1 + TAIL >= length:
        return UsefulPart(length, "whole")
    # Ends that are not known are found up to so many steps too early.
    away = by == "success" and layout is not None and _goes_away(demonstration.observations[end + 1 :], layout)
    return UsefulPart(end + 1 + (FEW if away else TAIL), by)


def _goes_away(later: FloatArray, layout: Layout) -> bool:
    """Whether the body goes far from where it is in the first of these observations."""
    places = later[:, list(layout.body.at)]
    return bool((np.linalg.norm(places - places[0], axis=1) * layout.unit > _AWAY).any())


def _end(demonstration: Recorded, layout: Layout | None) -> tuple[int | None, Reason]:
    """The last step that is needed, and what it was found by."""
    if demonstration.success_step >= 0:
        return demonstration.success_step, "success"
    if demonstration.success == 0:
        return None, "whole"
    if demonstration.rewards is not None:
        end = _highest_reward(demonstration.rewards, 0.0 if demonstration.success == 1 else _STAY)
        if end is not None:
            return end, "reward"
    if layout is not None and layout.goal is not None:
        end = _arrival(demonstration.observations, layout, layout.point(layout.goal))
        if end is not None:
            return end, "goal"
    return _rest(demonstration.observations), "rest"


def _highest_reward(rewards: FloatArray, stay: float) -> int | None:
    """The first step of a reward near the highest, if the share `stay` of the steps from there on has such rewards.

    Rewards that are all the same say nothing. Where it is not known whether there was a success, rewards may as well be
    a robot's speed, whose highest is no end.
    """
    low, high = float(rewards.min()), float(rewards.max())
    if high <= low:
        return None
    near = rewards >= high - _NEAR_BEST * (high - low)
    first = int(np.argmax(near))
    return first if near[first:].mean() >= stay else None


def _arrival(observations: FloatArray, layout: Layout, goal: Point) -> int | None:
    """The step at which the thing that approached the observed goal most arrived there; the body itself if none did."""
    body, *others = layout.points
    for things in ([point for point in others if point != goal], [body]):
        best: tuple[float, int] | None = None
        for thing in things:
            away = _distance(observations, thing, goal)
            if away is None:
                continue
            way = float(away[0] - away.min())
            if way * layout.unit >= _APPROACHED and (best is None or way > best[0]):
                best = way, int(np.argmax(away <= away.min() + _ARRIVED * way))
        if best is not None:
            return best[1]
    return None


def _distance(observations: FloatArray, thing: Point, goal: Point) -> FloatArray | None:
    """How far a thing is from the goal at each step, [T]; None where one of them is absent."""
    places, goals = observations[:, list(thing.at)], observations[:, list(goal.at)]
    if not (places.any(1).all() and goals.any(1).all()):
        return None
    distance: FloatArray = np.linalg.norm(places - goals, axis=1)
    return distance


def _rest(observations: FloatArray) -> int | None:
    """The first step from which on no number changes by more than a hundredth of its range; None without movement."""
    span = np.ptp(observations, axis=0)
    moving = (np.abs(observations - observations[-1]) > _STILL * span).any(1)
    return int(np.flatnonzero(moving)[-1]) + 1 if moving.any() else None


def without_standing(demonstration: Recorded, layout: Layout | None = None) -> Recorded:
    """The demonstration without the middle of every stretch of more than `TAIL` steps in which nothing moves.

    A policy, or a person who waits, may stand before a thing for hundreds of steps: most of the steps that are read
    would show nothing else. What is known of the success is left out: its step is another one now.
    """
    kept = np.ones(len(demonstration.observations), np.bool_)
    for start, end in _standing(demonstration.observations, layout):
        kept[start + TAIL // 2 : max(end - TAIL // 2, start + TAIL // 2)] = False
    rewards = None if demonstration.rewards is None else demonstration.rewards[kept]
    return Recorded(demonstration.observations[kept], demonstration.actions[kept], rewards)


def _standing(observations: FloatArray, layout: Layout | None) -> Iterator[tuple[int, int]]:
    """Stretches of steps, first to one past the last, of which all are where their first one is.

    With a layout its points within a centimetre, gripper and scalars within 5 % of their range; else all numbers
    within 5 % of their range.
    """
    others = list(range(observations.shape[1])) if layout is None else [*layout.gripper, *layout.scalars]
    points = [] if layout is None else [list(point.at) for point in layout.points]
    within = _STANDS_RANGE * np.ptp(observations[:, others], axis=0)
    start = 0
    while start < len(observations):
        away = observations[start:] - observations[start]
        moved = (np.abs(away[:, others]) > within).any(1)
        for point in points:
            moved |= np.linalg.norm(away[:, point], axis=1) * (layout.unit if layout else 1.0) > _STANDS
        length = int(np.argmax(moved)) if moved.any() else len(moved)
        yield start, start + length
        start += length
