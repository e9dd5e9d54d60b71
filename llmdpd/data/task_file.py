"""A user's task file in use: its tasks become this process's, their data and texts are read when they are asked."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmdpd.data import Choice, TrajectoryDataset, is_named, join_datasets, read_parts
from llmdpd.data.checks import SpecOf, with_success
from llmdpd.data.notes import say_once
from llmdpd.errors import InputError, located
from llmdpd.prompts import task_prompt
from llmdpd.tasks.base import TaskSuite
from llmdpd.tasks.specs import spec_by_name
from llmdpd.tasks.user import use_file, user_suite
from llmdpd.tasks.user.file import absolute, read_task_file
from llmdpd.tasks.user.suite import Recorded, UserSuite

_log = logging.getLogger(__name__)


def use_task_file(path: str | Path, content: str | None = None) -> UserSuite:
    """Read a task file and make its tasks known to this process by their names, in place of another file's.

    Nothing changes where the same file, of the same text, is in use already, or where the one in use is gone by now.
    Worker processes that are made from then on know the tasks, too. `content` stands in for the text of a file that was
    changed or is gone.

    Raises:
        InputError: as `read_task_file`.
    """
    path, present = absolute(path), user_suite()
    if content is None and present is not None and path == present.file.path and not path.exists():
        return present
    suite = use_file(read_task_file(path, content), _recorded)
    task_prompt.cache_clear()
    return suite


Owners = dict[tuple[object, str], str]
"""Whose a recording is: (what identifies its file or folder, the task's name in it) → the task."""


def load_own_data(suite: TaskSuite, tasks: Sequence[str], owners: Owners | None = None) -> TrajectoryDataset:
    """The data that a suite says belong to these tasks; the result has exactly these `tasks`.

    `owners` are recordings that other tasks have; those of `tasks` are added.

    Raises:
        InputError: a task without data, or whose data hold several tasks of which none has its name; the same data for
            two tasks; and as `load_dataset`.
    """
    parts: list[TrajectoryDataset] = []
    owners = {} if owners is None else owners
    for task in tasks:
        for place in _places(suite, task):
            part = _part(suite, task, place, owners)
            described = any(known.tasks == (task,) for known in parts)
            # Of several data sets of a task the first one's description counts.
            parts.append(dataclasses.replace(part, tasks=(task,), texts=("",) if described else part.texts))
    return join_datasets(parts).select_tasks(tasks)


def _places(suite: TaskSuite, task: str) -> Sequence[str]:
    places = _once(suite.data(task), task)
    if not places:
        hint = "name a data set of it, by data in the task file or by --data"
        raise InputError("the task has no recorded data", field=f"tasks.{task}.data", found="none", hint=hint)
    return places


def _once(places: Sequence[str], task: str) -> list[str]:
    """The data sets without those that others of them hold: an episode counts once, however it is reached."""
    kept: dict[str, Path] = {}
    for place in sorted(places, key=lambda place: len(Path(place).resolve().parts)):
        real = Path(place) if is_named(place) else Path(place).resolve()
        first = next((other for other, root in kept.items() if real == root or root in real.parents), None)
        if first is None:
            kept[place] = real
        else:
            say_once(_log, "data of %s: %s is in %s; it is read once", task, place, first)
    return [place for place in dict.fromkeys(places) if place in kept]


def _part(suite: TaskSuite, task: str, place: str, owners: Owners) -> TrajectoryDataset:
    """A data set's episodes of a task, under the name that it has there."""
    reading = suite.reading(task)
    spec_of: SpecOf = spec_by_name if reading.by_name else lambda name: None
    with located(field=f"tasks.{task}.data"):
        # The threshold of a success is this task's alone, and not of others that the data may hold.
        parts, _ = read_parts(place, [Choice(dataclasses.replace(reading, success_return=None))], spec_of)
        whole = join_datasets(parts)
    wanted = reading.task
    if wanted is None and len(whole.tasks) > 1:
        wanted = task
    if wanted is not None and wanted not in whole.tasks:
        raise InputError(
            "the data set holds several tasks, and none of this name",
            path=whole.source,
            field=f"tasks.{task}.data_task",
            found=", ".join(whole.tasks[:8]),
            expected=wanted,
            hint="say which of them by data_task",
        )
    name = whole.tasks[0] if wanted is None else wanted
    for part in parts:
        if name in part.tasks:
            _own(task, place, part.source, name, owners)
    part = whole if wanted is None else whole.select_tasks([wanted])
    with located(field=f"tasks.{task}"):
        return part if reading.success_return is None else with_success(part, reading.success_return)


def _own(task: str, place: str, source: str, name: str, owners: Owners) -> None:
    """Note whose a recording is, however it is reached. Raises `InputError` where it is another task's."""
    path = Path(source)
    status = path.stat() if source and path.exists() else None
    identity = source or place if status is None else (status.st_dev, status.st_ino)
    if (other := owners.setdefault((identity, name), task)) != task:
        raise InputError(
            "two tasks have the same data",
            path=source or None,
            field=f"tasks.{task}.data",
            found=f"{place}, as of {other}",
            expected="data of its own",
            hint="where a data set holds several tasks, say which by data_task",
        )


def _recorded(suite: TaskSuite, task: str) -> Recorded:
    dataset = load_own_data(suite, [task])
    longest = int(np.diff(dataset.offsets).max())
    return Recorded(dataset.state_dim, dataset.action_dim, longest, dataset.texts[0])
