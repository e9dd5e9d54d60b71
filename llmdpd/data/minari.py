"""Minari data sets: this project's own format on disk, one data set a task, and a reader of anybody's.

Additions to Minari's layout: `task`, `text_prompt`, `goal_visible`, `environment` and `success_from` in the data set's
metadata; `noise_level`, `behaviour`, `success`, `success_step` and Minari's own `seed` in each episode's;
`infos/expert_action` for each observation (NaN in the last row, which has no action). Unknown values are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import check_rows, join_episodes
from llmdpd.data.flags import as_flags, find_success, first_success
from llmdpd.data.hdf5 import check_own_contents, hdf5_bytes
from llmdpd.data.minari_spaces import Leaf, flat_values, space_leaves
from llmdpd.data.trajectories import EpisodeRecord, TrajectoryDataset
from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.tasks.specs import find_suite
from llmdpd.utils.extras import extra
from llmdpd.utils.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    check_own_folder,
    parse_json,
    read_json,
)

with extra("data"):
    import h5py
    import minari
    from gymnasium.spaces import Box
    from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
    from minari.serialization import serialize_space
    from minari.storage import get_dataset_path

_OURS = "llmdpd_format"
_FORMAT = 1
_CONTENT = "main_data.hdf5"
_LARGEST_SEED = 2**63 - 1


def save_minari(
    dataset: TrajectoryDataset, root: str | Path, *, namespace: str = "metaworld", name: str = "scripted-v0"
) -> list[Path]:
    """Write one Minari data set a task that has episodes, `root/<namespace>/<task>/<name>`; each whole or not at all.

    With MINARI_DATASETS_PATH=root, `minari.load_dataset("<namespace>/<task>/<name>")` opens it. A data set that
    exists is replaced. No environment spec is stored (Meta-World's own registrations can't be written to a file):
    Minari opens the data without, `recover_environment` does not work. Returns the folders, in the order of
    `dataset.tasks`.

    Names of tasks that differ only in characters that ids can't have get a number: `_`, `_-2`. Read back, the tasks
    have their own names.

    Raises:
        InputError: a next observation is not the observation of the next step (Minari keeps one row for both); a folder
            of other files.
    """
    tasks = [task for task in dataset.tasks if dataset.episodes_of(task).size]
    ids = _ids(tasks, Path(root), namespace, name)
    _check_chained(dataset, root)
    folders = []
    for task in tasks:
        dataset_id = ids[task]
        # Minari joins its own relative paths twice.
        folder = Path(root).absolute() / dataset_id
        check_own_folder(folder, "data".__eq__, "a new folder, or a data set's, in which data alone lies")
        with atomic_directory(folder) as temporary:
            _write_task(dataset, task, dataset_id, temporary / "data")
        folders.append(folder)
    return folders


def _ids(tasks: Sequence[str], root: Path, namespace: str, name: str) -> dict[str, str]:
    """The id of each task's data set: its name in the characters of ids, and a number where another's is the same."""
    plain = {task: re.sub(r"[^-A-Za-z0-9_]", "_", task) for task in tasks}
    ids: dict[str, str] = {}
    for task in sorted(tasks, key=lambda task: plain[task] != task):  # names that need no change first
        numbered = (f"{namespace}/{plain[task]}{suffix}/{name}" for suffix in _suffixes())
        ids[task] = next(each for each in numbered if each not in ids.values() and _is_free(root / each, task))
    return ids


def _suffixes() -> Iterator[str]:
    yield ""
    yield from (f"-{number}" for number in itertools.count(2))


def _is_free(folder: Path, task: str) -> bool:
    """Whether there is no data set of another task that this project wrote."""
    path = folder / "data" / METADATA_FILE_NAME
    metadata = read_json(path, finite=False) if path.is_file() else None
    return not isinstance(metadata, dict) or _OURS not in metadata or metadata.get("task") == task


def _check_chained(dataset: TrajectoryDataset, root: str | Path) -> None:
    inner = np.ones(dataset.num_transitions, np.bool_)
    inner[dataset.offsets[1:] - 1] = False
    rows = np.flatnonzero(inner)
    jumps = (dataset.next_observations[rows] != dataset.observations[rows + 1]).any(axis=1)
    if jumps.any():
        row = int(rows[np.argmax(jumps)])
        found, expected = f"row {row} is not row {row + 1} of observations", "steps that follow one another"
        problem = "these trajectories can't be kept as Minari"
        raise InputError(problem, path=root, field="next_observations", found=found, expected=expected)


def _write_task(dataset: TrajectoryDataset, task: str, dataset_id: str, folder: Path) -> None:
    episodes = dataset.episodes_of(task)
    limit = 1.0 if np.abs(dataset.actions[dataset.transitions_of(task)]).max() <= 1.0 else np.inf
    # Not by MinariStorage, which has HDF5 write to the disk: where that is full, HDF5 ends the process.
    content = hdf5_bytes(partial(_put_episodes, dataset, episodes))
    folder.mkdir()
    atomic_write_bytes(folder / _CONTENT, content)
    metadata = {
        "total_episodes": len(episodes),
        "total_steps": int(np.diff(dataset.offsets)[episodes].sum()),
        "data_format": "hdf5",
        "jpeg_encoding": True,
        "observation_space": serialize_space(Box(-np.inf, np.inf, (dataset.state_dim,), np.float32)),
        "action_space": serialize_space(Box(-limit, limit, (dataset.action_dim,), np.float32)),
        "dataset_size": round(len(content) / 1e6, 1),
        "dataset_id": dataset_id,
        "minari_version": minari.__version__,
        _OURS: _FORMAT,
        "task": task,
        "text_prompt": dataset.texts[dataset.task_index(task)],
        "goal_visible": dataset.goal_visible,
        "environment": dataset.environments[dataset.task_index(task)] if dataset.environments else "",
        "success_from": dataset.success_from,
    }
    atomic_write_json(folder / METADATA_FILE_NAME, metadata)


def _put_episodes(dataset: TrajectoryDataset, episodes: NDArray[np.int64], file: h5py.File) -> None:
    """Put episodes into a file as Minari's storage does, numbered from 0."""
    for number, e in enumerate(map(int, episodes)):
        start, end, episode = int(dataset.offsets[e]), int(dataset.offsets[e + 1]), dataset.episode(e)
        terminations = dataset.terminals[start:end]
        truncations = np.zeros(end - start, np.bool_)
        truncations[-1] = not terminations[-1]
        arrays = {
            "observations": np.concatenate([episode.observations, dataset.next_observations[end - 1 : end]]),
            "actions": episode.actions,
            "rewards": episode.rewards,
            "terminations": terminations,
            "truncations": truncations,
        }
        if dataset.expert_actions is not None:
            # As long as the observations, which is what Minari's own collector writes.
            expert = dataset.expert_actions[start:end]
            arrays["infos/expert_action"] = np.pad(expert, ((0, 1), (0, 0)), constant_values=np.nan)
        group = file.create_group(f"episode_{number}")
        group.attrs.update({"id": number, "total_steps": end - start, **_episode_metadata(dataset, e)})
        if episode.seed >= 0:
            group.attrs["seed"] = episode.seed
        for name, values in arrays.items():
            group.create_dataset(name, data=values, chunks=True, maxshape=(None, *values.shape[1:]))


