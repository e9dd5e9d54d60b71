"""`llmdpd tasks check FILE`: what is understood of a task file, as tables and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from llmdpd.cli.common import command
from llmdpd.data.columns import extent
from llmdpd.errors import InputError
from llmdpd.runs.task_check import FileCheck, TaskCheck, check_task_file
from llmdpd.utils.command_line import parse
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import console

with extra("cli"):
    import tyro
    from rich.table import Table

_WORDS = 12


@dataclass(frozen=True)
class TasksConfig:
    """Say what is understood of a file with tasks of your own (tasks.toml), before anything is learned."""

    action: Annotated[Literal["check"], tyro.conf.Positional]
    """check: read the file, make its environments, read its data."""
    file: Annotated[Path, tyro.conf.Positional]
    """The task file."""
    out: Path | None = None
    """The picture of one episode of each task, a PNG; by default beside the file, as tasks.png, where there is no file
    of that name or an earlier picture of this command."""


def _table(checked: FileCheck) -> Table:
    """A row for each task: its sizes, its data, its text."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("task", "split", "S", "A", "limit", "episodes", "steps", "won", "text"):
        left = name in ("task", "split", "text")
        table.add_column(name, no_wrap=True, justify="left" if left else "right")
    for task in checked.tasks:
        spec, data = task.spec, task.data
        sizes = ("", "", "") if spec is None else (str(spec.state_dim), str(spec.action_dim), str(spec.max_steps))
        counts = ("", "", "") if data is None else (str(data.num_episodes), f"{data.num_transitions:,}", _won(task))
        table.add_row(task.name, task.split, *sizes, *counts, task.text_source or "")
    table.caption = "S, A: numbers of an observation, an action; limit: steps of an episode; won: episodes (or return)"
    return table


def _won(task: TaskCheck) -> str:
    assert task.data is not None
    if task.spec is None or not task.spec.has_success:
        return f"({np.mean(task.data.returns()):.4g})"
    known = task.data.successes >= 0
    won = int((task.data.successes == 1).sum())
    return f"{won}" if known.all() else f"{won} of {int(known.sum())}" if known.any() else "unknown"


def _tasks(words: list[str]) -> None:
    config = parse(TasksConfig, words, "llmdpd tasks")
    checked = check_task_file(config.file)
    file = checked.suite.file
    console.print(f"{file.path}: {len(file.tasks)} tasks of {file.name}", markup=False)
    console.print(_table(checked))
    for task in checked.tasks:
        words = [] if task.text is None else task.text.split()
        shown = " ".join(words[:_WORDS]) + (" …" if len(words) > _WORDS else "")
        console.print(f"{task.name} ({file.tasks[task.name].env or 'no environment'}): {shown}", markup=False)
    for line in [*_bounds(checked), *checked.notes, *(f"{t.name}: {note}" for t in checked.tasks for note in t.notes)]:
        console.print(f"- {line}", markup=False)
    _draw(checked, config.out)
    if checked.errors:
        # What is wrong with the file is found in each of its tasks.
        different = list({str(error): error for error in checked.errors}.values())
        for error in different[1:]:
            console.print(f"error: {error}", style="bold red", markup=False)
        raise different[0]


def _bounds(checked: FileCheck) -> list[str]:
    """A line of the actions' bounds, for each that differs."""
    lines = {}
    for task in checked.tasks:
        if task.spec is not None and task.spec.action_low is not None and task.spec.action_high is not None:
            pairs = zip(task.spec.action_low, task.spec.action_high, strict=True)
            lines[", ".join(f"{low:g} … {high:g}" for low, high in pairs)] = task.name
        elif task.data is not None:
            lows, highs = extent(task.data.actions)
            pairs = zip(lows, highs, strict=True)
            lines["none are known; the data range over " + ", ".join(f"{a:.3g} … {b:.3g}" for a, b in pairs)] = (
                task.name
            )
    return [f"bounds of actions: {line}" for line in lines]


def _draw(checked: FileCheck, out: Path | None) -> None:
    """The picture of an episode of each task that has data; nothing where none has.

    Raises:
        InputError: it cannot be written.
    """
    from llmdpd.reporting.task_picture import is_task_picture, save_task_picture

    path = out or checked.suite.file.path.with_suffix(".png")
    if path.is_dir():
        raise InputError("the picture cannot be written", path=path, found="a folder", expected="a file name")
    episodes = {task.name: task.data.episode(0).observations for task in checked.tasks if task.data is not None}
    if not episodes:
        return
    if out is None and path.exists() and not is_task_picture(path):
        console.print(f"no picture: {path} is there, and not from this command; name another by --out", markup=False)
        return
    try:
        save_task_picture(path, episodes, checked.suite.file.layout)
    except OSError as error:
        raise InputError("the picture cannot be written", path=path, found=error.strerror or str(error)) from None
    console.print(f"picture: {path.absolute()}", markup=False, soft_wrap=True)


main = command(_tasks)
