"""Reader and writer of D4RL's HDF5 layout (Fu et al. 2020, arXiv 2004.07219).

Flat arrays `observations` [N, S], `actions` [N, A], `rewards` [N], `terminals` [N], `timeouts` [N] and, in newer files,
`next_observations` [N, S]. A row with `terminals` or `timeouts` set is the last of its episode. A timeout is no
terminal; a row with both is a terminal.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import check_rows
from llmdpd.data.trajectories import TrajectoryDataset, check_finite, offsets_of
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.utils.files import atomic_writer

_REQUIRED = ("observations", "actions", "rewards", "terminals", "timeouts")
_LAYOUT = ", ".join(_REQUIRED)
_FILES = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
_OLD_FILES_HINT = "D4RL's first files (-v0) have no timeouts: take the -v2 file of the same name"


def load_d4rl(path: str | Path, reading: Reading = DEFAULT_READING, *, task: str | None = None) -> TrajectoryDataset:
    """Read one file as one task: `task`, or the file's attribute `environment`, or its name without the suffix.

    With `next_observations`, every row is kept. Without, a row's next observation is the next row's where both are of
    one episode; the last row of an episode that timed out, or that the file's end cut off, is left out, for its next
    observation is not known; at a terminal, where it is multiplied by zero, the row's own observation stands in.

    Raises:
        InputError: no HDF5, cut off, a field missing, of a wrong shape or type, NaN or Inf, unequal lengths, empty.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            arrays = _read_fields(file, path)
            name = task or _text_attribute(file, "environment") or path.stem
    except OSError as error:
        raise _unreadable(path, error) from None
    return _assemble(arrays, name, path)


def collector_of(path: str | Path) -> str:
    """The file's attribute `collector`, which this project writes; "" if absent, as in D4RL's own files."""
    with h5py.File(path, "r") as file:
        return _text_attribute(file, "collector")


def load_d4rl_by_name(name: str, reading: Reading = DEFAULT_READING) -> TrajectoryDataset:
    """Read D4RL's data set `name` ('hopper-medium-replay-v2'), fetched by the `d4rl` package.

    Raises InputError where the package cannot be imported (with how to do without), or does not know the name.
    """
    try:
        infos = importlib.import_module("d4rl.infos")
        download = importlib.import_module("d4rl.offline_env").download_dataset_from_url
    except Exception as error:  # importing d4rl runs mujoco-py's set-up, which raises its own kinds of errors
        mujoco = re.fullmatch(r"((?:ant|halfcheetah|hopper|walker2d)[a-z-]*)-(v[0-2])", name)
        hint = "it is not needed: fetch the data set's .hdf5 file and give its path instead"
        if mujoco:
            hint += f": curl -LO {_FILES}/{mujoco[1].replace('-', '_')}-v2.hdf5"
        problem, found = "the d4rl package cannot be used here", f"{type(error).__name__}: {error}"[:200]
        expected = "an importable d4rl (it needs mujoco-py and gym < 0.25)"
        raise InputError(problem, field=f"d4rl:{name}", found=found, expected=expected, hint=hint) from None
    if name not in infos.DATASET_URLS:
        raise InputError("d4rl has no such data set", field="name", found=name, expected="a name in d4rl.infos")
    try:
        path = download(infos.DATASET_URLS[name])
    except OSError as error:  # urllib's errors are of this kind
        found = f"{type(error).__name__}: {error}"[:200]
        hint = f"fetch {infos.DATASET_URLS[name]} where there is a network, and give the file's path instead"
        raise InputError("d4rl can't fetch the data set", field=f"d4rl:{name}", found=found, hint=hint) from None
    return load_d4rl(path, reading, task=name)


def save_d4rl(dataset: TrajectoryDataset, path: str | Path, *, attributes: Mapping[str, Any] | None = None) -> Path:
    """Write a data set of one task in D4RL's layout, with `next_observations`; whole or not at all.

    The task is kept as attribute `environment`; `attributes` are added. Reading gives the same transitions and
    episodes. What the layout has no place for is not kept: text, seeds, noise levels, success, expert actions.

    Raises:
        InputError: episodes of more than one task.
    """
    path = Path(path)
    used = sorted({dataset.tasks[i] for i in np.unique(dataset.task_ids)})
    if len(used) != 1:
        raise InputError("D4RL's layout holds one task", path=path, field="tasks", found=", ".join(used))
    timeouts = np.zeros(dataset.num_transitions, np.bool_)
    timeouts[dataset.offsets[1:] - 1] = True
    timeouts &= ~dataset.terminals
    with atomic_writer(path) as temporary, h5py.File(temporary, "w") as file:
        for name in ("observations", "actions", "rewards", "next_observations"):
            file.create_dataset(name, data=getattr(dataset, name), compression="gzip", compression_opts=4)
        file.create_dataset("terminals", data=dataset.terminals)
        file.create_dataset("timeouts", data=timeouts)
        file.attrs["environment"] = used[0]
        file.attrs.update(attributes or {})
    return path


