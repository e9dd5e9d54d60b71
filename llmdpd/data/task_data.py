"""The data of given tasks, checked against their environments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from llmdpd.data import TrajectoryDataset, join_datasets, read_parts
from llmdpd.data.assemble import rename_tasks
from llmdpd.data.checks import checked, without_success
from llmdpd.data.task_file import load_own_data
from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.base import TaskSpec, TaskSuite
from llmdpd.tasks.specs import common_spec, find_suite, suite_of, task_spec

_log = logging.getLogger(__name__)


def load_tasks(spec: str | Path | None, tasks: Sequence[str], goal_visible: bool) -> TrajectoryDataset:
    """Load the data of these tasks from `spec` (see `load_dataset`); the result has exactly these `tasks`.

    A file with one unnamed task (a plain HDF5 file has the file's name) counts as the task where only one is asked
    for. A locomotion task's data may have any name of its environment ("hopper-medium-replay-v2"). Without `spec` the
    data are those that the tasks' suite says are theirs (see `load_own_data`). What is read is held against the tasks'
    specs (see `llmdpd.data.checks`); a line says where the data name another environment than the task's.

    Raises:
        InputError: a task that is not there, another shape than the environment's, a goal that is hidden in the data
            and visible in evaluation or the other way round; and as `load_dataset`.
    """
    dataset = checked(load_own_data(suite_of(tasks[0]), tasks), task_spec, None) if spec is None else _load(spec, tasks)
    expected = common_spec(tasks)
    name = expected.family if expected.has_success else expected.task
    dataset.check_matches(expected.state_dim, expected.action_dim, name)
    if expected.has_success and dataset.goal_visible not in (None, goal_visible):
        problem, found = "data and evaluation differ in whether the goal is visible", f"data: {dataset.goal_visible}"
        path, field = dataset.source, "tasks.goal_visible"
        raise InputError(problem, path=path, field=field, found=found, expected=goal_visible)
    _compare_environments(dataset)
    return dataset if expected.has_success else without_success(dataset)


def _load(spec: str | Path, tasks: Sequence[str]) -> TrajectoryDataset:
    """The tasks' data, of all that `spec` names, under the names of `tasks`."""
    suite = suite_of(tasks[0])
    keys = {suite.data_key(task): task for task in tasks}

    def task_of(name: str) -> str | None:
        """The task that data of this name are of."""
        if suite.knows(name):
            return keys.get(suite.data_key(name))
        return tasks[0] if len(tasks) == 1 and find_suite(name) is None else None

    def spec_of(name: str) -> TaskSpec | None:
        task = task_of(name)
        return None if task is None else task_spec(task)

    parts, names = read_parts(spec, suite.reading(tasks[0]), spec_of, lambda name: task_of(name) is not None)
    found = {name for name in names if suite.knows(name) and task_of(name) is not None}
    # A name that no suite knows counts only where it is the only one.
    found = found or ({*names} if len(names) == 1 and task_of(names[0]) is not None else set())
    missing = [task for task in tasks if task not in map(task_of, found)]
    if missing:
        raise _missing(missing, tasks, names, spec)
    return join_datasets([_named(part, found, task_of, suite) for part in parts if found & {*part.tasks}]).select_tasks(
        tasks
    )


def _named(
    part: TrajectoryDataset, found: Collection[str], task_of: Callable[[str], str | None], suite: TaskSuite
) -> TrajectoryDataset:
    """What a data set has under the names that were found, under the tasks' names."""
    part = part.select_tasks([name for name in part.tasks if name in found])
    # Several data sets of one task have several names, and descriptions that are their own.
    texts = tuple(
        "" if suite.knows(name) and name != task_of(name) else text
        for name, text in zip(part.tasks, part.texts, strict=True)
    )
    return rename_tasks(dataclasses.replace(part, texts=texts), [str(task_of(name)) for name in part.tasks])


def _missing(missing: Sequence[str], tasks: Sequence[str], names: Sequence[str], spec: str | Path) -> InputError:
    if len(names) == 1 and find_suite(names[0]) is None:
        return InputError(
            "the data has no task name, and several tasks are requested",
            path=spec,
            field="task",
            found=f"{names[0]!r}, which no task suite knows",
            expected=", ".join(tasks),
            hint=f"name the file {tasks[0]}{Path(spec).suffix}, or ask for one task alone",
        )
    return InputError(
        "the data set has no such task",
        path=spec,
        field="task",
        found=", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else ""),
        expected=", ".join(missing),
        hint=f"nearest names: {nearest_names(missing[0], names)}",
    )


def _compare_environments(dataset: TrajectoryDataset) -> None:
    """A line for each task that is evaluated in another environment, or version of it, than its data name."""
    for task, environment in zip(dataset.tasks, dataset.environments, strict=False):
        suite = suite_of(task)
        recorded = [name for name in environment.split(", ") if suite.knows(name) and suite.canonical(name) != task]
        if recorded:
            _log.warning(
                "%s: the data were recorded in %s, the evaluation is in %s: name the task %s to evaluate in it",
                *(dataset.source or "data", ", ".join(recorded), task, suite.canonical(recorded[0])),
            )
