"""Trajectory data: in memory (`trajectories`), and one module for each file format, imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llmdpd.data.assemble import join_datasets, join_episodes
from llmdpd.data.checks import SpecOf, checked, in_one_spelling, recorded_name, spec_by_name
from llmdpd.data.formats import DataFormat
from llmdpd.data.search import FORMATS, is_named, sources_of
from llmdpd.data.trajectories import Batch, EpisodeRecord, Trajectory, TrajectoryDataset, resolve_task, same_task
from llmdpd.tasks.base import DEFAULT_READING, Reading

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
]

Wanted = Callable[[str], bool]
"""Whether a task of the data is asked for, by the name that the data give it."""


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
    if tasks is None:
        return join_datasets(read_parts(spec, reading, spec_by_name)[0])
    parts, names = read_parts(spec, reading, spec_by_name, lambda name: any(same_task(name, task) for task in tasks))
    found = [resolve_task(task, names, str(spec)) for task in tasks]
    return join_datasets(parts).select_tasks(found)


def read_parts(
    spec: str | Path, reading: Reading, spec_of: SpecOf, wanted: Wanted = lambda name: True
) -> tuple[list[TrajectoryDataset], list[str]]:
    """The data sets that `spec` names (see `load_dataset`), each checked, and the names of all tasks that they hold.

    Of a data set only the `wanted` tasks are kept; one without any is left out, and where its format says so before,
    not read.
    """
    parts, names = list[TrajectoryDataset](), list[str]()
    for known, load in sources_of(str(spec)):
        if known is not None and not wanted(recorded_name(known)):
            names.append(recorded_name(known))
            continue
        part = in_one_spelling(load(reading))
        names += part.tasks
        chosen = [name for name in part.tasks if wanted(name)]
        if chosen:
            part = part if len(chosen) == len(part.tasks) else part.select_tasks(chosen)
            parts.append(checked(part, spec_of, reading.success_return))
    return parts, list(dict.fromkeys(names))


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
