"""Reader of MTDiff's Meta-World files: one dict of arrays an episode, in NumPy or pickle files.

Layout (He et al. 2023, arXiv 2305.18459, as the files of its project are): `observations` (T, 39) float32, `actions`
(T, 4), `rewards` (T, 1), `next_observations` (T, 39), `terminals` (T, 1), and `task`, a string (or an array of one)
such as 'box-close-v2'. A flag in `terminals` marks where an episode ends at its time limit, and one dict may join
several episodes so. Meta-World ends no episode by itself: all terminals of the data set are False.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from llmdpd.data.assemble import as_float32, check_rows, join_episodes
from llmdpd.data.safe_pickle import load_arrays
from llmdpd.data.trajectories import EpisodeRecord, TrajectoryDataset, describe
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.tasks.metaworld.layout import GOAL, STATE_DIM
from llmdpd.tasks.metaworld.names import check_task, is_metaworld

_FIELDS = ("observations", "actions", "rewards", "next_observations", "terminals")
_WHAT = "a list or object array of dicts with " + ", ".join(_FIELDS)


def load_mtdiff(path: str | Path, reading: Reading = DEFAULT_READING) -> TrajectoryDataset:
    """Read one file; no code of it is run. Meta-World's names get version 3 (the same tasks); rewards become [N].

    `goal_visible` is read off the observations (numbers 36 to 38 all zero: hidden).

    Raises:
        InputError: not such a file, a pickle that asks for more than arrays, a missing or wrong field, NaN or Inf.
    """
    path = Path(path)
    records = _records(path)
    episodes = [episode for number, record in enumerate(records) for episode in _episodes(record, number, path)]
    dataset = join_episodes(episodes, source=str(path))
    return dataclasses.replace(dataset, goal_visible=_goal_visible(dataset))


def _goal_visible(dataset: TrajectoryDataset) -> bool | None:
    if dataset.state_dim != STATE_DIM:
        return None
    shown = np.logical_or.reduceat(dataset.observations[:, GOAL].any(axis=1), dataset.offsets[:-1])
    if shown.any() != shown.all():
        problem, found = "some episodes show the goal and others hide it", f"{shown.sum()} of {len(shown)} show it"
        path, expected = dataset.source, "the same in all"
        raise InputError(problem, path=path, field="observations", found=found, expected=expected)
    return bool(shown[0])


def _records(path: Path) -> list[Mapping[str, Any]]:
    try:
        value = _read(path)
    except FileNotFoundError:
        raise InputError("file not found", path=path) from None
    except OSError as error:
        raise InputError("the file cannot be read", path=path, found=str(error)) from None
    records = value if isinstance(value, list) else [value]
    wrong = next((r for r in records if not isinstance(r, dict)), None)
    if wrong is not None:
        raise InputError("not MTDiff's layout", path=path, found=describe(wrong), expected=_WHAT)
    if not records:
        raise InputError("the data set is empty", path=path, found="no episode", expected="one or more")
    return records


def _read(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _read_npz(path)
    with path.open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise InputError("the file is empty", path=path, found="0 bytes", expected=_WHAT)
        # Mapped, not read: no second copy of a large file, and a forged length never allocates more than there is.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_npy(mapped, path, None) if suffix == ".npy" else load_arrays(mapped, path)


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
    if min(shape, default=0) < 0 or len(data) != dtype.itemsize * math.prod(shape):
        found, expected = f"{len(data)} bytes", f"{dtype} {shape}"
        raise InputError("the file is cut off", path=path, field=field, found=found, expected=expected)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _read_npz(path: Path) -> Any:
    """Arrays of one episode under their field names, or arrays of dicts under any names."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {name[:-4]: _read_npy(io.BytesIO(archive.read(name)), path, name[:-4]) for name in names}
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile and its codecs raise their own kinds of errors
        raise InputError("not an .npz file, or a damaged one", path=path, found=str(error)[:200]) from None
    if "observations" in arrays:
        return arrays
    lists = [value if isinstance(value, list) else [value] for value in arrays.values()]
    return [record for part in lists for record in part]


def _episodes(record: Mapping[str, Any], number: int, path: Path) -> Iterator[EpisodeRecord]:
    """The episodes that one dict holds: rows up to and with a flag in `terminals`, and what is left after the last."""
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        found = ", ".join(sorted(str(name) for name in record))[:200]
        raise InputError("a field is missing", path=path, field=_at(missing[0], number), found=found, expected=_WHAT)
    arrays: dict[str, Any] = {}
    for name in _FIELDS:
        ndim = 1 if name in ("rewards", "terminals") else 2
        arrays[name] = as_float32(record[name], _at(name, number), str(path), ndim=ndim)
    steps = len(arrays["observations"])
    check_rows(arrays, steps, path, f" of record {number}")
    if steps == 0:
        raise InputError("an episode without steps", path=path, field=_at("observations", number), found="0 rows")
    shape, other = (list(arrays[name].shape) for name in ("observations", "next_observations"))
    if shape != other:
        field = _at("next_observations", number)
        raise InputError("wrong width", path=path, field=field, found=other, expected=shape)
    task, ends = _task(record, number, path), _ends(arrays.pop("terminals"), number, path).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield EpisodeRecord(task=task, **{name: array[start:end] for name, array in arrays.items()})


def _at(field: str, number: int) -> str:
    return f"{field} of record {number}"


def _ends(flags: NDArray[np.float32], number: int, path: Path) -> NDArray[np.int64]:
    if not np.isin(flags, (0.0, 1.0)).all():
        raise InputError("wrong flags", path=path, field=_at("terminals", number), found=flags[:8], expected="0 or 1")
    ends = np.flatnonzero(flags).astype(np.int64) + 1
    return ends if ends.size and ends[-1] == len(flags) else np.append(ends, len(flags))


def _task(record: Mapping[str, Any], number: int, path: Path) -> str:
    if "task" in record:
        value = record["task"]
        names = np.unique(value) if isinstance(value, np.ndarray) else np.array([value])
        if names.size != 1 or not isinstance(names.flat[0], str) or not names.flat[0]:
            found, expected = repr(value)[:80], "one task name"
            raise InputError("wrong task", path=path, field=_at("task", number), found=found, expected=expected)
        name = str(names.flat[0])
    else:
        # The project's own replay folders keep the name in the path: TASK/RUN/dataset/0.npz.
        folders = [part for part in (path.stem, *(p.name for p in path.parents)) if re.search(r"-v[23]\b", part)]
        if not folders:
            found, expected = "no `task`", "`task`, or a folder named like box-close-v2"
            problem = "the task is not known"
            raise InputError(problem, path=path, field=_at("task", number), found=found, expected=expected)
        name = re.sub(r"(-v[23]).*", r"\1", folders[0])
    return check_task(name) if is_metaworld(name) else name
