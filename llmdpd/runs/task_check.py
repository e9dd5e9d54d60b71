"""What is understood of a task file: its tasks, held against their environments and their recorded data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmdpd.data import TrajectoryDataset
from llmdpd.data.columns import blocks, extent
from llmdpd.data.task_data import load_tasks
from llmdpd.data.task_file import Owners, load_own_data, use_task_file
from llmdpd.errors import InputError, located
from llmdpd.prompts import task_prompt
from llmdpd.tasks.layout import Layout
from llmdpd.tasks.specs import TaskSpec, common_spec
from llmdpd.tasks.user.suite import UserSuite

# Infos that customarily say whether a step succeeds.
_SUCCESS_KEYS = ("is_success", "success")
_STARTS = 5
_HEARD = 0.1  # correlation of the body's way with its actions, below which a line asks
_ROWS = 1 << 18  # that the correlation is of, of more evenly spaced ones
_MOST = 0.5  # of the actions beyond the bounds, above which a line asks
# How far beyond the range of the data, in widths of it, an environment's start may lie before a line says so.
_FAR = 0.5


@dataclass
class TaskCheck:
    """A task of the file, as far as it was understood; None for what it does not have, or was not reached.

    starts: the environment's observations [N, S] at the start of a few episodes; error: what is wrong, where something
    is; notes: what deserves a look.
    """

    name: str
    split: str
    spec: TaskSpec | None = None
    data: TrajectoryDataset | None = None
    text: str | None = None
    text_source: str | None = None
    starts: NDArray[np.float32] | None = None
    error: InputError | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class FileCheck:
    """All tasks of a file, and what concerns them together."""

    suite: UserSuite
    tasks: list[TaskCheck]
    notes: list[str] = field(default_factory=list)
    error: InputError | None = None

    @property
    def errors(self) -> list[InputError]:
        """What is wrong with one task or another, or else with all of them together."""
        return [error for error in (*(task.error for task in self.tasks), self.error) if error is not None]


def check_task_file(path: Path) -> FileCheck:
    """Take a task file into use and look at each of its tasks; what is wrong with one does not hide the others.

    Raises:
        InputError: the file itself is wrong.
    """
    suite = use_task_file(path)
    owners: Owners = {}
    tasks = [_check_task(suite, name, owners) for name in suite.tasks]
    checked = FileCheck(suite, tasks)
    if not checked.errors:
        checked.error = _check_together(suite)
    checked.notes += _constant([task.data for task in tasks if task.data is not None])
    if suite.file.layout is None:
        checked.notes.append("no [suite.layout]: observations are plain numbers")
    if not suite.file.split("seen"):
        checked.notes.append('no task is seen: training needs one with split = "seen"')
    return checked


def _check_together(suite: UserSuite) -> InputError | None:
    """What training would find wrong with the tasks together: the calls that it makes itself."""
    seen, every = ([name for name in names if suite.data(name)] for names in (suite.file.split("seen"), suite.tasks))
    try:
        common_spec(suite.tasks)
        for names in dict.fromkeys(tuple(names) for names in (seen, every) if names):
            load_tasks(None, names, goal_visible=True)
    except InputError as error:
        return error
    return None


def _check_task(suite: UserSuite, name: str, owners: Owners) -> TaskCheck:
    own = suite.file.tasks[name]
    task = TaskCheck(name, own.split)
    try:
        task.spec = suite.spec(name)
        task.text_source = suite.text(name)[1]
        task.text = task_prompt(name).render()
        if own.env is not None:
            with located(suite.file.path):
                _try_environment(suite, task)
        if own.data:
            task.data = load_own_data(suite, [name], owners)
            task.data.check_matches(task.spec.state_dim, task.spec.action_dim, name)
            _compare(task, task.data)
        else:
            task.notes.append("no recorded data: name some by --data")
    except InputError as error:
        task.error = error
    return task


def _try_environment(suite: UserSuite, task: TaskCheck) -> None:
    """Take first steps in the environment: what it gives, and whether it says more than the file reads."""
    from llmdpd.tasks.user.environment import UserEnvironment

    own = suite.file.tasks[task.name]
    env = UserEnvironment(own, suite.file.folder)
    task.starts = np.stack([env.reset(seed) for seed in range(_STARTS)])
    env.try_out()
    unread = [key for key in _SUCCESS_KEYS if key in env.infos]
    if unread and not own.success:
        task.notes.append(f'the return counts; infos have {unread[0]!r}: success = "{unread[0]}" would read it')
    if env.keys and not own.observation:
        task.notes.append(f"a Dict observation is read whole, in Gymnasium's order: {', '.join(env.keys)}")
    env.close()


def _compare(task: TaskCheck, data: TrajectoryDataset) -> None:
    """Notes of what in the data does not look like the task's environment."""
    spec = task.spec
    assert spec is not None
    if spec.action_low is not None and spec.action_high is not None:
        low, high = np.array(spec.action_low, np.float32), np.array(spec.action_high, np.float32)
        beyond = sum(int(((part < low) | (part > high)).any(axis=1).sum()) for part in blocks(data.actions))
        if beyond:
            share = beyond / data.num_transitions
            asked = ": in the environment's units?" if share > _MOST else ""
            task.notes.append(f"{beyond} of {data.num_transitions} actions ({share:.1%}) are beyond the bounds{asked}")
    if spec.layout is not None and (heard := _heard(data, spec.layout)) is not None and heard < _HEARD:
        task.notes.append(
            f"the body's way in a step does not go with action.move (correlation {heard:.2f}): are the layout's "
            f"indices, and the order of the observation's keys, right?"
        )
    if task.starts is not None:
        low, high = extent(data.observations)
        width = _FAR * (high - low)
        outside = np.flatnonzero(((task.starts < low - width) | (task.starts > high + width)).any(axis=0))
        if len(outside):
            places = ", ".join(map(str, outside))
            task.notes.append(f"the environment starts where the data never are, in the numbers {places}: other keys?")
    longest = int(np.diff(data.offsets).max())
    if spec.limited and longest > spec.max_steps:
        what = "environment" if spec.has_environment else "task"
        task.notes.append(f"an episode of {longest} steps, and the {what} ends at {spec.max_steps}")
    if spec.has_success and (data.successes < 0).all():
        task.notes.append("the data do not say which episodes succeeded")
    if spec.has_success and (data.success_steps == 0).all():
        task.notes.append("every recorded episode succeeds with its first step: is that the success?")


def _heard(data: TrajectoryDataset, layout: Layout) -> float | None:
    """The correlation of the body's way in a step with the action that moves it, over the dimensions; None without."""
    if not layout.move:
        return None
    body, count = list(layout.body.at), data.num_transitions
    rows = np.linspace(0, count - 1, min(count, _ROWS)).astype(np.int64)
    way = data.next_observations[rows][:, body] - data.observations[rows][:, body]
    command = data.actions[rows][:, list(layout.move)]
    way, command = way - way.mean(0), command - command.mean(0)
    size = float(np.sqrt((way**2).sum() * (command**2).sum()))
    return float((way * command).sum()) / size if size > 0 else 0.0


def _constant(data: Sequence[TrajectoryDataset]) -> list[str]:
    """A note of the observation's numbers that never change in any task."""
    if not data or len({part.state_dim for part in data}) > 1:
        return []
    least, most = zip(*(extent(part.observations) for part in data), strict=True)
    low, high = np.min(least, axis=0), np.max(most, axis=0)
    places = np.flatnonzero(low == high)
    return [f"numbers of the observations that never change: {', '.join(map(str, places))}"] if len(places) else []
