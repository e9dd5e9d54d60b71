"""Trajectory data: in memory (`trajectories`), and one module for each file format, imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmdpd.data.assemble import join_datasets, join_episodes
from llmdpd.data.trajectories import (
    Batch,
    EpisodeRecord,
    Trajectory,
    TrajectoryDataset,
    resolve_task,
)
from llmdpd.errors import InputError
from llmdpd.tasks import base_name

__all__ = [
    "Batch",
    "EpisodeRecord",
    "Trajectory",
    "TrajectoryDataset",
    "join_datasets",
    "join_episodes",
    "load_dataset",
    "save_d4rl",
    "save_minari",
]

READABLE = (
    "a Minari data set or a folder of them, an .hdf5 file of D4RL's layout, "
    "an .npy/.npz/.pkl file of MTDiff's, a folder of such files, minari:ID, d4rl:NAME"
)
_HDF5 = (".hdf5", ".h5")
_MTDIFF = (".npy", ".npz", ".pkl", ".pickle")


@dataclass(frozen=True)
class _Source:
    task: str | None  # where it is known without reading the data
    load: Callable[[], TrajectoryDataset]


def load_dataset(spec: str | Path, *, tasks: Sequence[str] | None = None) -> TrajectoryDataset:
    """Read trajectories from whatever `spec` names, all of them or those of `tasks` alone (in that order).

    `spec` is the path of a Minari data set, of a file in D4RL's or MTDiff's layout, or of a folder that holds any of
    these at any depth (hidden ones are left out), which are joined; or `minari:ID` or `d4rl:NAME`. No code from a file
    is run.

    Raises:
        InputError: nothing there, nothing that can be read, a damaged file, an unknown task (nearest names are given),
            parts that don't fit together.
    """
    text = str(spec)
    sources = _named(text) if text.startswith(("minari:", "d4rl:")) else _find(Path(spec).expanduser())
    if tasks is not None:
        known = list(dict.fromkeys(source.task for source in sources if source.task is not None))
        if all(source.task is not None for source in sources):
            wanted = {base_name(resolve_task(name, known, text)) for name in tasks}
        else:  # the names come out as the files are read; `select_tasks` checks them
            wanted = {base_name(name) for name in tasks}
        sources = [s for s in sources if s.task is None or base_name(s.task) in wanted] or sources
    dataset = join_datasets([source.load() for source in sources])
    return dataset if tasks is None else dataset.select_tasks(tasks)


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


def _named(spec: str) -> list[_Source]:
    kind, _, name = spec.partition(":")
    if not name:
        raise InputError("no name given", field="data", found=spec, expected=READABLE)
    if kind == "minari":
        from llmdpd.data.minari import load_minari_id

        return [_Source(None, partial(load_minari_id, name))]
    from llmdpd.data.d4rl import load_d4rl_by_name

    return [_Source(None, partial(load_d4rl_by_name, name))]


def _find(path: Path) -> list[_Source]:
    if not path.exists():
        raise InputError("no such file or folder", path=path, expected=READABLE)
    sources = _file(path) if path.is_file() else _folder(path)
    if not sources:
        found = f"a file ending in {path.suffix!r}" if path.is_file() else "a folder without any of these"
        raise InputError("nothing here that can be read", path=path, found=found, expected=READABLE)
    return sources


def _file(path: Path) -> list[_Source]:
    suffix = path.suffix.lower()
    if suffix in _HDF5:
        from llmdpd.data.d4rl import load_d4rl

        return [_Source(None, partial(load_d4rl, path))]
    if suffix in _MTDIFF:
        from llmdpd.data.mtdiff import load_mtdiff

        return [_Source(None, partial(load_mtdiff, path))]
    return []


def _folder(folder: Path) -> list[_Source]:
    # A Minari data set is a folder with this file, and its inside is not looked at for files of other formats.
    if (folder / "metadata.json").is_file():
        from llmdpd.data.minari import is_minari, load_minari, minari_task

        if is_minari(folder):
            return [_Source(minari_task(folder), partial(load_minari, folder))]
    inner = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    return [source for child in inner for source in (_folder(child) if child.is_dir() else _file(child))]
