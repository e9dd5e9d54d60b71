"""A user's task file in use: its tasks become this process's, their data and texts are read when they are asked."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from llmdpd.data import Choice, TrajectoryDataset, is_named, join_datasets, read_parts
from llmdpd.data.checks import SpecOf, with_success
from llmdpd.data.config import DataConfig
from llmdpd.data.notes import say_once
from llmdpd.errors import InputError, located
from llmdpd.tasks.base import Reading, TaskSuite
from llmdpd.tasks.specs import find_suite, spec_by_name
from llmdpd.tasks.user import use_file, user_suite
from llmdpd.tasks.user.file import absolute, read_task_file
from llmdpd.tasks.user.suite import NOTHING, Given, Recorded, UserSuite

_log = logging.getLogger(__name__)


def use_task_file(
    path: str | Path,
    content: str | None = None,
    texts: Mapping[str, str] | None = None,
    given: Given = NOTHING,
) -> UserSuite:
    """Read a task file and make its tasks known to this process by their names, in place of another file's.

    Its environments, modules and data are looked at anew, also those of the file that is in use already, unless that
    is gone by now: then nothing changes. Worker processes that are made from then on know the tasks, too.

    Args:
        path: the file.
        content, texts: stand in for the text of a file that was changed or is gone, and for the texts of the text
            files that it names, by task.
        given: stand in for the data that the file names, or does not.

    Raises:
        InputError: as `read_task_file`.
    """
    path, present = absolute(path), user_suite()
    if content is None and present is not None and path == present.file.path and not path.exists():
        return present
    return use_file(read_task_file(path, is_named, content, texts), _recorded, given)


def task_file_in_use(path: str | Path, given: Given = NOTHING) -> UserSuite:
    """As `use_task_file`, but a file that is in use already stays so, unless it, or the given data, are others by now.

    Raises:
        InputError: as `read_task_file`.
    """
    path, present = absolute(path), user_suite()
    if present is None or path != present.file.path:
        return use_task_file(path, given=given)
    gone = not path.exists()
    if present.given == given and (gone or read_task_file(path, is_named) == present.file):
        return present
    return use_file(present.file, _recorded, given) if gone else use_task_file(path, given=given)


def given_data(config: DataConfig) -> Given:
    """What a run's configuration gives its task file's tasks."""
    return Given(config.path, config.demonstrations)


_opened: WeakKeyDictionary[TaskSuite, dict[tuple[str, Reading], tuple[list[TrajectoryDataset], TrajectoryDataset]]]
_opened = WeakKeyDictionary()
"""Data in shards that a suite's tasks share: of 100,000 tasks in one folder, each would open it anew."""

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
    for task in dict.fromkeys(tasks):
        for number, place in enumerate(_places(suite, task)):
            part = _part(suite, task, place, owners)
            # Of several data sets of a task the first one's description counts.
            parts.append(dataclasses.replace(part, tasks=(task,), texts=("",) if number else part.texts))
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
    # The threshold of a success is this task's alone, and not of others that the data may hold.
    shared = dataclasses.replace(reading, success_return=None, task=None)
    opened = _opened.setdefault(suite, {})
    if (place, shared) in opened:
        parts, whole = opened[place, shared]
    else:
        with _of_its_data(task):
            parts, _ = read_parts(place, [Choice(shared)], spec_of)
            whole = join_datasets(parts)
        if whole.stored:
            opened[place, shared] = parts, whole
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


@contextmanager
def _of_its_data(task: str) -> Iterator[None]:
    """Name the task in the errors of reading its data, and the key of the task file where that is at fault."""
    try:
        with located(field=f"tasks.{task}.data"):
            yield
    except InputError as error:
        if error.field != f"tasks.{task}.data.part":
            raise
        field, found, expected = f"tasks.{task}.data_part", error.found, error.expected
        raise InputError(
            error.problem, path=error.path, field=field, found=found, expected=expected, hint=error.hint
        ) from None


def _recorded(suite: UserSuite, task: str) -> Recorded:
    """What the data that are given say of a task; of one that these do not have, its own, then the demonstrations."""
    given, own = suite.given, bool(suite.data(task))
    dataset = None if given.data is None else _given(suite, task, given.data)
    if dataset is None and not own and given.demonstrations is not None:
        dataset = _given(suite, task, given.demonstrations)
    if dataset is None:
        dataset = load_own_data(suite, [task])
    longest = int(np.diff(dataset.offsets).max())
    text = dataset.texts[0] or (load_own_data(suite, [task]).texts[0] if own else "")
    return Recorded(dataset.state_dim, dataset.action_dim, longest, text)


def _given(suite: UserSuite, task: str, place: str) -> TrajectoryDataset | None:
    """A task's episodes in data that stand in for its own; None: there are none.

    Data of one task alone that no suite knows are those of a task that has no others.
    """
    reading, own = suite.reading(task), bool(suite.data(task))
    called = reading.task or task
    choice = Choice(
        dataclasses.replace(reading, task=None), lambda name: name == called or (not own and find_suite(name) is None)
    )
    parts, names = read_parts(place, [choice], lambda name: None)
    chosen = [part.select_tasks([called]) for part in parts if called in part.tasks]
    if not chosen and len(names) == 1:
        chosen = parts
    return join_datasets([dataclasses.replace(part, tasks=(task,)) for part in chosen]) if chosen else None
