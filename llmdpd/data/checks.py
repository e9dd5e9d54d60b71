"""What any reader returned, held against its tasks: names, goal, bounds, time limit, rule of success."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import rename_tasks
from llmdpd.data.flags import first_success
from llmdpd.data.notes import say_once
from llmdpd.data.trajectories import TrajectoryDataset
from llmdpd.errors import InputError, abridged
from llmdpd.tasks.base import Reading, TaskSpec, TaskSuite
from llmdpd.tasks.specs import find_suite, task_spec

SpecOf = Callable[[str], TaskSpec | None]
"""The spec of a task by the name that the data give it; None where there is none to hold them against."""
_Limits = tuple[NDArray[np.float32], NDArray[np.float32]]

_log = logging.getLogger(__name__)


def checked(dataset: TrajectoryDataset, spec_of: SpecOf, reading: Reading) -> TrajectoryDataset:
    """What a reader returned, held against the specs of its tasks, where the widths are theirs.

    Actions outside an environment's bounds are clipped to them, as the environment clips what it is given; a line
    says how many. `goal_visible` is read off the observations where the file does not say it, and success off the
    rewards where it is a threshold of the return (`reading.success_return`). Of tasks whose episodes can't end by
    themselves (`reading.terminates`) no end is a terminal.

    Raises:
        InputError: an episode longer than its task's, as of several that were joined; some episodes show the goal and
            others hide it, or all hide it in data that say otherwise; and as `with_success`.
    """
    if reading.by_name:
        dataset = _with_goal_visible(dataset)
    if reading.success_return is not None:
        dataset = with_success(dataset, reading.success_return)
    if reading.terminates is False and dataset.terminals.any():
        dataset = dataclasses.replace(dataset, terminals=np.zeros_like(dataset.terminals))
    specs = [spec if _fits(dataset, spec) else None for spec in map(spec_of, dataset.tasks)]
    _check_lengths(dataset, specs)
    return _within_bounds(dataset, specs)


def recorded_name(name: str) -> str:
    """A task's name in one spelling, where a suite knows it."""
    suite = find_suite(name)
    return name if suite is None else suite.recorded_name(name)


def in_one_spelling(dataset: TrajectoryDataset) -> TrajectoryDataset:
    """The data with their tasks' names as suites spell them; names of other widths than a suite's are not its own."""
    names = [recorded_name(name) for name in dataset.tasks]
    same = (new == old or _fits(dataset, task_spec(new)) for new, old in zip(names, dataset.tasks, strict=True))
    kept = zip(names, dataset.tasks, same, strict=True)
    return rename_tasks(dataset, [new if fits else old for new, old, fits in kept])


def _fits(dataset: TrajectoryDataset, spec: TaskSpec | None) -> bool:
    return spec is not None and (spec.state_dim, spec.action_dim) == (dataset.state_dim, dataset.action_dim)


def _with_goal_visible(dataset: TrajectoryDataset) -> TrajectoryDataset:
    suites = [find_suite(name) for name in dataset.tasks]
    shown: list[bool] = []
    for e in range(dataset.num_episodes):
        suite: TaskSuite | None = suites[dataset.task_ids[e]]
        seen = None if suite is None else suite.goal_visible(dataset.episode(e).observations)
        if seen is not None:
            shown.append(seen)
    problem = "some episodes show the goal and others hide it"
    if not shown:
        return dataset
    if any(shown) == all(shown) and dataset.goal_visible in (None, False, shown[0]):
        # Data that say of themselves that the goal is hidden may have anything in its place.
        visible = shown[0] if dataset.goal_visible is None else dataset.goal_visible
        return dataclasses.replace(dataset, goal_visible=visible)
    if any(shown) == all(shown):
        problem = "the data set says that it shows the goal, and its observations hide it"
    found = f"{sum(shown)} of {len(shown)} show it"
    raise InputError(
        problem, path=dataset.source or None, field="observations", found=found, expected="the same in all"
    )


def with_success(dataset: TrajectoryDataset, threshold: float) -> TrajectoryDataset:
    """Episodes succeed at the step at which the sum of their rewards reaches the threshold.

    Raises:
        InputError: every episode of a task reaches it at the first step, and some go on: that is no success.
    """
    outcomes = [
        first_success(np.cumsum(dataset.episode(e).rewards, dtype=np.float64) >= threshold)
        for e in range(dataset.num_episodes)
    ]
    successes, steps = zip(*outcomes, strict=True)
    for number, task in enumerate(dataset.tasks):
        own = np.flatnonzero(dataset.task_ids == number)
        if len(own) and not any(steps[e] for e in own) and dataset.lengths[own].max() > 1:
            first = dataset.rewards[dataset.offsets[own]]
            raise InputError(
                "every recorded episode reaches the return of a success at its first step",
                path=dataset.source or None,
                field="success",
                found=f"return = {threshold:g}; the first rewards of {task} are {first.min():g} … {first.max():g}",
                expected="a sum of rewards that episodes reach later, where they succeed",
                hint="of rewards that are negative, the sum never rises: name a key of the infos instead",
            )
    return dataclasses.replace(
        dataset,
        successes=np.array(successes, np.int8),
        success_steps=np.array(steps, np.int64),
        success_from=f"return of {threshold:g}",
    )


