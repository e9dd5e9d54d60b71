"""From the name of data to their readers: schemes, files, folders of files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llmdpd.data.checks import without_success
from llmdpd.data.flags import SUCCESS
from llmdpd.data.formats import DataFormat
from llmdpd.data.notes import say_once
from llmdpd.data.trajectories import TrajectoryDataset
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading
from llmdpd.utils.registry import Registry

FORMATS: Registry[DataFormat] = Registry(
    "file format",
    "llmdpd.formats",
    {
        "shards": "llmdpd.data.formats:SHARDS",  # before those of the files in the folder
        "minari": "llmdpd.data.formats:MINARI",
        "robomimic": "llmdpd.data.formats:ROBOMIMIC",  # asked before D4RL, which takes any other HDF5 file
        "d4rl": "llmdpd.data.formats:D4RL_HDF5",
        "lerobot": "llmdpd.data.formats:LEROBOT",
        "mtdiff": "llmdpd.data.formats:MTDIFF",
    },
)
"""File formats by name, each a `llmdpd.data.formats.DataFormat`; packages add theirs as entry points.

The first that reads a path takes it.
"""

_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """One data set that was found."""

    task: str | None  # where it is known without reading the data
    load: Callable[[Reading], TrajectoryDataset]


def is_named(spec: str) -> bool:
    """Whether `spec` names a data set by a scheme, such as `minari:ID`, and is no path."""
    scheme, colon, _ = spec.partition(":")
    return bool(colon) and any(scheme == each.scheme for each in FORMATS.values())


def sources_of(spec: str) -> list[Source]:
    """The data sets that a path or a name by a scheme stands for, each once.

    Raises:
        InputError: nothing there, nothing that can be read.
    """
    if is_named(spec):
        return [_named(spec)]
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError("no such file or folder", path=path, expected=_readable())
    sources = _search(path, {})
    if not sources:
        found = f"a file ending in {path.suffix!r}" if path.is_file() else "a folder without any of these"
        raise InputError("nothing here that can be read", path=path, found=found, expected=_readable())
    return sources


def recorded_environment(spec: str) -> str:
    """The environment in which the data were recorded, where all say the same one without being read; else "".

    Nothing is raised for data that are not there or damaged: reading them says it.
    """
    path = Path(spec).expanduser()
    if is_named(spec) or not path.exists():
        return ""
    try:
        found = {each.environment(place) for place, each in _places(path, {})}
    except InputError:
        return ""
    return found.pop() if len(found) == 1 else ""


def _readable() -> str:
    return ", ".join([*(each.readable for each in FORMATS.values()), "a folder of such files"])


def _named(spec: str) -> Source:
    scheme, _, name = spec.partition(":")
    if not name:
        raise InputError("no name given", field="data", found=spec, expected=_readable())
    each = next(each for each in FORMATS.values() if each.scheme == scheme)
    return Source(None, partial(_read, each, each.load_named, name))


def _search(path: Path, seen: dict[tuple[int, int], Path]) -> list[Source]:
    places = _places(path, seen)
    return [Source(each.task(place), partial(_read, each, each.load, place)) for place, each in places]


def _read(
    each: DataFormat, load: Callable[..., TrajectoryDataset], place: Path | str, reading: Reading
) -> TrajectoryDataset:
    """What a format reads, and what it could not: a part that it has not, a success that is not recorded."""
    if reading.part is not None and not each.parts:
        with_parts = ", ".join(other.readable for other in FORMATS.values() if other.parts)
        raise InputError(
            "data of this format have no named parts",
            path=place,
            field="part",
            found=reading.part,
            expected=f"none, or {with_parts}",
        )
    dataset = load(place, reading)
    # What this project recorded, without saying from what, is the success of the task itself.
    if reading.success is None or (dataset.success_from == "" and (dataset.successes >= 0).any()):
        return dataset
    if not _names(dataset.success_from, reading.success) and reading.success not in SUCCESS:
        dataset = without_success(dataset)
    if (dataset.successes < 0).all():
        words = "%s: no %s in the data: whether its episodes succeed is not known"
        if dataset.stored:
            words += f" (llmdpd data convert --success {reading.success} keeps it in shards)"
        say_once(_log, words, place, reading.success)
    elif not _names(dataset.success_from, reading.success):
        words = "%s: no %s in the data; %s says what succeeds"
        say_once(_log, words, place, reading.success, dataset.success_from)
    return dataset


def _names(success_from: str, key: str) -> bool:
    """Whether a success was read from this key, wherever it stands: "infos/success", "next.success"."""
    return any(each == key or each.endswith((f"/{key}", f".{key}")) for each in success_from.split(", "))


def _places(path: Path, seen: dict[tuple[int, int], Path]) -> list[tuple[Path, DataFormat]]:
    """The data sets at and below a path, with their formats.

    A link may lead to what was seen already, or above where it stands: each file and folder counts once.
    """
    status = path.stat()
    first = seen.setdefault((status.st_dev, status.st_ino), path)
    if first is not path:
        say_once(_log, "%s is %s again; it is read once", path, first)
        return []
    for each in FORMATS.values():
        if each.reads(path):
            return [(path, each)]
    if not path.is_dir():
        return []
    inner = sorted(child for child in path.iterdir() if not child.name.startswith(".") and child.exists())
    return [place for child in inner for place in _places(child, seen)]
