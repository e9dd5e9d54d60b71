"""Reader and writer of D4RL's HDF5 layout (Fu et al. 2020, arXiv 2004.07219).

Flat arrays `observations` [N, S], `actions` [N, A], `rewards` [N], `terminals` [N], `timeouts` [N] and, in newer files,
`next_observations` [N, S]. A row with `terminals` or `timeouts` set is the last of its episode. A timeout is no
terminal; a row with both is a terminal.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmdpd.data.flags import MASKS, TERMINALS, TIMEOUTS, success_names
from llmdpd.data.flat import LAYOUT, WIDE, load_flat, name_from_path, widths_of
from llmdpd.data.hdf5 import hdf5_bytes, member, open_hdf5, read_numbers, text_attribute
from llmdpd.data.trajectories import TrajectoryDataset
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_write_bytes

with extra("data"):
    import h5py

_FILES = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"


def load_d4rl(path: str | Path, reading: Reading = DEFAULT_READING, *, task: str | None = None) -> TrajectoryDataset:
    """Read one file as one task: `task`, or the file's attribute `environment`, or its name without the suffix.

    Of files without `next_observations`, some rows are left out: see `llmdpd.data.flat`.

    Raises:
        InputError: no HDF5, cut off, a field missing, of a wrong shape or type, NaN or Inf, unequal lengths, empty.
    """
    path = Path(path)
    with open_hdf5(path, f"HDF5 with {LAYOUT}") as file:
        fields, environment = _read_fields(file, path, reading), text_attribute(file, "environment")
    name = task or environment or name_from_path(path, widths_of(fields, reading))
    return load_flat(fields, name, reading, path, environment)


def collector_of(path: str | Path) -> str:
    """The file's attribute `collector`, which this project writes; "" if absent, as in D4RL's own files."""
    with open_hdf5(path, f"HDF5 with {LAYOUT}") as file:
        return text_attribute(file, "collector")


def environment_of(path: str | Path) -> str:
    """The file's attribute `environment`; "" if absent. Raises InputError for a file that can't be opened."""
    with open_hdf5(path, f"HDF5 with {LAYOUT}") as file:
        return text_attribute(file, "environment")


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

    def fill(file: h5py.File) -> None:
        for name in ("observations", "actions", "rewards", "next_observations"):
            file.create_dataset(name, data=getattr(dataset, name), compression="gzip", compression_opts=4)
        file.create_dataset("terminals", data=dataset.terminals)
        file.create_dataset("timeouts", data=timeouts)
        file.attrs["environment"] = used[0]
        file.attrs.update(attributes or {})

    atomic_write_bytes(path, hdf5_bytes(fill))
    return path


def _read_fields(file: h5py.File, path: Path, reading: Reading) -> dict[str, Any]:
    if "observations" not in file and any(name.startswith("episode_") for name in file):
        hint = "this file is the inside of a Minari data set: give the folder that holds its `data` folder"
        found = ", ".join(sorted(file)[:12])
        raise InputError("a field is missing", path=path, field=WIDE[0], found=found, expected=LAYOUT, hint=hint)
    success = success_names(reading)
    fields = _fields(file, ("rewards", *TERMINALS, *TIMEOUTS, MASKS, *success))
    fields |= _fields(file, (*WIDE, *([reading.action] if reading.action else [])), ndim=2)
    infos = member(file, "infos")
    if isinstance(infos, h5py.Group):
        fields |= {f"infos/{name}": values for name, values in _fields(infos, success).items()}
    return fields


def _fields(group: h5py.Group, names: Sequence[str], *, ndim: int = 1) -> dict[str, Any]:
    """Those of these arrays that are there."""
    there = [name for name in names if member(group, name) is not None]
    return {name: read_numbers(group, name, ndim=ndim) for name in there}