def _episode_metadata(dataset: TrajectoryDataset, e: int) -> dict[str, Any]:
    episode = dataset.episode(e)
    known = {
        "noise_level": None if np.isnan(episode.noise_level) else episode.noise_level,
        "behaviour": episode.behaviour or None,
        "success": None if episode.success < 0 else bool(episode.success),
        "success_step": None if episode.success_step < 0 else episode.success_step,
    }
    return {name: value for name, value in known.items() if value is not None}


def is_minari(folder: Path) -> bool:
    """Whether this folder holds Minari's metadata and data themselves (it is the `data` folder of a data set)."""
    path = folder / METADATA_FILE_NAME
    metadata = read_json(path, finite=False) if path.is_file() else None
    return isinstance(metadata, dict) and {"data_format", "total_episodes"} <= metadata.keys()


def minari_task(folder: Path) -> str:
    """The task of the data set in this `data` folder: its `task`, otherwise the environment's id or the data set's.

    Of the two the one that a task suite knows: one environment's id may stand for all of a benchmark.
    """
    metadata = read_json(folder / METADATA_FILE_NAME, finite=False)
    field, absent = ("task", "") if _OURS in metadata else ("dataset_id", folder.parent.name)
    own = metadata.get(field, absent)
    if not isinstance(own, str) or not own:
        path, expected = folder / METADATA_FILE_NAME, "a name"
        raise InputError("damaged metadata", path=path, field=field, found=repr(own)[:80], expected=expected)
    if _OURS in metadata:
        return own
    names = [name for name in (minari_environment(folder), own) if name]
    return next((name for name in names if find_suite(name) is not None), names[0])


