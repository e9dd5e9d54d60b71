"""Files of robots' recordings: robomimic's and LeRobot's layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Arrays = dict[str, Any]

_ENV_ARGS = {"env_name": "PickPlaceCan", "env_version": "1.4.1", "type": 1, "env_kwargs": {"reward_shaping": False}}


def random_demo(rng: np.random.Generator, steps: int, keys: Mapping[str, int], action_dim: int = 7) -> Arrays:
    """One episode's arrays by their path; its reward is 1 at the last step alone."""
    demo: Arrays = {"actions": rng.uniform(-1, 1, (steps, action_dim)), "rewards": np.zeros(steps)}
    demo["rewards"][-1] = 1.0
    demo["dones"] = demo["rewards"].astype(np.int64)
    demo["states"] = rng.normal(size=(steps, 45))
    for key, width in keys.items():
        values = rng.normal(size=(steps + 1, width))
        demo |= {f"obs/{key}": values[:-1], f"next_obs/{key}": values[1:]}
    return demo


def write_robomimic(
    path: Path,
    demos: Sequence[Arrays],
    *,
    env_args: object = _ENV_ARGS,
    masks: Mapping[str, Sequence[str]] | None = None,
    numbers: Sequence[int] | None = None,
    **attributes: object,
) -> Path:
    """A file of these episodes, numbered as in the list; None in place of an array leaves it out."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for number, demo in zip(numbers or range(len(demos)), demos, strict=True):
            group = data.create_group(f"demo_{number}")
            for name, value in demo.items():
                if value is not None:
                    group.create_dataset(name, data=value)
            group.attrs["num_samples"] = len(demo["actions"])
        data.attrs["total"] = sum(len(demo["actions"]) for demo in demos)
        if env_args is not None:
            data.attrs["env_args"] = env_args if isinstance(env_args, str) else json.dumps(env_args, indent=4)
        data.attrs.update(attributes)
        for name, members in (masks or {}).items():
            file[f"mask/{name}"] = np.array(members, dtype="S")
    return path


_V2_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_V3_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


def random_recording(
    rng: np.random.Generator, steps: int, task: str, *, state_dim: int = 20, action_dim: int = 7, **columns: Any
) -> Arrays:
    """The columns [T, …] of one episode, and its task."""
    return {
        "task": task,
        "observation.state": rng.normal(size=(steps, state_dim)).astype(np.float32),
        "action": rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
        **columns,
    }


def write_lerobot(
    folder: Path, episodes: Sequence[Arrays], *, version: str = "v3.0", per_file: int = 2, **info: Any
) -> Path:
    """A data set of these episodes; `info` replaces fields of meta/info.json. Version 3 puts `per_file` in a file."""
    texts = list(dict.fromkeys(episode["task"] for episode in episodes))
    tables, first = [], 0
    for number, episode in enumerate(episodes):
        steps = len(episode["action"])
        tables.append(_table(episode, number, first, texts.index(episode["task"])))
        first += steps
    columns = {name: value for name, value in episodes[0].items() if name != "task"}
    own = {
        "codebase_version": version,
        "robot_type": "so101_follower",
        "total_episodes": len(episodes),
        "total_frames": first,
        "total_tasks": len(texts),
        "chunks_size": 1000,
        "fps": 30,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": _V3_PATH if version.startswith("v3") else _V2_PATH,
        "features": {name: _feature(value) for name, value in columns.items()},
    }
    own["features"] |= {
        "observation.images.top": {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            name: {"dtype": "int64", "shape": [1], "names": None}
            for name in ("frame_index", "episode_index", "index", "task_index")
        },
    }
    _write_text(folder / "meta/info.json", json.dumps(own | info, indent=4))
    write = _write_v3 if version.startswith("v3") else _write_v2
    write(folder, tables, [episode["task"] for episode in episodes], texts, per_file)
    return folder


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _feature(value: Any) -> dict[str, Any]:
    return {"dtype": str(value.dtype), "shape": list(value.shape[1:]) or [1], "names": None}


def _column(value: Any) -> pa.Array:
    if value.ndim == 1:
        return pa.array(value)
    return pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])


def _table(episode: Arrays, number: int, first: int, task_index: int) -> pa.Table:
    steps = len(episode["action"])
    arrays = {name: _column(value) for name, value in episode.items() if name != "task"}
    frames = np.arange(steps)
    arrays |= {
        "timestamp": pa.array((frames / 30).astype(np.float32)),
        "frame_index": pa.array(frames),
        "episode_index": pa.array(np.full(steps, number)),
        "index": pa.array(frames + first),
        "task_index": pa.array(np.full(steps, task_index)),
    }
    return pa.table(arrays)


def _write_v2(folder: Path, tables: Sequence[pa.Table], tasks: Sequence[str], texts: Sequence[str], _: int) -> None:
    lines = [json.dumps({"task_index": index, "task": text}, ensure_ascii=False) for index, text in enumerate(texts)]
    _write_text(folder / "meta/tasks.jsonl", "\n".join(lines) + "\n")
    rows = [
        {"episode_index": number, "tasks": [task], "length": table.num_rows}
        for number, (table, task) in enumerate(zip(tables, tasks, strict=True))
    ]
    _write_text(folder / "meta/episodes.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
    for number, table in enumerate(tables):
        _write_table(folder / f"data/chunk-000/episode_{number:06d}.parquet", table)


def _write_v3(
    folder: Path, tables: Sequence[pa.Table], tasks: Sequence[str], texts: Sequence[str], per_file: int
) -> None:
    # As pandas writes a frame whose index is the text.
    _write_table(
        folder / "meta/tasks.parquet",
        pa.table({"task_index": pa.array(np.arange(len(texts))), "__index_level_0__": pa.array(list(texts))}),
    )
    ends = np.cumsum([table.num_rows for table in tables])
    rows = [
        {
            "episode_index": number,
            "tasks": [task],
            "length": table.num_rows,
            "data/chunk_index": 0,
            "data/file_index": number // per_file,
            "dataset_from_index": int(end) - table.num_rows,
            "dataset_to_index": int(end),
            "stats/action/max": [1.0],
        }
        for number, (table, task, end) in enumerate(zip(tables, tasks, ends, strict=True))
    ]
    _write_table(folder / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
    for start in range(0, len(tables), per_file):
        joined = pa.concat_tables(tables[start : start + per_file])
        _write_table(folder / f"data/chunk-000/file-{start // per_file:03d}.parquet", joined)
