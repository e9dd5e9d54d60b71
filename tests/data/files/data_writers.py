"""The same small trajectories in every format that is read, for tests that hold for all readers.

A new format adds its writer to `FORMATS`; every test in test_every_reader.py then runs on it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import robot_files
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes, save_minari, save_shards

Episodes = Sequence["Episode"]


@dataclass(frozen=True)
class Episode:
    """One episode of T steps."""

    observations: np.ndarray  # [T + 1, S]
    actions: np.ndarray  # [T, A]
    rewards: np.ndarray  # [T]
    fell: bool = False  # a true terminal at the last step, otherwise a time limit
    success: np.ndarray | None = None  # [T], whether each step succeeds

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def last(self) -> np.ndarray:
        return np.arange(len(self)) == len(self) - 1


@dataclass(frozen=True)
class Format:
    """How one format is written.

    write: (folder, episodes, task's name, environment's id or "") → what `load_dataset` is given.
    falls: terminals and time limits are told apart; otherwise no terminal is read.
    success: the flag of each step is kept.
    rewards: they are kept.
    environment: the id is kept.
    suffix: the file may be called anything.
    keys: observations and actions are under keys, of which there may be several.
    """

    write: Callable[[Path, Episodes, str, str], Path]
    falls: bool = True
    success: bool = True
    rewards: bool = True
    environment: bool = False
    suffix: bool = True
    keys: bool = False


def random_episodes(
    rng: np.random.Generator,
    lengths: Sequence[int] = (6, 4, 5),
    *,
    state_dim: int = 39,
    action_dim: int = 4,
    falls: Sequence[bool] = (),
    success: Sequence[Sequence[int]] = (),
) -> list[Episode]:
    """Episodes of these lengths; `success` lists, for each, the steps at which it succeeds."""
    return [
        Episode(
            observations=rng.normal(size=(length + 1, state_dim)).astype(np.float32),
            actions=rng.uniform(-1, 1, (length, action_dim)).astype(np.float32),
            rewards=rng.normal(size=length).astype(np.float32),
            fell=bool(falls[number]) if falls else False,
            success=np.isin(np.arange(length), success[number]) if success else None,
        )
        for number, length in enumerate(lengths)
    ]


def fields(episode: Episode) -> dict[str, np.ndarray]:
    """D4RL's arrays of one episode."""
    arrays = {
        "observations": episode.observations[:-1],
        "next_observations": episode.observations[1:],
        "actions": episode.actions,
        "rewards": episode.rewards,
        "terminals": episode.last & episode.fell,
        "timeouts": episode.last & (not episode.fell),
    }
    return arrays if episode.success is None else arrays | {"success": episode.success}


