"""One structured text prompt for each of Meta-World's 50 tasks, written for this project.

The metadata of the tasks is `prompts.json`: what the reset samples and how widely, what is measured for success
and how close it must be. Sentences with numbers are made from it, and a test compares it with the real environments.
All lengths are metres, x is to the right, y away from the robot, z up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import degrees
from typing import Any, Literal

from llmdpd.tasks.metaworld.names import check_task
from llmdpd.tasks.names import base_name
from llmdpd.tasks.texts.text_prompt import TextPrompt

ConditionKind = Literal["near", "below", "above", "joint_above", "joint_near", "inserted", "held"]
GoalKind = Literal["sampled", "follows", "follows_y", "fixed"]


@dataclass(frozen=True)
class SuccessCondition:
    """One condition of a task's success test; a task succeeds at a step where all of its conditions hold.

    - `near`: the distance of `point` + `offset` to the goal, along `axes`, each axis times its weight, is at most
      `limit` (m). `goal_height` replaces the goal's z.
    - `below`, `above`: the point is lower, higher than the goal.
    - `joint_above`: the joint's position exceeds `limit` (m); `joint_near`: it is at most `limit` (rad) from `at`.
    - `inserted`: the point's x is at least the second object's, its y and z differ by at most the two lengths in `box`.
    - `held`: both fingers touch the object and it is more than `limit` (m) above its start.
    """

    kind: ConditionKind = "near"
    point: str = "object"
    """`object` (observation 4:7), `second` (11:14), `gripper` (between the fingertips), `site:NAME` or `joint:NAME`."""
    limit: float = 0.0
    axes: str = "xyz"
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    goal_height: float | None = None
    at: float = 0.0
    box: tuple[float, float] = (0.0, 0.0)

    @property
    def limit_text(self) -> str:
        """The limit in words: centimetres, or degrees for a rotation."""
        joint = self.kind == "joint_near"
        return f"{degrees(self.limit):.3g} degrees" if joint else f"{100 * self.limit:.3g} cm"


@dataclass(frozen=True)
class TaskMetadata:
    """One task. `object_range` and `goal_range`: the width of the reset's distribution along each axis, m."""

    objective: str
    objects: str
    constraints: str
    point: str
    """What observation 4:7 is the position of."""
    goal_point: str
    """What the goal, observation 36:39, is the position of."""
    success: str
    """What counts as success, with `{i}` for the limit of condition i."""
    conditions: tuple[SuccessCondition, ...]
    goal: GoalKind
    """`sampled`: by itself at reset; `follows`, `follows_y`: at a constant offset from the object; `fixed`."""
    object_name: str
    goal_name: str
    object_range: Mapping[str, float] = field(default_factory=dict)
    goal_range: Mapping[str, float] = field(default_factory=dict)
    second: str = ""
    """What observation 11:14 is the position of; empty where it holds zeros."""
    orientation: bool = True
    """Whether 7:11 holds the object's orientation (a quaternion), not zeros."""


@cache
def all_task_metadata() -> Mapping[str, TaskMetadata]:
    """The metadata of all 50 tasks, by name without version (`coffee-push`)."""
    text = resources.files("llmdpd.tasks.metaworld").joinpath("prompts.json").read_text(encoding="utf-8")
    return {name: _parse_entry(entry) for name, entry in json.loads(text).items()}


def _parse_entry(entry: dict[str, Any]) -> TaskMetadata:
    conditions: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in condition.items()}
        for condition in entry.pop("conditions")
    ]
    return TaskMetadata(conditions=tuple(SuccessCondition(**condition) for condition in conditions), **entry)


def task_metadata(task: str) -> TaskMetadata:
    """The metadata of one task. `task` may carry a version: `coffee-push`, `coffee-push-v2`, `coffee-push-v3`.

    V2 and V3 are the same tasks. Raises `InputError` with the nearest names for an unknown one.
    """
    return all_task_metadata()[base_name(check_task(task))]


def metaworld_prompt(task: str) -> TextPrompt:
    """The structured text prompt for one of Meta-World's 50 tasks (names as in `task_metadata`).

    Raises `InputError` with the nearest names for an unknown task.
    """
    metadata = task_metadata(task)
    limits = [condition.limit_text for condition in metadata.conditions]
    return TextPrompt(
        task=f"Meta-World {base_name(check_task(task)).replace('-', ' ')}.",
        objective=metadata.objective,
        constraints=f"{_randomised(metadata)} {metadata.constraints}",
        objects=f"{metadata.objects}.",
        success=f"{metadata.success.format(*limits)}.",
        actions=_ACTIONS,
        observations=_observations(metadata),
    )


_ACTIONS = "4 numbers in [-1, 1]: hand motion in x (right), y (away), z (up), 1 cm a step; closing of the gripper."


_GOALS: Mapping[GoalKind, str] = {
    "sampled": ".",
    "follows": "; the goal moves along.",
    "follows_y": "; the goal's y moves along.",
    "fixed": "; the goal is fixed.",
}


def _randomised(metadata: TaskMetadata) -> str:
    """What the reset samples, as a sentence: `Randomize mug (x 20 cm, y 10 cm) and goal (x 10 cm) positions.`"""
    sampled = [
        f"{name} ({', '.join(f'{axis} {100 * width:.3g} cm' for axis, width in widths.items())})"
        for name, widths in ((metadata.object_name, metadata.object_range), (metadata.goal_name, metadata.goal_range))
        if widths
    ]
    sentence = f"Randomize {' and '.join(sampled)} position{'s' if len(sampled) > 1 else ''}"
    return sentence + _GOALS[metadata.goal]


def _observations(metadata: TaskMetadata) -> str:
    """The layout of the 39 numbers; the same for all tasks but for what the object slots hold."""
    objects = metadata.point + (" with orientation" if metadata.orientation else "")
    objects += f"; {metadata.second}" if metadata.second else ""
    start = f"39 numbers: hand position, gripper opening; {objects}; the same one step before; "
    return f"{start}goal position: {metadata.goal_point}."