def minari_environment(folder: Path) -> str:
    """The id of the environment in which the data set in this `data` folder was recorded; "" where unknown."""
    metadata = read_json(folder / METADATA_FILE_NAME, finite=False)
    if _OURS in metadata:
        return str(metadata.get("environment", ""))
    spec = metadata.get("env_spec")
    if not isinstance(spec, str):
        return ""
    try:
        return str(parse_json(spec, folder / METADATA_FILE_NAME, finite=False)["id"])
    except (InputError, KeyError, TypeError):
        raise InputError("damaged metadata", path=folder / METADATA_FILE_NAME, field="env_spec") from None


def load_minari_id(dataset_id: str, reading: Reading = DEFAULT_READING) -> TrajectoryDataset:
    """Read the data set of this id from Minari's local folder (MINARI_DATASETS_PATH), where it is first fetched to.

    Raises InputError where it is neither there nor to be had (with the nearest local ids), and as `load_minari`.
    """
    folder = Path(get_dataset_path(dataset_id)) / "data"
    # A download may have broken off between the metadata and the rest.
    if not is_minari(folder) or sum(1 for _ in folder.iterdir()) == 1:
        try:
            # Forced, Minari continues an interrupted download; otherwise it takes the partial one for the data set.
            minari.download_dataset(dataset_id, force_download=folder.exists())
        except Exception as error:  # of the network, of its servers, of Minari for an id that they don't know
            known = sorted(minari.list_local_datasets())
            near = f"nearest local ids: {nearest_names(dataset_id, known)}; or " if known else ""
            hint = f"{near}where there is a network: minari download {dataset_id}, and copy the folder here"
            problem = "no such Minari data set here, and none that can be downloaded"
            found = f"{dataset_id}; {type(error).__name__}: {error}"[:300]
            raise InputError(problem, path=folder, field="id", found=found, hint=hint) from None
    return load_minari(folder, reading)


def load_minari(folder: str | Path, reading: Reading = DEFAULT_READING) -> TrajectoryDataset:
    """Read one Minari data set, given by its `data` folder or the one above. Only terminations are terminals.

    Observations and actions are boxes of one dimension, or dicts of them: `reading.observation` and `reading.action`
    name the keys and their order, by default all as Gymnasium flattens them. Numbers become float32. Success is what
    the infos say of each step. A seed says something only in data that this project wrote: others' are other
    generators', and unknown here.

    Raises:
        InputError: no data set there, other spaces, damaged or missing files, unequal lengths, NaN or Inf, empty.
    """
    folder = Path(folder)
    if not is_minari(folder) and is_minari(folder / "data"):
        folder = folder / "data"
    if not is_minari(folder):
        raise InputError("no Minari data set here", path=folder, expected=f"a folder with {METADATA_FILE_NAME}")
    metadata = read_json(folder / METADATA_FILE_NAME, finite=False)
    task, ours = minari_task(folder), _OURS in metadata
    action = () if reading.action is None else (reading.action,)
    leaves = {
        name: space_leaves(metadata.get(f"{name}_space"), keys, f"{name}_space", folder / METADATA_FILE_NAME)
        for name, keys in (("observation", reading.observation), ("action", action))
    }
    if (folder / _CONTENT).exists() or metadata["data_format"] == "hdf5":
        check_own_contents(folder / _CONTENT)  # Minari opens it by itself, and would follow it to other files
    try:
        episodes = [
            _with_ours(record, about, infos) if ours else _with_success(record, infos, reading, folder, e)
            for e, (record, about, infos) in enumerate(_episodes(MinariStorage.read(folder), folder, task, leaves))
        ]
    except InputError:
        raise
    except Exception as error:  # Minari and h5py raise anything from ImportError to AssertionError here
        found = f"{type(error).__name__}: {error}"[:300]
        expected = f"{metadata['total_episodes']} whole episodes in format {metadata['data_format']}"
        raise InputError("the Minari data set can't be read", path=folder, found=found, expected=expected) from error
    visible = metadata.get("goal_visible") if ours else None
    froms = dict.fromkeys(success_from for _, success_from in episodes)
    return join_episodes(
        [record for record, _ in episodes],
        texts=_text(metadata, task),
        goal_visible=visible if isinstance(visible, bool) else None,
        source=str(folder),
        environments={task: minari_environment(folder)},
        success_from=str(metadata.get("success_from", "")) if ours else ", ".join(filter(None, froms)),
    )


