"""What killed runs left of collections in a shared folder: the next run takes their episodes, or removes them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from llmdpd.data.collecting.scripted import MANIFEST, CollectConfig, content_of, partial_folder
from llmdpd.errors import InputError
from llmdpd.utils.files import process_lock, read_json

_PARTIAL = partial_folder(Path("x")).suffix


class _CollectedNowError(Exception):
    """Another process is at it."""


def take_over(config: CollectConfig, out: Path, folders: str) -> None:
    """Give `out` the episodes of its tasks that unfinished collections of the same settings have.

    An episode does not depend on what else is collected. The others keep theirs, since their runs may go on.

    Args:
        config: resolved; the tasks that are still to be collected.
        out: the collection's folder, whose neighbours are looked through.
        folders: pattern of the neighbours' names.
    """
    for partial, own in _unfinished(config, out, folders):
        for task in own & set(config.tasks):
            for episode in sorted((partial / task).glob("[0-9]*.npz")):
                target = partial_folder(out) / task / episode.name
                target.parent.mkdir(parents=True, exist_ok=True)
                # Another file system, or one without links: it is collected again.
                with suppress(OSError):
                    os.link(episode, target)


def remove_superseded(config: CollectConfig, out: Path, folders: str) -> None:
    """Remove unfinished collections of the same settings whose tasks are all in finished ones. Arguments as above."""
    finished = {task for folder in out.parent.glob(folders) for task in _tasks(config, _settings(folder).get("config"))}
    for partial, own in _unfinished(config, out, folders):
        if own <= finished:
            shutil.rmtree(partial, ignore_errors=True)


def _unfinished(config: CollectConfig, out: Path, folders: str) -> Iterator[tuple[Path, set[str]]]:
    """Those that no process collects into at present, `out`'s own aside, and their tasks."""

    def busy(holder: int | None) -> NoReturn:
        raise _CollectedNowError

    for partial in sorted(out.parent.glob(f"{folders}{_PARTIAL}")):
        tasks = _tasks(config, _settings(partial))
        name = partial.name.removesuffix(_PARTIAL)
        if tasks and name != out.name:
            with suppress(_CollectedNowError), process_lock(out.with_name(f".{name}.lock"), busy):
                yield partial, tasks


def _settings(folder: Path) -> dict[str, Any]:
    """What its manifest says; nothing where there is none, or none that can be read."""
    try:
        found = read_json(folder / MANIFEST)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _tasks(config: CollectConfig, settings: Any) -> set[str]:
    """The tasks of a collection with the same settings but for these; none of one with others."""
    tasks = settings.get("tasks") if isinstance(settings, dict) else None
    same = isinstance(tasks, list) and settings == {**content_of(config), "tasks": tasks}
    return {task for task in tasks or () if isinstance(task, str)} if same else set()
