"""Flat arrays of one task, one row a step: D4RL's layout in HDF5, the same in NumPy files, OGBench's.

`observations` [N, S], `actions` [N, A], `rewards` [N], and flags (see `llmdpd.data.flags`); `next_observations` [N, S]
in some files. OGBench's have no rewards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import as_float32, check_rows
from llmdpd.data.flags import TIMEOUTS, Flags, as_flags, episode_ends, find_success, first_success, terminates
from llmdpd.data.trajectories import TrajectoryDataset, offsets_of
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading

WIDE = ("observations", "actions", "next_observations")
LAYOUT = "observations, actions, rewards, terminals, timeouts"
_VERSION = re.compile(r"([-_]v[23])(?![0-9a-z]).*")
_log = logging.getLogger(__name__)


class Steps(NamedTuple):
    """Rows of one task, in episodes."""

    arrays: dict[str, NDArray[np.float32]]  # observations, actions, rewards, next_observations
    terminals: Flags  # [N]
    lengths: NDArray[np.int64]  # [E]
    outcomes: list[tuple[int, int]]  # (success, success_step) of each episode
    success_from: str


def name_from_path(path: Path) -> str:
    """The task's name by its file: the first of the file's and its folders' names that ends in -v2 or -v3.

    Otherwise the file's name without its suffix. MTDiff's replay folders are TASK/RUN/dataset/0.npz.
    """
    names = [path.stem, *(folder.name for folder in path.absolute().parents)]
    return next((_VERSION.sub(r"\1", name) for name in names if _VERSION.search(name)), path.stem)


def read_steps(fields: Mapping[str, Any], task: str, reading: Reading, path: Path, label: str = "") -> Steps:
    """The steps that `fields` hold: arrays of N rows by name, and what D4RL's and OGBench's flags mean.

    With `next_observations`, every row is kept. Without, a row's next observation is the next row's where both are of
    one episode; the last row of an episode that timed out, or that the end cut off, is left out, for its next
    observation is not known; at a terminal, where it is multiplied by zero, the row's own observation stands in.

    Raises:
        InputError: see `flags`; a field missing, of another width, shape or number of rows.
    """
    arrays = _arrays(fields, path, label)
    success = find_success(fields, reading)
    ends = episode_ends(fields, len(arrays["observations"]), terminates(task, reading), path, label)
    starts, lengths = _spans(ends.last)
    outcomes = [(-1, -1)] * len(lengths) if success is None else _outcomes(*success, starts, lengths, path, label)
    success_from = "" if success is None else success[0]
    steps = Steps(arrays, ends.terminals, lengths, outcomes, success_from)
    return steps if "next_observations" in arrays else _followed(steps, ends.last)


def _arrays(fields: Mapping[str, Any], path: Path, label: str) -> dict[str, NDArray[np.float32]]:
    """The numbers, as float32 and of fitting shapes; the flags are not among them."""
    needed = ["observations", "actions"]
    if label or any(name in fields for name in TIMEOUTS):
        needed.append("rewards")
    missing = next((name for name in needed if name not in fields), None)
    if missing is not None:
        found = ", ".join(sorted(map(str, fields))[:12]) or "no field at all"
        raise InputError("a field is missing", path=path, field=missing + label, found=found, expected=LAYOUT)
    names = [name for name in (*WIDE, "rewards") if name in fields]
    arrays = {
        name: as_float32(fields[name], name + label, str(path), ndim=1 if name == "rewards" else 2) for name in names
    }
    rows = len(arrays["observations"])
    check_rows(arrays, rows, path, label)
    if rows == 0:
        problem = "an episode without steps" if label else "the data set is empty"
        raise InputError(problem, path=path, field="observations" + label, found="0 rows", expected="1 or more")
    shape, other = (list(arrays.get(name, arrays["observations"]).shape) for name in ("observations", WIDE[2]))
    if shape != other:
        raise InputError("wrong width", path=path, field=WIDE[2] + label, found=other, expected=shape)
    if "rewards" not in arrays:
        _log.warning("%s: no rewards are recorded; all are taken for 0", path)
        arrays["rewards"] = np.zeros(rows, np.float32)
    return arrays


def _spans(last: Flags) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row and number of rows of each episode."""
    lengths = np.diff(np.flatnonzero(last), prepend=-1).astype(np.int64)
    return np.cumsum(lengths) - lengths, lengths


def _outcomes(
    name: str, values: Any, starts: NDArray[np.int64], lengths: NDArray[np.int64], path: Path, label: str
) -> list[tuple[int, int]]:
    """(success, success_step) of each episode, from flags of every row or from one of the only episode."""
    flags = as_flags(np.atleast_1d(np.asarray(values)), name + label, path)
    if len(flags) == len(lengths) == 1:
        return [(int(flags[0]), 0 if flags[0] and lengths[0] == 1 else -1)]
    check_rows({name: flags}, int(lengths.sum()), path, label)
    return [first_success(flags[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def _followed(steps: Steps, last: Flags) -> Steps:
    """Rows without next observations, with those that are known; the others are left out (see `read_steps`)."""
    observations, terminals = steps.arrays["observations"], steps.terminals
    following = np.concatenate([observations[1:], observations[-1:]])
    following[terminals] = observations[terminals]
    keep = ~last | terminals
    starts, _ = _spans(last)
    lengths = np.add.reduceat(keep.astype(np.int64), starts)
    arrays = {name: array[keep] for name, array in steps.arrays.items()} | {"next_observations": following[keep]}
    kept = [
        (success, step if step < length else -1)
        for (success, step), length in zip(steps.outcomes, lengths, strict=True)
        if length
    ]
    return Steps(arrays, terminals[keep], lengths[lengths > 0], kept, steps.success_from)


def load_flat(
    fields: Mapping[str, Any], task: str, reading: Reading, path: Path, environment: str = ""
) -> TrajectoryDataset:
    """The data set that the fields of a whole file are. Raises InputError: see `read_steps`; and NaN or Inf."""
    steps = read_steps(fields, task, reading, path)
    episodes = len(steps.lengths)
    if not episodes:
        problem, wanted = "no transition with a next observation", "the field, or an episode of two steps or more"
        raise InputError(problem, path=path, field="next_observations", found="absent", expected=wanted)
    successes, success_steps = zip(*steps.outcomes, strict=True)
    observations, actions, following, rewards = (steps.arrays[name] for name in (*WIDE, "rewards"))
    return TrajectoryDataset(
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=following,
        terminals=steps.terminals,
        offsets=offsets_of(steps.lengths),
        task_ids=np.zeros(episodes, np.int32),
        tasks=(task,),
        texts=("",),
        noise_levels=np.full(episodes, np.nan, np.float32),
        successes=np.array(successes, np.int8),
        seeds=np.full(episodes, -1, np.int64),
        success_steps=np.array(success_steps, np.int64),
        source=str(path),
        environments=(environment,) if environment else (),
        success_from=steps.success_from,
    )
