"""The data of given tasks, checked against their environments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from llmdpd.data import Choice, TrajectoryDataset, join_datasets, read_parts
from llmdpd.data.assemble import rename_tasks
from llmdpd.data.checks import checked, without_success
from llmdpd.data.notes import say_once
from llmdpd.data.task_file import load_own_data
from llmdpd.data.task_names import same_task
from llmdpd.errors import InputError, abridged, nearest_names
from llmdpd.tasks.base import DEFAULT_READING, Reading, TaskSpec, TaskSuite
from llmdpd.tasks.specs import common_spec, find_suite, suite_of, task_spec

_log = logging.getLogger(__name__)


def load_tasks(
    spec: str | Path | None, tasks: Sequence[str], goal_visible: bool, *, stored: bool = False
) -> TrajectoryDataset:
    """Load the data of these tasks from `spec` (see `load_dataset`); the result has exactly these `tasks`.

    Each task is read as its suite says (`TaskSuite.reading`), of the data's tasks the one that it says. A file with one
    unnamed task (a plain HDF5 file has the file's name) counts as the task where only one is requested. A locomotion
    task's data may have any name of its environment ("hopper-medium-replay-v2"). Without `spec` the data are those that
    the tasks' suite says are theirs (see `load_own_data`). What is read is held against the tasks' specs (see
    `llmdpd.data.checks`); a line says where the data name another environment than the task's. What a run has `stored`
    has no keys of observations any more: they were joined when it was read.

    Raises:
        InputError: a task that is not there, another shape than the environment's, a goal that is hidden in the data
            and visible in evaluation or the other way round; and as `load_dataset`.
    """
    if spec is None:
        dataset = checked(load_own_data(suite_of(tasks[0]), tasks), task_spec, DEFAULT_READING)
    else:
        dataset = _load(spec, tasks, stored)
    expected = common_spec(tasks)
    name = expected.family if expected.has_success else expected.task
    dataset.check_matches(expected.state_dim, expected.action_dim, name)
    if expected.has_success and dataset.goal_visible not in (None, goal_visible):
        problem, found = "data and evaluation differ in whether the goal is visible", f"data: {dataset.goal_visible}"
        path, field = dataset.source, "tasks.goal_visible"
        raise InputError(problem, path=path, field=field, found=found, expected=goal_visible)
    _compare_environments(dataset)
    return dataset if expected.has_success else without_success(dataset)


class _Names:
    """Which of some tasks, all of one suite, data of a name are of."""

    def __init__(self, tasks: Sequence[str], stored: bool) -> None:
        self.tasks, self.suite = tasks, suite_of(tasks[0])
        self.readings = {task: self.suite.reading(task) for task in tasks}
        if stored:
            self.readings = {task: dataclasses.replace(own, observation=()) for task, own in self.readings.items()}
        self._told = {reading.task: task for task, reading in self.readings.items() if reading.task is not None}
        self._keys = {self.suite.data_key(task): task for task in tasks}

    def told(self, name: str) -> str | None:
        """The task whose reading says that it has this name in the data."""
        return next((task for other, task in self._told.items() if same_task(name, other)), None)

    def task(self, name: str) -> str | None:
        """The task that data of this name are of, as far as the name says it."""
        if (told := self.told(name)) is not None:
            return told
        if self.suite.knows(name):
            return self._keys.get(self.suite.data_key(name))
        return self.tasks[0] if len(self.tasks) == 1 and not self._told and find_suite(name) is None else None

    def spec(self, name: str) -> TaskSpec | None:
        task = self.task(name)
        return None if task is None else task_spec(task)

    def choices(self) -> list[Choice]:
        """The tasks that are read alike, each with its reading."""
        alike = [dataclasses.replace(reading, task=None) for reading in self.readings.values()]
        readings = dict(zip(self.readings, alike, strict=True))

        def choice(reading: Reading) -> Choice:
            return Choice(reading, lambda name: (task := self.task(name)) is not None and readings[task] == reading)

        return [choice(reading) for reading in dict.fromkeys(alike)]

    def found(self, names: Sequence[str]) -> set[str]:
        """Those of the data's names that count.

        A task's own name does not where the data have the name that its reading says; one that no suite knows does only
        where it is the only one.
        """
        told = {self.told(name) for name in names}
        mine = {name for name in names if self.told(name) or (self.suite.knows(name) and self.task(name) not in told)}
        mine = {name for name in mine if self.task(name) is not None}
        return mine or {name for name in names if len(names) == 1 and self.task(name) is not None}


def _load(spec: str | Path, tasks: Sequence[str], stored: bool) -> TrajectoryDataset:
    """The tasks' data, of all that `spec` names, under the names of `tasks`."""
    known = _Names(tasks, stored)
    _check_told(spec, known.readings)
    parts, names = read_parts(spec, known.choices(), known.spec)
    found = known.found(names)
    there = set(map(known.task, found))
    missing = [task for task in tasks if task not in there]
    if missing:
        raise _missing([known.readings[task].task or task for task in missing], tasks, names, spec)
    named = [_named(part, found, known.task, known.suite) for part in parts if found & {*part.tasks}]
    return join_datasets(named).select_tasks(tasks)


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


def _check_told(spec: str | Path, readings: Mapping[str, Reading]) -> None:
    """Raise `InputError` where two tasks are to have the same one of the data's."""
    owners: dict[str, str] = {}
    for task, reading in readings.items():
        if reading.task is not None and (other := owners.setdefault(reading.task, task)) != task:
            found, expected = f"{reading.task}, as of {other}", "a task of the data for each"
            field = f"tasks.{task}.data_task"
            raise InputError("two tasks have the same data", path=spec, field=field, found=found, expected=expected)


def _missing(missing: Sequence[str], tasks: Sequence[str], names: Sequence[str], spec: str | Path) -> InputError:
    if len(names) == 1 and len(tasks) > 1 and find_suite(names[0]) is None:
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
        found=abridged(names, 8),
        expected=", ".join(missing),
        hint=f"nearest names: {nearest_names(missing[0], names)}",
    )


def _compare_environments(dataset: TrajectoryDataset) -> None:
    """A line for each task that is evaluated in another environment, or version of it, than its data name."""
    for task, environment in zip(dataset.tasks, dataset.environments, strict=False):
        suite = suite_of(task)
        recorded = [name for name in environment.split(", ") if suite.knows(name) and suite.canonical(name) != task]
        if recorded:
            say_once(
                _log,
                "%s: the data were recorded in %s, the evaluation is in %s: name the task %s to evaluate in it",
                *(dataset.source or "data", ", ".join(recorded), task, suite.canonical(recorded[0])),
            )