def without_success(dataset: TrajectoryDataset) -> TrajectoryDataset:
    """The data of tasks whose return counts: whatever a file called a success is none of theirs."""
    unknown = np.full(dataset.num_episodes, -1)
    return dataclasses.replace(
        dataset, successes=unknown.astype(np.int8), success_steps=unknown.astype(np.int64), success_from=""
    )


def _check_lengths(dataset: TrajectoryDataset, specs: Sequence[TaskSpec | None]) -> None:
    lengths = dataset.lengths
    for number, spec in enumerate(specs):
        own = lengths[dataset.task_ids == number]
        if spec is not None and spec.limited and len(own) and own.max() > spec.max_steps:
            raise InputError(
                "an episode is longer than its task's: several episodes joined?",
                path=dataset.source or None,
                field="timeouts",
                found=f"{int((own > spec.max_steps).sum())} of {len(own)} episodes of {dataset.tasks[number]} have up "
                f"to {own.max()} steps",
                expected=f"at most {spec.max_steps}, where {spec.task} ends its episodes",
                hint="mark where episodes end: terminals and timeouts, or terminations and truncations",
            )


def _within_bounds(dataset: TrajectoryDataset, specs: Sequence[TaskSpec | None]) -> TrajectoryDataset:
    bounds = [_bounds(spec) for spec in specs]
    if dataset.stored:
        return _stored_within_bounds(dataset, bounds)
    outside, found = np.zeros(dataset.num_transitions, np.bool_), [np.inf, -np.inf]
    changes: dict[str, NDArray[np.float32]] = {}
    tasks: dict[str, None] = {}
    for name in ("actions", "expert_actions"):
        array = getattr(dataset, name)
        for number, limits in enumerate(bounds):
            if array is None or limits is None:
                continue
            rows = slice(None) if len(bounds) == 1 else dataset.transitions_of(dataset.tasks[number])
            own = array[rows]
            wrong = ((own < limits[0]) | (own > limits[1])).any(axis=1)
            if wrong.any():
                outside[rows] |= wrong
                tasks |= dict.fromkeys(dataset.tasks if len(bounds) == 1 else [dataset.tasks[number]])
                found = [min(found[0], float(own.min())), max(found[1], float(own.max()))]
                changes.setdefault(name, array.copy())[rows] = own.clip(*limits)
    if not changes:
        return dataset
    _say_clipped(dataset, bounds, list(tasks), int(outside.sum()), (found[0], found[1]))
    actions, expert = changes.get("actions", dataset.actions), changes.get("expert_actions", dataset.expert_actions)
    return dataclasses.replace(dataset, actions=actions, expert_actions=expert)


def _stored_within_bounds(dataset: TrajectoryDataset, bounds: Sequence[_Limits | None]) -> TrajectoryDataset:
    """As `_within_bounds`, of data on the disk: actions are clipped as they are read."""
    if not any(bounds):
        return dataset
    low, high = (np.full((len(bounds), dataset.action_dim), side, np.float32) for side in (-np.inf, np.inf))
    for number, limits in enumerate(bounds):
        if limits is not None:
            low[number], high[number] = limits
    wrong, found, changed = np.zeros(dataset.num_episodes, np.bool_), [np.inf, -np.inf], dict[str, Any]()
    for name in ("actions", "expert_actions"):
        column = getattr(dataset, name)
        if column is None:
            continue
        least, most = column.episode_extents()
        beyond = (least < low[dataset.task_ids]).any(axis=1) | (most > high[dataset.task_ids]).any(axis=1)
        if beyond.any():
            wrong |= beyond
            own = np.isin(dataset.task_ids, dataset.task_ids[beyond])
            found = [min(found[0], float(least[own].min())), max(found[1], float(most[own].max()))]
            changed[name] = column.clipped(low[dataset.task_ids], high[dataset.task_ids])
    if not changed:
        return dataset
    count = 0
    for e in np.flatnonzero(wrong):
        least, most = low[dataset.task_ids[e]], high[dataset.task_ids[e]]
        parts = [getattr(dataset, name)[slice(*dataset.offsets[e : e + 2])] for name in changed]
        count += int(np.any([((part < least) | (part > most)).any(axis=1) for part in parts], axis=0).sum())
    tasks = [dataset.tasks[number] for number in np.unique(dataset.task_ids[wrong])]
    _say_clipped(dataset, bounds, tasks, count, (found[0], found[1]))
    return dataclasses.replace(dataset, **changed)


def _say_clipped(
    dataset: TrajectoryDataset,
    bounds: Sequence[_Limits | None],
    tasks: Sequence[str],
    steps: int,
    found: tuple[float, float],
) -> None:
    low, high = (_span(limits, side) for side, limits in ((0, bounds), (1, bounds)))
    say_once(
        _log,
        "%s: actions of %d of %d steps, of %s, lie outside the environment's bounds (%.4g … %.4g) and are clipped to "
        "%s … %s",
        *(dataset.source or "data", steps, dataset.num_transitions, abridged(list(tasks), 3), *found, low, high),
    )


def _bounds(spec: TaskSpec | None) -> _Limits | None:
    """The environment's lowest and highest action [A]; None without an environment."""
    if spec is None or not spec.has_environment or spec.action_low is None or spec.action_high is None:
        return None
    return np.array(spec.action_low, np.float32), np.array(spec.action_high, np.float32)


def _span(bounds: Sequence[_Limits | None], side: int) -> str:
    values = sorted({float(value) for limits in bounds if limits is not None for value in limits[side]})
    return " or ".join(f"{value:g}" for value in values[:3])
