"""The data of given tasks, checked against their environments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmdpd.data import TrajectoryDataset, load_dataset
from llmdpd.errors import InputError
from llmdpd.tasks.locomotion import is_locomotion, locomotion_base
from llmdpd.tasks.specs import common_spec, find_suite


def load_tasks(spec: str | Path, tasks: Sequence[str], goal_visible: bool) -> TrajectoryDataset:
    """Load the data of these tasks from `spec` (see `load_dataset`); the result has exactly these `tasks`.

    A file with one unnamed task (a plain HDF5 file has the file's name) counts as the task where only one is asked
    for. A locomotion task's data may have any name of its environment ("hopper-medium-replay-v2").

    Raises:
        InputError: a task that is not there, another shape than the environment's, a goal that is hidden in the data
            and visible in evaluation or the other way round; and as `load_dataset`.
    """
    dataset = _load_locomotion(spec, tasks) if is_locomotion(tasks[0]) else _load_by_name(spec, tasks)
    expected = common_spec(tasks)
    name = expected.family if expected.has_success else expected.task
    dataset.check_matches(expected.state_dim, expected.action_dim, name)
    if expected.has_success and dataset.goal_visible not in (None, goal_visible):
        problem, found = "data and evaluation differ in whether the goal is visible", f"data: {dataset.goal_visible}"
        path, field = dataset.source, "tasks.goal_visible"
        raise InputError(problem, path=path, field=field, found=found, expected=goal_visible)
    return dataset


def _load_locomotion(spec: str | Path, tasks: Sequence[str]) -> TrajectoryDataset:
    whole = load_dataset(spec)
    wanted = {locomotion_base(task): number for number, task in enumerate(tasks)}
    numbers = [wanted.get(locomotion_base(name), -1) for name in whole.tasks]
    known = any(find_suite(name) is not None for name in whole.tasks)
    if len(whole.tasks) == len(tasks) == 1 and not known:
        numbers = [0]
    missing = [task for number, task in enumerate(tasks) if number not in numbers]
    if missing:
        found, expected = ", ".join(whole.tasks), ", ".join(missing)
        problem = "the data set has no such task"
        raise InputError(problem, path=whole.source, field="task", found=found, expected=expected)
    ids = np.array(numbers, np.int32)[whole.task_ids]
    part = whole.select(ids >= 0)
    return dataclasses.replace(part, tasks=tuple(tasks), texts=("",) * len(tasks), task_ids=ids[ids >= 0])


def _load_by_name(spec: str | Path, tasks: Sequence[str]) -> TrajectoryDataset:
    try:
        dataset = load_dataset(spec, tasks=tasks)
    except InputError as error:
        whole = load_dataset(spec) if error.field == "task" else None
        if whole is None or len(whole.tasks) > 1 or find_suite(whole.tasks[0]) is not None:
            raise
        if len(tasks) > 1:
            problem, found = "the data has no task name, and several tasks are requested", repr(whole.tasks[0])
            found, expected = f"{found}, which no task suite knows", ", ".join(tasks)
            hint, path = f"name the file {tasks[0]}{Path(whole.source).suffix}, or ask for one task alone", whole.source
            raise InputError(problem, path=path, field="task", found=found, expected=expected, hint=hint) from None
        dataset = whole
    return dataclasses.replace(dataset, tasks=tuple(tasks))
