"""Trajectory data: in memory (`trajectories`), and one module for each file format, imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmdpd.data.assemble import join_datasets, join_episodes
from llmdpd.data.checks import SpecOf, checked, in_one_spelling, recorded_name
from llmdpd.data.formats import DataFormat
from llmdpd.data.search import FORMATS, Source, is_named, sources_of
from llmdpd.data.task_names import resolve_task, same_task
from llmdpd.data.trajectories import Batch, EpisodeRecord, Trajectory, TrajectoryDataset
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.tasks.specs import spec_by_name

__all__ = [
    "FORMATS",
    "Batch",
    "DataFormat",
    "EpisodeRecord",
    "Reading",
    "Trajectory",
    "TrajectoryDataset",
    "is_named",
    "join_datasets",
    "join_episodes",
    "load_dataset",
    "save_d4rl",
    "save_minari",
    "save_shards",
    "sources_of",
]


class Choice(NamedTuple):
    """Tasks of the data, and how they are read."""

    reading: Reading
    wanted: Callable[[str], bool] = lambda name: True  # whether a task, by the name that the data give it, is of them


def load_dataset(
    spec: str | Path, *, tasks: Sequence[str] | None = None, reading: Reading = DEFAULT_READING
) -> TrajectoryDataset:
    """Read the trajectories that `spec` names, all of them or only those of `tasks` (in that order).

    `spec` is the path of a data set in one of `FORMATS`, or of a folder that holds such data sets at any depth (hidden
    ones are left out), which are joined; or `minari:ID` or `d4rl:NAME`. A file that is reached twice is read once. No
    code from a file is run.

    `reading` says what a format leaves open: which keys of Dict observations, which key is the success. What is read is
    held against the tasks that suites know: see `llmdpd.data.checks`.

    Raises:
        InputError: nothing there, nothing that can be read, a damaged file, an unknown task (nearest names are given),
            parts that don't fit together, episodes longer than their task's.
    """
    if not isinstance(reading, Reading):
        raise InputError(
            "wrong reading", field="reading", found=f"a {type(reading).__name__}", expected="llmdpd.data.Reading(…)"
        )
    spec_of = spec_by_name if reading.by_name else lambda name: None
    if tasks is None:
        return join_datasets(read_parts(spec, [Choice(reading)], spec_of)[0])
    choice = Choice(reading, lambda name: any(same_task(name, task) for task in tasks))
    parts, names = read_parts(spec, [choice], spec_of)
    found = [resolve_task(task, names, str(spec)) for task in tasks]
    return join_datasets(parts).select_tasks(found)


def read_one_by_one(spec: str | Path, reading: Reading = DEFAULT_READING) -> Iterator[TrajectoryDataset]:
    """The data sets that `load_dataset` joins, each read when the iterator comes to it."""
    spec_of = spec_by_name if reading.by_name else lambda name: None
    for source in sources_of(str(spec)):
        yield from _read_source(source, [Choice(reading)], spec_of)[0]


def read_parts(
    spec: str | Path, choices: Sequence[Choice], spec_of: SpecOf
) -> tuple[list[TrajectoryDataset], list[str]]:
    """The data sets that `spec` names (see `load_dataset`), each checked, and the names of all tasks that they hold.

    Of a data set the tasks of each choice are kept, as its own reading has them; one without any is left out, and where
    its format says so before, not read.
    """
    parts, names = list[TrajectoryDataset](), list[str]()
    for source in sources_of(str(spec)):
        own, found = _read_source(source, choices, spec_of)
        parts += own
        names += found
    return parts, list(dict.fromkeys(names))


def _read_source(
    source: Source, choices: Sequence[Choice], spec_of: SpecOf
) -> tuple[list[TrajectoryDataset], Sequence[str]]:
    """What `read_parts` takes of one data set, which is read once for each choice that has tasks of it."""
    names: Sequence[str] | None = None if source.task is None else [recorded_name(source.task)]
    parts, failed = list[TrajectoryDataset](), list[tuple[Choice, InputError]]()
    for choice in choices:
        if names is not None and not any(map(choice.wanted, names)):
            continue
        try:
            part = in_one_spelling(source.load(choice.reading))
        except InputError as refused:  # this reading may be that of other tasks than the data's
            failed.append((choice, refused))
            continue
        names = part.tasks
        chosen = [name for name in names if choice.wanted(name)]
        if chosen:
            part = part if len(chosen) == len(names) else part.select_tasks(chosen)
            parts.append(checked(part, spec_of, choice.reading))
    for choice, error in failed:
        if names is None or any(map(choice.wanted, names)):
            raise error
    return parts, names or ()


def save_minari(
    dataset: TrajectoryDataset, root: str | Path, *, namespace: str = "metaworld", name: str = "scripted-v0"
) -> list[Path]:
    """See `llmdpd.data.minari.save_minari`."""
    from llmdpd.data import minari

    return minari.save_minari(dataset, root, namespace=namespace, name=name)


def save_d4rl(dataset: TrajectoryDataset, path: str | Path, **attributes: str | float) -> Path:
    """See `llmdpd.data.d4rl.save_d4rl`; keywords become the file's attributes."""
    from llmdpd.data import d4rl

    return d4rl.save_d4rl(dataset, path, attributes=attributes)


def save_shards(datasets: Iterable[TrajectoryDataset], folder: str | Path, **options: Any) -> Path:
    """See `llmdpd.data.shards.save_shards`, whose options these are."""
    from llmdpd.data import shards

    return shards.save_shards(datasets, folder, **options)
