"""A user's task file in use: its tasks become this process's, their data and texts are read when they are asked."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmdpd.data import TrajectoryDataset, is_named, join_datasets, load_dataset
from llmdpd.data.checks import with_success
from llmdpd.errors import InputError, located
from llmdpd.prompts import task_prompt
from llmdpd.tasks.base import TaskSuite
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


def load_own_data(suite: TaskSuite, tasks: Sequence[str]) -> TrajectoryDataset:
    """The data that a suite says belong to these tasks; the result has exactly these `tasks`.

    Raises:
        InputError: a task without data, or whose data hold several tasks of which none has its name; the same data for
            two tasks; and as `load_dataset`.
    """
    parts: list[TrajectoryDataset] = []
    owner: dict[tuple[str, str], str] = {}
    for task in tasks:
        for place in _places(suite, task):
            part = _part(suite, task, place)
            if (other := owner.setdefault((place, part.tasks[0]), task)) != task:
                found, expected = f"{place}, as of {other}", "data of its own"
                hint = "where a data set holds several tasks, say which by data_task"
                problem, field = "two tasks have the same data", f"tasks.{task}.data"
                raise InputError(problem, field=field, found=found, expected=expected, hint=hint)
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
            _log.warning("data of %s: %s is in %s; it is read once", task, place, first)
    return [place for place in dict.fromkeys(places) if place in kept]


def _part(suite: TaskSuite, task: str, place: str) -> TrajectoryDataset:
    """A data set's episodes of a task, under the name that it has there."""
    reading = suite.reading(task)
    with located(field=f"tasks.{task}.data"):
        whole = load_dataset(place, reading=reading)
    if reading.success_return is not None:
        whole = with_success(whole, reading.success_return)
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
    return whole if wanted is None else whole.select_tasks([wanted])


def _recorded(suite: TaskSuite, task: str) -> Recorded:
    dataset = load_own_data(suite, [task])
    longest = int(np.diff(dataset.offsets).max())
    return Recorded(dataset.state_dim, dataset.action_dim, longest, dataset.texts[0])
