"""Flat arrays of one task, one row a step: D4RL's layout in HDF5, the same in NumPy files, OGBench's.

`observations` [N, S], `actions` [N, A], `rewards` [N], and flags (see `llmdpd.data.flags`); `next_observations` [N, S]
in some files. OGBench's have no rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import as_float32, check_rows
from llmdpd.data.flags import (
    MASKS,
    TIMEOUTS,
    Ends,
    Flags,
    as_flags,
    episode_ends,
    find_success,
    first_success,
    terminates,
)
from llmdpd.data.notes import say_once
from llmdpd.data.trajectories import TrajectoryDataset, offsets_of
from llmdpd.errors import InputError
from llmdpd.tasks import SUITES
from llmdpd.tasks.base import Reading
from llmdpd.tasks.specs import spec_by_name

WIDE = ("observations", "actions", "next_observations")
LAYOUT = "observations, actions, rewards, terminals, timeouts"
_log = logging.getLogger(__name__)


class Steps(NamedTuple):
    """Rows of one task, in episodes."""

    arrays: dict[str, NDArray[np.float32]]  # observations, actions, rewards, next_observations
    terminals: Flags  # [N]
    lengths: NDArray[np.int64]  # [E]
    outcomes: list[tuple[int, int]]  # (success, success_step) of each episode
    success_from: str


def name_from_path(path: Path, widths: tuple[int, int]) -> str:
    """The task's name by its file: the first of the file's and its folders' names that a suite says is a task's.

    Its widths (S, A) have to be the data's: anybody's folder may have any name. Otherwise it is the file's name without
    its suffix.
    """
    for name in (path.stem, *(folder.name for folder in path.absolute().parents)):
        for task in filter(None, (suite.named_by(name) for suite in SUITES.values())):
            spec = spec_by_name(task)
            if spec is not None and (spec.state_dim, spec.action_dim) == widths:
                return task
    return path.stem


def widths_of(fields: Mapping[str, Any], reading: Reading) -> tuple[int, int]:
    """The widths (S, A) of a dict's arrays, -1 of one that has none: reading them then says what is wrong."""
    arrays = (fields.get(name) for name in (WIDE[0], reading.action or WIDE[1]))
    state, action = (array.shape[1] if isinstance(array, np.ndarray) and array.ndim == 2 else -1 for array in arrays)
    return state, action


def read_steps(fields: Mapping[str, Any], task: str, reading: Reading, path: Path, label: str = "") -> Steps:
    """The steps that `fields` hold: arrays of N rows by name, and what D4RL's and OGBench's flags mean.

    With `next_observations`, every row is kept. Without, a row's next observation is the next row's where both are of
    one episode; the last row of an episode that timed out, or that the end cut off, is left out, for its next
    observation is not known; at a terminal, where it is multiplied by zero, the row's own observation stands in.

    Raises:
        InputError: see `flags`; a field missing, of another width, shape or number of rows.
    """
    arrays = _arrays(_named(fields, reading, path, label), path, label)
    success = find_success(fields, reading, path, label)
    widths = arrays["observations"].shape[1], arrays["actions"].shape[1]
    told_apart = any(name in fields for name in (*TIMEOUTS, MASKS))
    itself = reading.terminates if told_apart else terminates(task, reading, widths)
    ends = episode_ends(fields, len(arrays["observations"]), itself, path, label)
    if reading.terminates is False:
        ends = Ends(ends.last, np.zeros_like(ends.last))
    starts, lengths = _spans(ends.last)
    outcomes = [(-1, -1)] * len(lengths) if success is None else _outcomes(*success, starts, lengths, path, label)
    success_from = "" if success is None else success[0]
    steps = Steps(arrays, ends.terminals, lengths, outcomes, success_from)
    return steps if "next_observations" in arrays else _followed(steps, ends.last)


def _named(fields: Mapping[str, Any], reading: Reading, path: Path, label: str) -> Mapping[str, Any]:
    """The fields with the actions that are to be read under their customary name."""
    if reading.observation:
        words = "%s: flat arrays have no keys: observation = %s has no meaning, `observations` are read whole"
        say_once(_log, words, path, list(reading.observation))
    if reading.action is None or reading.action == WIDE[1]:
        return fields
    if reading.action not in fields:
        found = ", ".join(sorted(map(str, fields))[:12]) or "no field at all"
        raise InputError(
            "no such actions", path=path, field=reading.action + label, found=found, expected="the field that is named"
        )
    return {**fields, WIDE[1]: fields[reading.action]}


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
        say_once(_log, "%s: no rewards are recorded; all are taken for 0", path)
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