_Read = tuple[EpisodeRecord, dict[str, Any], dict[str, Any]]
"""(what is of Minari's own layout, the episode's metadata, its infos)"""


def _text(metadata: Mapping[str, Any], task: str) -> dict[str, str]:
    """The task's text prompt: this project's own, or the description that whoever recorded the data gave."""
    text = metadata.get("text_prompt", metadata.get("description"))
    return {task: text} if isinstance(text, str) and text.strip() else {}


def _episodes(storage: MinariStorage, folder: Path, task: str, leaves: dict[str, list[Leaf]]) -> Iterator[_Read]:
    numbers = range(storage.total_episodes)
    for e, episode, about in zip(  # unnamed, so that an error's traceback does not keep the file open
        numbers, storage.get_episodes(numbers), storage.get_episode_metadata(numbers), strict=True
    ):
        label, steps = f" of episode {e}", len(episode["terminations"])
        for name in ("terminations", "truncations"):
            flags = as_flags(episode[name], name + label, folder)
            if flags[:-1].any() or len(flags) != steps:
                found = f"shape {list(flags.shape)}, set at {np.flatnonzero(flags)[:5].tolist()}"
                expected = f"one for each of {steps} steps, set only at the last"
                raise InputError(f"wrong {name}", path=folder, field=name + label, found=found, expected=expected)
        record = EpisodeRecord(
            flat_values(episode["observations"], leaves["observation"], steps + 1, "observations" + label, folder),
            flat_values(episode["actions"], leaves["action"], steps, "actions" + label, folder),
            episode["rewards"],
            task,
            terminated=bool(np.any(episode["terminations"])),
        )
        yield record, about, episode.get("infos") or {}


def _with_ours(record: EpisodeRecord, about: dict[str, Any], infos: dict[str, Any]) -> tuple[EpisodeRecord, str]:
    """What this project adds to an episode."""
    expert, seed = infos.get("expert_action"), about.get("seed")
    known = dataclasses.replace(
        record,
        expert_actions=None if expert is None else expert[:-1],
        noise_level=float(about.get("noise_level", np.nan)),
        success=int(about.get("success", -1)),
        seed=int(seed) if seed is not None and 0 <= int(seed) <= _LARGEST_SEED else -1,
        behaviour=str(about.get("behaviour", "")),
        success_step=int(about.get("success_step", -1)),
    )
    return known, ""


def _with_success(
    record: EpisodeRecord, infos: dict[str, Any], reading: Reading, folder: Path, e: int
) -> tuple[EpisodeRecord, str]:
    """The episode with the success of its infos, where they have one, and where it stands there."""
    found = find_success({"infos": infos}, reading, folder, f" of episode {e}")
    if found is None:
        return record, ""
    name, steps = f"{found[0]} of episode {e}", len(np.asarray(record.rewards))
    values = np.asarray(found[1])
    # As long as the observations, which is what Minari's collector writes: the first is of the reset.
    flags = as_flags(values[1:] if len(values) == steps + 1 else values, name, folder)
    check_rows({name: flags}, steps, folder)
    success, step = first_success(flags)
    return dataclasses.replace(record, success=success, success_step=step), found[0]
