"""Reader of robomimic's HDF5 layout (Mandlekar et al. 2021, arXiv 2108.03298; github.com/ARISE-Initiative/robomimic).

`data/demo_N` is one episode of T steps: `actions` [T, A], `rewards` [T], `dones` [T], `obs/KEY` [T, ...] and, where
they were not left out, `next_obs/KEY` [T, ...]; attribute `num_samples` is T. Attribute `env_args` of `data` is JSON
with `env_name`, `env_version`, `type` and `env_kwargs`. LIBERO's files add `problem_info`, JSON with
`language_instruction`; Isaac Lab's give each episode the attributes `success` and `seed`, which is of generators of
its own and not kept, and no rewards.

`dones` mark successes, the ends of episodes, or both (`--done_mode` of robomimic's extraction), which a file does not
say. None of them is a fall: all episodes end by truncation.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import check_rows, join_episodes
from llmdpd.data.flags import SUCCESS, as_flags, first_success
from llmdpd.data.hdf5 import (
    field_name,
    member,
    names_in,
    open_hdf5,
    read_attribute,
    read_names,
    read_numbers,
    subgroup,
    text_attribute,
)
from llmdpd.data.notes import say_once
from llmdpd.data.recordings import known_steps, list_fields, task_name
from llmdpd.data.trajectories import EpisodeRecord, TrajectoryDataset
from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.base import Reading
from llmdpd.utils.extras import extra
from llmdpd.utils.files import parse_json

with extra("data"):
    import h5py

_WHAT = "robomimic's layout: data/demo_0 with actions and obs/KEY"
_DEMO = re.compile(r"demo_(\d+)")
_ROBOSUITE = 1  # `type` in env_args
_RAW_HINT = "robomimic's dataset_states_to_obs.py makes observations from a file of states alone"
_log = logging.getLogger(__name__)


def is_robomimic(path: Path) -> bool:
    """Whether this HDF5 file has a group `data` with an episode in it, `demo_N`."""
    try:
        with open_hdf5(path, _WHAT) as file:
            data = member(file, "data")
            return isinstance(data, h5py.Group) and bool(_episode_names(data))
    except InputError:
        return False  # whoever reads other HDF5 files says what is wrong with it


def robomimic_task(path: Path) -> str:
    """The task that `load_robomimic` reads, without its episodes. Raises InputError for a file without any."""
    with open_hdf5(path, _WHAT) as file:
        return _about(_group(file, "data", path), path).task


def load_robomimic(path: str | Path, reading: Reading) -> TrajectoryDataset:
    """Read one file as one task, named by its instruction where it has one, else by `env_name`, else by the file.

    Observations are the arrays `obs/KEY` of `reading.observation`, side by side in this order; without, the only one
    of one dimension a step (images are never read). Actions are `reading.action`, by default `actions`. Rewards are 0
    where a file has none. Without `next_obs`, the last step of each episode is left out, for its next observation is
    not known.

    `reading.part` is a filter key, an array of names of episodes in `mask`.

    An episode succeeds where the array `reading.success` is 1 at any step (`dones`, where they mark successes).
    Where none is named, or a customary one (`flags.SUCCESS`) that is not there: by the episode's attribute `success`;
    or, in a robosuite file whose rewards are not shaped and all 0 or 1 and not all 0, where a reward is 1. Otherwise
    success is unknown.

    Raises:
        InputError: no HDF5 of this layout, cut off, data in another file, a choice of observations that is needed or
            can't be read, a field missing, of a wrong shape or type, NaN or Inf, unequal lengths, empty.
    """
    path = Path(path)
    with open_hdf5(path, _WHAT) as file:
        data = subgroup(file, "data")
        names = _episode_names(data) if data is not None else []
        names = names if reading.part is None else _part(file, reading.part, names, path)
        if data is None or not names:
            found = ", ".join(names_in(file)[:12]) or "no field at all"
            raise InputError("no episode of robomimic's", path=path, field="data/demo_0", found=found, expected=_WHAT)
        about = _about(data, path)
        present = _in_all_or_none(data, names, ("rewards", "dones", "next_obs", reading.success or ""), path)
        own = reading.success is None or reading.success in SUCCESS  # a name of the success, as the file's own are
        if reading.success not in present:
            reading = dataclasses.replace(reading, success=None)
        keys = reading.observation or (_only_key(_group(data, names[0], path), path),)
        episodes = [_episode(_group(data, name, path), keys, reading, about.task, path) for name in names]
    if not own and reading.success is None:
        episodes = [dataclasses.replace(episode, success=-1) for episode in episodes]
    if "rewards" not in present:
        say_once(_log, "%s: no rewards: they are 0", path)
    success_from = reading.success or ("success" if any(episode.success >= 0 for episode in episodes) else "")
    if own and not success_from and about.sparse and "rewards" in present and _say_success(episodes):
        episodes, success_from = _by_rewards(episodes), "rewards"
    return join_episodes(
        known_steps(episodes, path),
        texts={about.task: about.text},
        source=str(path),
        environments={about.task: about.environment},
        success_from=success_from,
    )


@dataclass(frozen=True)
class _About:
    """What the file says of all its episodes."""

    task: str
    text: str
    environment: str  # `env_name`, with its version where it has one
    sparse: bool  # whether rewards are 1 where the task is solved, else 0


def _about(data: h5py.Group, path: Path) -> _About:
    environment, problem = (_json_attribute(data, name, path) for name in ("env_args", "problem_info"))
    kwargs = environment.get("env_kwargs")
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    # An environment of LIBERO's or RoboCasa's is a scene, in which the instruction says what is to be done.
    texts = [value for value in (problem.get("language_instruction"), kwargs.get("env_lang")) if isinstance(value, str)]
    text = texts[0].strip().strip('"') if texts else ""
    name = environment.get("env_name") or ""
    if not isinstance(name, str):
        field = "env_args.env_name of data"
        raise InputError("not a name", path=path, field=field, found=repr(name)[:80], expected="text")
    sparse = environment.get("type") == _ROBOSUITE and not kwargs.get("reward_shaping", False)
    version = environment.get("env_version")
    recorded_in = f"{name} {version}" if name and isinstance(version, str) and version else name
    return _About(task_name(text) or name or path.stem, text, recorded_in, sparse)


def _json_attribute(data: h5py.Group, name: str, path: Path) -> Mapping[str, Any]:
    text = text_attribute(data, name)
    try:
        value = parse_json(text, path, finite=False) if text else {}
    except InputError:
        value = text
    if not isinstance(value, dict):
        found, expected = repr(value)[:80], "a JSON object"
        raise InputError("damaged metadata", path=path, field=f"{name} of data", found=found, expected=expected)
    return value


def _episode_names(data: h5py.Group) -> list[str]:
    """In the order of their numbers: demo_10 comes after demo_9."""
    numbered = [(int(found[1]), found[0]) for found in map(_DEMO.fullmatch, names_in(data)) if found]
    return [name for _, name in sorted(numbered)]


def _part(file: h5py.File, part: str, names: list[str], path: Path) -> list[str]:
    """The episodes that a filter key lists."""
    masks = subgroup(file, "mask")
    if masks is None or part not in names_in(masks):
        found = "none" if masks is None else ", ".join(names_in(masks))
        raise InputError("no such filter key", path=path, field="mask", found=found, expected=part)
    listed = read_names(masks, part)
    unknown = sorted(set(listed) - set(names))
    if unknown or not listed:
        found, expected = ", ".join(unknown[:8]) or "no episode", "episodes of the file"
        raise InputError("wrong filter key", path=path, field=f"mask/{part}", found=found, expected=expected)
    return [name for name in names if name in set(listed)]


def _in_all_or_none(data: h5py.Group, names: list[str], fields: tuple[str, ...], path: Path) -> set[str]:
    """Which of these fields, which may be left out, are there. Raises InputError where only some episodes have one."""
    present = set()
    for field in filter(None, fields):
        have = [name for name in names if member(_group(data, name, path), field) is not None]
        if have and len(have) < len(names):
            lacking = next(name for name in names if name not in have)
            found, expected = f"present in {have[0]}", "in all episodes or in none"
            field = f"data/{lacking}/{field}"
            raise InputError("a field is missing", path=path, field=field, found=found, expected=expected)
        present |= {field} if have else set()
    return present


def _group(parent: h5py.Group, name: str, path: Path, hint: str | None = None) -> h5py.Group:
    group = subgroup(parent, name)
    if group is None:
        found = ", ".join(names_in(parent)[:12]) or "nothing"
        field = field_name(parent, name)
        raise InputError("a field is missing", path=path, field=field, found=found, expected=_WHAT, hint=hint)
    return group


def _only_key(demo: h5py.Group, path: Path) -> str:
    fields = _shapes(_group(demo, "obs", path, _RAW_HINT))
    flat = [name for name, shape in fields.items() if len(shape) == 1]
    if len(flat) != 1:
        problem, found = "which observations are read has to be chosen", list_fields(fields.items())
        field, expected = field_name(demo, "obs"), "`observation`, keys of one dimension a step in their order"
        hint = "in Python: load_dataset(…, reading=Reading(observation=(…)))"
        if len(flat) < len(fields):
            hint += "; images can't be observations here"
        raise InputError(problem, path=path, field=field, found=found, expected=expected, hint=hint)
    return flat[0]


def _shapes(observations: h5py.Group) -> dict[str, tuple[int, ...]]:
    """The shape of one step of each array; [N] counts as [N, 1]."""
    nodes = {name: member(observations, name) for name in names_in(observations)}
    arrays = {name: node for name, node in nodes.items() if isinstance(node, h5py.Dataset) and node.shape}
    return {name: tuple(node.shape[1:]) or (1,) for name, node in arrays.items()}


def _episode(demo: h5py.Group, keys: tuple[str, ...], reading: Reading, task: str, path: Path) -> EpisodeRecord:
    observations = _observations(_group(demo, "obs", path, _RAW_HINT), keys, path)
    arrays = {"actions": read_numbers(demo, reading.action or "actions", ndim=2)}
    steps = len(arrays["actions"])
    if member(demo, "rewards") is not None:
        arrays["rewards"] = read_numbers(demo, "rewards", ndim=1)
    if member(demo, "dones") is not None:
        arrays["dones"] = read_numbers(demo, "dones", ndim=1)
        as_flags(arrays["dones"], field_name(demo, "dones"), path)
    if member(demo, "next_obs") is not None:
        arrays["next_obs"] = _observations(_group(demo, "next_obs", path), keys, path)
    flags = None if reading.success is None else read_numbers(demo, reading.success, ndim=1)
    label = f" of {field_name(demo, '').rstrip('/')}"
    check_rows({"obs": observations, **arrays, reading.success or "": flags}, _num_samples(demo, steps), path, label)
    success, step = _success(demo), -1
    if flags is not None:
        success, step = first_success(as_flags(flags, field_name(demo, str(reading.success)), path))
    return EpisodeRecord(
        observations,
        arrays["actions"],
        arrays.get("rewards", np.zeros(steps, np.float32)),
        task,
        next_observations=arrays.get("next_obs"),
        success=success,
        success_step=step,
    )


def _num_samples(demo: h5py.Group, default: int) -> int:
    value = read_attribute(demo, "num_samples")
    return int(value) if isinstance(value, (int, np.integer)) else default


def _observations(group: h5py.Group, keys: tuple[str, ...], path: Path) -> NDArray[np.float32]:
    fields = _shapes(group)
    parts: list[NDArray[np.float32]] = []
    for key in keys:
        shape, field = fields.get(key), field_name(group, key)
        if shape is None:
            found, hint = list_fields(fields.items()), f"nearest names: {nearest_names(key, fields)}"
            raise InputError("no such observation", path=path, field=field, found=found, expected=key, hint=hint)
        if len(shape) != 1:
            problem, found = "images and matrices can't be observations", f"{list(shape)} numbers a step"
            raise InputError(problem, path=path, field=field, found=found, expected="one dimension a step")
        node = member(group, key)
        assert node is not None
        values = read_numbers(group, key, ndim=node.ndim)
        parts.append(values.reshape(len(values), shape[0]))
    check_rows(dict(zip(keys, parts, strict=True)), len(parts[0]), path, f" of {field_name(group, '').rstrip('/')}")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _success(demo: h5py.Group) -> int:
    """Isaac Lab's attribute; -1 where it is absent."""
    value = read_attribute(demo, "success")
    return int(value) if isinstance(value, (bool, int, np.bool_, np.integer)) and value in (0, 1) else -1


def _say_success(episodes: list[EpisodeRecord]) -> bool:
    """Whether rewards are those of success: all 0 or 1, and not all 0, which may be of no reward at all."""
    rewards = np.concatenate([np.asarray(episode.rewards) for episode in episodes])
    return bool(np.isin(rewards, (0, 1)).all() and rewards.any())


def _by_rewards(episodes: list[EpisodeRecord]) -> list[EpisodeRecord]:
    """With success where a reward is 1."""
    outcomes = [first_success(np.asarray(episode.rewards) != 0) for episode in episodes]
    return [
        dataclasses.replace(episode, success=success, success_step=step)
        for episode, (success, step) in zip(episodes, outcomes, strict=True)
    ]