def _unreadable(path: Path, error: OSError) -> InputError:
    if not path.is_file():
        return InputError("file not found", path=path)
    size = path.stat().st_size
    problem, found = "the HDF5 file is cut off or damaged", f"{size} bytes; {error}"[:300]
    if size == 0:
        problem, found = "the file is empty", "0 bytes"
    elif not h5py.is_hdf5(path):
        with path.open("rb") as file:
            problem, found = "not an HDF5 file", f"starts with {file.read(8)!r}"
    return InputError(problem, path=path, found=found, expected=f"HDF5 with {_LAYOUT}")


def _read_fields(file: h5py.File, path: Path) -> dict[str, NDArray[Any]]:
    missing = [name for name in _REQUIRED if name not in file]
    if missing:
        hint = _OLD_FILES_HINT if missing == ["timeouts"] else None
        if any(name.startswith("episode_") for name in file):
            hint = "this file is the inside of a Minari data set: give the folder that holds its `data` folder"
        found = ", ".join(sorted(file)[:12]) or "no field at all"
        raise InputError("a field is missing", path=path, field=missing[0], found=found, expected=_LAYOUT, hint=hint)
    wide = ("observations", "actions", "next_observations")
    names = [name for name in (*wide, "rewards", "terminals", "timeouts") if name in file]
    arrays = {name: _read_numbers(file, name, path, ndim=2 if name in wide else 1) for name in names}
    rows = len(arrays["observations"])
    check_rows(arrays, rows, path)
    if rows == 0:
        raise InputError("the data set is empty", path=path, field="observations", found="0 rows", expected="1 or more")
    return arrays


def _read_numbers(file: h5py.File, name: str, path: Path, *, ndim: int) -> NDArray[np.float32]:
    """One field as float32, converted while it is read, so that a float64 file is never in memory as such."""
    field = file[name]
    if not isinstance(field, h5py.Dataset) or field.dtype.kind not in "fiub" or field.shape is None:
        found = f"type {field.dtype}" if isinstance(field, h5py.Dataset) else "a group"
        raise InputError("not an array of numbers", path=path, field=name, found=found, expected="real numbers")
    column = ndim == 1 and field.ndim == 2 and field.shape[1] == 1
    if field.ndim != ndim and not column:
        found, expected = f"shape {list(field.shape)}", "[N, width]" if ndim == 2 else "[N] or [N, 1]"
        raise InputError("wrong number of dimensions", path=path, field=name, found=found, expected=expected)
    values = np.asarray(field[()], np.float32) if field.dtype.kind == "b" else field.astype(np.float32)[()]
    check_finite(values, name, str(path))
    return values.reshape(-1) if column else values


def _text_attribute(file: h5py.File, name: str) -> str:
    value = file.attrs.get(name, "")
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text if isinstance(text, str) else ""


def _flags(values: NDArray[np.float32], name: str, path: Path) -> NDArray[np.bool_]:
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError("wrong flags", path=path, field=name, found=f"{values[row]} at row {row}", expected="0 or 1")
    return values != 0


def _assemble(arrays: dict[str, Any], task: str, path: Path) -> TrajectoryDataset:
    terminals = _flags(arrays.pop("terminals"), "terminals", path)
    last = terminals | _flags(arrays.pop("timeouts"), "timeouts", path)
    last[-1] = True  # the file's end cuts off what is still running
    observations = arrays["observations"]
    following = arrays.pop("next_observations", None)
    lengths = np.diff(np.flatnonzero(last), prepend=-1)
    if following is not None and following.shape != observations.shape:
        found, expected = list(following.shape), list(observations.shape)
        raise InputError("wrong width", path=path, field="next_observations", found=found, expected=expected)
    if following is None:
        following = np.concatenate([observations[1:], observations[-1:]])
        following[terminals] = observations[terminals]
        keep = ~last | terminals
        lengths = np.add.reduceat(keep.astype(np.int64), np.cumsum(lengths) - lengths)
        lengths = lengths[lengths > 0]
        if not lengths.size:
            problem, wanted = "no transition with a next observation", "the field, or an episode of two steps or more"
            raise InputError(problem, path=path, field="next_observations", found="absent", expected=wanted)
        arrays = {name: array[keep] for name, array in arrays.items()}
        following, terminals = following[keep], terminals[keep]
    episodes = len(lengths)
    return TrajectoryDataset(
        **arrays,
        next_observations=following,
        terminals=terminals,
        offsets=offsets_of(lengths),
        task_ids=np.zeros(episodes, np.int32),
        tasks=(task,),
        texts=("",),
        noise_levels=np.full(episodes, np.nan, np.float32),
        successes=np.full(episodes, -1, np.int8),
        seeds=np.full(episodes, -1, np.int64),
        success_steps=np.full(episodes, -1, np.int64),
        source=str(path),
    )