def flat(episodes: Episodes) -> dict[str, np.ndarray]:
    """D4RL's arrays of all episodes, one after the other."""
    parts = [fields(episode) for episode in episodes]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_ours(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    return save_minari(_joined(episodes, task, environment), folder)[0]


def write_shards(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    return save_shards([_joined(episodes, task, environment)], folder / "shards")


def _joined(episodes: Episodes, task: str, environment: str) -> TrajectoryDataset:
    records = [
        EpisodeRecord(
            *(episode.observations, episode.actions, episode.rewards, task),
            terminated=episode.fell,
            success=-1 if episode.success is None else int(episode.success.any()),
            success_step=-1 if episode.success is None or not episode.success.any() else int(episode.success.argmax()),
        )
        for episode in episodes
    ]
    environments = {task: environment} if environment else {}
    return join_episodes(records, environments=environments)


def write_minari(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    """As Minari's own collector does where nobody gives it a seed: with 64 random bits for each episode."""
    data = (folder / "theirs" / "data").absolute()
    data.mkdir(parents=True)
    first, draw = episodes[0], np.random.default_rng()
    storage = MinariStorage.new(
        data,
        observation_space=Box(-np.inf, np.inf, first.observations.shape[1:], np.float32),
        action_space=Box(-np.inf, np.inf, first.actions.shape[1:], np.float32),
    )
    about: dict[str, Any] = {"dataset_id": task, "minari_version": "0.5.4"}
    storage.update_metadata(about | ({"env_spec": json.dumps({"id": environment})} if environment else {}))
    storage.update_episodes(
        EpisodeBuffer(
            seed=int(draw.integers(2**62, 2**64, dtype=np.uint64)),
            observations=episode.observations,
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=episode.last & episode.fell,
            truncations=episode.last & (not episode.fell),
            infos=None if episode.success is None else {"success": np.append(False, episode.success).astype(float)},
        )
        for episode in episodes
    )
    return data.parent


def write_hdf5(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    path = folder / f"{task.replace('/', '_')}.hdf5"
    with h5py.File(path, "w") as file:
        for name, value in flat(episodes).items():
            file["infos/success" if name == "success" else name] = value
        if environment:
            file.attrs["environment"] = environment
    return path


def write_flat_npz(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    path = folder / f"{task.replace('/', '_')}.npz"
    np.savez(path, **flat(episodes))
    return path


def write_ogbench(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    """OGBench's arrays: an episode's last observation has a row of its own; no rewards; masks are 0 at true ends."""
    rows: dict[str, list[np.ndarray]] = {"observations": [], "actions": [], "terminals": [], "masks": [], "success": []}
    for episode in episodes:
        steps = len(episode) if episode.fell else len(episode) + 1
        end = np.arange(steps) == steps - 1
        reached = np.zeros(len(episode), bool) if episode.success is None else episode.success
        rows["observations"].append(episode.observations[:steps])
        rows["actions"].append(np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])])[:steps])
        rows["terminals"].append(end.astype(np.float32))
        rows["masks"].append(1 - (end & episode.fell).astype(np.float32))
        rows["success"].append(np.append(reached, reached[-1])[:steps])
    if episodes[0].success is None:
        del rows["success"]
    path = folder / f"{task.replace('/', '_')}.npz"
    np.savez(path, **{name: np.concatenate(parts) for name, parts in rows.items()})
    return path


def write_dicts(suffix: str) -> Callable[[Path, Episodes, str, str], Path]:
    """MTDiff's dicts, whose only flag marks time limits."""

    def write(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
        records = np.empty(len(episodes), object)
        for number, episode in enumerate(episodes):
            arrays = fields(episode) | {"task": np.array(task), "terminals": episode.last.astype(np.float32)[:, None]}
            del arrays["timeouts"]
            records[number] = arrays | {"rewards": episode.rewards[:, None]}
        path = folder / f"data.{suffix}"
        if suffix == "npy":
            np.save(path, records, allow_pickle=True)
        elif suffix == "npz":
            np.savez(path, records)
        else:
            path.write_bytes(pickle.dumps(list(records)))
        return path

    return write


def write_decision_transformer(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    """Decision Transformer's and LaMo's list: an episode each, whose only flag marks falls; the file names the task."""
    records = [fields(episode) for episode in episodes]
    for record in records:
        del record["timeouts"]
    path = folder / f"{task.replace('/', '_')}.pkl"
    path.write_bytes(pickle.dumps(records))
    return path


def write_robomimic(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    demos = [
        {
            "actions": episode.actions,
            "rewards": episode.rewards,
            "dones": episode.last.astype(np.int64),
            "obs/flat": episode.observations[:-1],
            "next_obs/flat": episode.observations[1:],
            "success": episode.success,
        }
        for episode in episodes
    ]
    path = robot_files.write_robomimic(folder / "demos.hdf5", demos, env_args={"env_name": task, "type": 2})
    with h5py.File(path, "a") as file:
        for number in range(len(demos)):
            file[f"data/demo_{number}"].attrs["seed"] = 1_500_000_000 + number
    return path


def write_lerobot(folder: Path, episodes: Episodes, task: str, environment: str) -> Path:
    """The last observation of an episode is in a row of its own."""

    def row(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, values[-1:]])

    recordings = [
        {
            "task": task,
            "observation.state": episode.observations,
            "action": row(episode.actions),
            "next.reward": row(episode.rewards),
            **({} if episode.success is None else {"next.success": row(episode.success)}),
        }
        for episode in episodes
    ]
    return robot_files.write_lerobot(folder / "robot", recordings)


FORMATS: dict[str, Format] = {
    "minari of ours": Format(write_ours, environment=True, suffix=False),
    "minari": Format(write_minari, environment=True, suffix=False),
    "hdf5": Format(write_hdf5, environment=True),
    "flat npz": Format(write_flat_npz),
    "ogbench npz": Format(write_ogbench, rewards=False),
    "dicts npy": Format(write_dicts("npy"), falls=False),
    "dicts npz": Format(write_dicts("npz"), falls=False),
    "dicts pickle": Format(write_dicts("pkl"), falls=False),
    "decision transformer": Format(write_decision_transformer),
    "robomimic": Format(write_robomimic, falls=False, keys=True),
    "lerobot": Format(write_lerobot, falls=False, suffix=False, keys=True),
    "shards": Format(write_shards, environment=True, suffix=False, keys=True),
}
