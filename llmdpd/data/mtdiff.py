"""Reader of NumPy and pickle files: dicts of arrays, one an episode, or the flat arrays of a whole data set.

Lists of dicts are MTDiff's (He et al. 2023, arXiv 2305.18459, as the files of its project are: `observations` (T, 39),
`actions` (T, 4), `rewards` (T, 1), `next_observations` (T, 39), `terminals` (T, 1), and `task`, a string or an array of
one such as 'box-close-v2'), and those of Decision Transformer and LaMo, which have no `task`. One dict may join several
episodes. Flat arrays under their names (`np.savez(**env.get_dataset())`, OGBench's) are D4RL's layout. What their flags
mean is said in `llmdpd.data.flags`.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from llmdpd.data.assemble import join_episodes
from llmdpd.data.content import array_of, check_expansion, kind_of
from llmdpd.data.flat import LAYOUT, Steps, load_flat, name_from_path, read_steps, widths_of
from llmdpd.data.safe_pickle import load_arrays
from llmdpd.data.trajectories import EpisodeRecord, TrajectoryDataset, describe
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.utils.files import check_regular

_NUMBERS = ("observations", "actions", "rewards", "next_observations")
_WHAT = f"a list or object array of dicts with {LAYOUT}, or such arrays themselves"


def load_mtdiff(path: str | Path, reading: Reading = DEFAULT_READING) -> TrajectoryDataset:
    """Read one file; no code of it is run. Rewards and flags may be columns [N, 1].

    A task without a name (`task`) has its file's or folder's.

    Raises:
        InputError: not such a file, a pickle that asks for more than arrays, a missing or wrong field, NaN or Inf.
    """
    path = Path(path)
    records = _records(path)
    if isinstance(records, dict):
        name = _task(records, "", path) or name_from_path(path, widths_of(records, reading))
        return load_flat(records, name, reading, path)
    names = [_task(record, _label(number), path) for number, record in enumerate(records)]
    if any(names) and not all(names):
        number = names.index("")
        raise InputError("the task is not known", path=path, field="task" + _label(number), found="no `task`")
    common, success_from = name_from_path(path, widths_of(records[0], reading)), set[str]()
    episodes: list[EpisodeRecord] = []
    for number, (name, record) in enumerate(zip(names, records, strict=True)):
        steps = read_steps(record, name or common, reading, path, _label(number))
        episodes += _episodes(steps, name or common)
        success_from.add(steps.success_from)
    return join_episodes(episodes, source=str(path), success_from=", ".join(sorted(success_from - {""})))


def _records(path: Path) -> dict[str, Any] | list[dict[str, Any]]:
    """The one dict of a file, or its list of dicts."""
    check_regular(path)
    try:
        value = _read(path)
    except OSError as error:
        raise InputError("the file cannot be read", path=path, found=str(error)) from None
    if isinstance(value, dict):
        return value
    records = value if isinstance(value, list) else [value]
    wrong = [record for record in records if not isinstance(record, dict)]
    if wrong:
        raise InputError("not a layout that is known", path=path, found=describe(wrong[0]), expected=_WHAT)
    if not records:
        raise InputError("the data set is empty", path=path, found="no episode", expected="one or more")
    return records


def _read(path: Path) -> Any:
    kind = kind_of(path) or path.suffix.lower().removeprefix(".")
    if kind == "npz":
        return _read_npz(path)
    with path.open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise InputError("the file is empty", path=path, found="0 bytes", expected=_WHAT)
        # Mapped, not read: no second copy of a large file, and a forged length never allocates more than there is.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_npy(mapped, path, None) if kind == "npy" else load_arrays(mapped, path)


def _read_npy(file: io.BytesIO | mmap.mmap, path: Path, field: str | None) -> Any:
    """One array of the .npy format; an array of objects as a flat list."""
    try:
        version = npy_format.read_magic(file)
        header = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
        shape, fortran, dtype = header[version](file)
    except Exception as error:  # a damaged header is parsed as Python literals, which can fail in many ways
        found = f"{type(error).__name__}: {error}"[:200]
        raise InputError("not a NumPy file", path=path, field=field, found=found, expected=_WHAT) from None
    if dtype.hasobject:
        value = load_arrays(file, path, field)
        return value if isinstance(value, list) else [value]
    data = file.read()
    if min(shape, default=0) < 0 or not dtype.itemsize or len(data) != dtype.itemsize * math.prod(shape):
        found, expected = f"{len(data)} bytes", f"{dtype} {shape}"
        raise InputError("the file is cut off", path=path, field=field, found=found, expected=expected)
    try:
        return array_of(data, dtype, shape, fortran)
    except ValueError as error:
        raise InputError("not a NumPy file", path=path, field=field, found=str(error), expected=_WHAT) from None


def _read_npz(path: Path) -> Any:
    """Arrays of one episode under their field names, or arrays of dicts under any names."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_expansion(archive, path)
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {name[:-4]: _read_npy(_unpacked(archive, name), path, name[:-4]) for name in names}
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile and its codecs raise their own kinds of errors
        raise InputError("not an .npz file, or a damaged one", path=path, found=str(error)[:200]) from None
    if "observations" in arrays:
        return arrays
    lists = [value if isinstance(value, list) else [value] for value in arrays.values()]
    return [record for part in lists for record in part]


def _unpacked(archive: zipfile.ZipFile, name: str) -> io.BytesIO:
    """A part of a zip, not more of it than its entry states: `ZipFile.read` unpacks all that is there."""
    with archive.open(name) as part:
        return io.BytesIO(part.read(archive.getinfo(name).file_size))


def _episodes(steps: Steps, task: str) -> Iterator[EpisodeRecord]:
    ends = np.cumsum(steps.lengths)
    for end, length, (success, step) in zip(ends, steps.lengths, steps.outcomes, strict=True):
        rows = slice(int(end - length), int(end))
        observations, actions, rewards, following = (steps.arrays[name][rows] for name in _NUMBERS)
        yield EpisodeRecord(
            *(observations, actions, rewards, task),
            next_observations=following,
            terminated=bool(steps.terminals[rows][-1]),
            success=success,
            success_step=step,
        )


def _label(number: int) -> str:
    return f" of record {number}"


def _task(record: Mapping[str, Any], label: str, path: Path) -> str:
    """The task that a dict names; "" where it names none."""
    if "task" not in record:
        return ""
    value = record["task"]
    names = np.unique(value) if isinstance(value, np.ndarray) else np.array([value])
    if names.size != 1 or not isinstance(names.flat[0], str) or not names.flat[0]:
        found, expected = repr(value)[:80], "one task name"
        raise InputError("wrong task", path=path, field="task" + label, found=found, expected=expected)
    return str(names.flat[0])
