"""Trajectory data: in memory (`trajectories`), and one module for each file format, imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llmdpd.data.assemble import join_datasets, join_episodes
from llmdpd.data.formats import DataFormat
from llmdpd.data.trajectories import Batch, EpisodeRecord, Trajectory, TrajectoryDataset, resolve_task
from llmdpd.errors import InputError
from llmdpd.tasks import base_name
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.utils.registry import Registry

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

FORMATS: Registry[DataFormat] = Registry(
    "file format",
    "llmdpd.formats",
    {
        "minari": "llmdpd.data.formats:MINARI",
        "robomimic": "llmdpd.data.formats:ROBOMIMIC",  # asked before D4RL, which takes any other HDF5 file
        "d4rl": "llmdpd.data.formats:D4RL_HDF5",
        "lerobot": "llmdpd.data.formats:LEROBOT",
        "mtdiff": "llmdpd.data.formats:MTDIFF",
    },
)
"""File formats by name, each a `llmdpd.data.formats.DataFormat`; packages add theirs as entry points."""


_Source = tuple[str | None, Callable[[Reading], TrajectoryDataset]]
"""(task where it is known without reading the data, the reader)."""


def load_dataset(
    spec: str | Path, *, tasks: Sequence[str] | None = None, reading: Reading = DEFAULT_READING
) -> TrajectoryDataset:
    """Read the trajectories that `spec` names, all of them or only those of `tasks` (in that order).

    `spec` is the path of a data set in one of `FORMATS`, or of a folder that holds such data sets at any depth (hidden
    ones are left out), which are joined; or `minari:ID` or `d4rl:NAME`. No code from a file is run.

    `reading` says what a format leaves open: which keys of Dict observations, which key is the success.

    Raises:
        InputError: nothing there, nothing that can be read, a damaged file, an unknown task (nearest names are given),
            parts that don't fit together.
    """
    text = str(spec)
    sources = [_named(text)] if is_named(text) else _find(Path(spec).expanduser())
    if tasks is not None:
        known = list(dict.fromkeys(task for task, _ in sources if task is not None))
        # Otherwise the names come out as the files are read; `select_tasks` checks them.
        whole = all(task is not None for task, _ in sources)
        wanted = {base_name(resolve_task(name, known, text) if whole else name) for name in tasks}
        sources = [s for s in sources if s[0] is None or base_name(s[0]) in wanted] or sources
    dataset = join_datasets([load(reading) for _, load in sources])
    return dataset if tasks is None else dataset.select_tasks(tasks)


def is_named(spec: str) -> bool:
    """Whether `spec` names a data set by a scheme, such as `minari:ID`, and is no path."""
    scheme, colon, _ = spec.partition(":")
    return bool(colon) and any(scheme == each.scheme for each in FORMATS.values())


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


def _readable() -> str:
    return ", ".join([*(each.readable for each in FORMATS.values()), "a folder of such files"])


def _named(spec: str) -> _Source:
    scheme, _, name = spec.partition(":")
    if not name:
        raise InputError("no name given", field="data", found=spec, expected=_readable())
    each = next(each for each in FORMATS.values() if each.scheme == scheme)
    return None, lambda reading: each.load_named(name, reading)


def _find(path: Path) -> list[_Source]:
    if not path.exists():
        raise InputError("no such file or folder", path=path, expected=_readable())
    sources = _search(path)
    if not sources:
        found = f"a file ending in {path.suffix!r}" if path.is_file() else "a folder without any of these"
        raise InputError("nothing here that can be read", path=path, found=found, expected=_readable())
    return sources


def _search(path: Path) -> list[_Source]:
    for each in FORMATS.values():
        if each.reads(path):
            return [(each.task(path), partial(each.load, path))]
    if not path.is_dir():
        return []
    inner = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    return [source for child in inner for source in _search(child)]
