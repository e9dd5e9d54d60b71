"""Reader of LeRobot's data sets (github.com/huggingface/lerobot), codebase versions 2.0, 2.1 and 3.0.

    meta/info.json                       codebase_version, fps, robot_type, features, data_path, totals
    meta/tasks.jsonl                     2.x: {"task_index": 0, "task": "Push the block."}, a line each
    meta/episodes.jsonl                  2.x: {"episode_index": 0, "tasks": […], "length": 120}, a line each
    data/chunk-000/episode_000000.parquet
    meta/tasks.parquet                   3.0: task_index, and the task as pandas' index ("task", "__index_level_0__")
    meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet      3.0: many episodes a file; `data/chunk_index`, `data/file_index` say which

Rows are steps: `observation.state` [S], `action` [A], `frame_index`, `episode_index`, `task_index` and, where they were
recorded, `next.reward`, `next.done`, `next.success`. `next.done` is an end, not a fall: all episodes end by truncation.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import join_episodes
from llmdpd.data.flags import SUCCESS, as_flags, first_success
from llmdpd.data.notes import say_once
from llmdpd.data.parquet import read_integers, read_numbers, read_table
from llmdpd.data.recordings import known_steps, list_fields, task_name
from llmdpd.data.trajectories import EpisodeRecord, TrajectoryDataset
from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.base import Reading
from llmdpd.utils.files import parse_json, read_json, read_text

_INFO = "meta/info.json"
_STATE = ("observation.state", "observation.environment_state")
_NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")
_WIDEST = 65_536  # as are the states of policies
_REWARD, _DONE, _SUCCESS = "next.reward", "next.done", "next.success"
_log = logging.getLogger(__name__)


def load_lerobot(folder: str | Path, reading: Reading) -> TrajectoryDataset:
    """Read one data set; each of its task texts is a task, named by its words, with the text as text prompt.

    Observations are the columns of `reading.observation`, side by side in this order; by default `observation.state`,
    followed by `observation.environment_state` where there is one. Actions are `reading.action`, by default `action`.
    Rewards are `next.reward`, 0 where there are none. An episode succeeds where `reading.success` is true at any step,
    or `next.success`, where none is named or a customary one (`flags.SUCCESS`) that is not there; without such a column
    success is unknown. Images and videos are left out.

    `reading.part` is one of the `splits` of meta/info.json. The last step of each episode is left out, for its next
    observation is not recorded.

    Raises:
        InputError: no such data set, another version, a missing, damaged or cut-off file, a column missing, of a wrong
            type or width, NaN or Inf, rows that don't fit the metadata, an episode of several tasks.
    """
    info = _read_info(Path(folder))
    columns = _choose_columns(info, reading)
    names, texts = _name_tasks(_tasks(info))
    episodes = _episodes(info, columns, names, _split(info, reading.part))
    return join_episodes(
        known_steps(episodes, info.folder),
        texts=texts,
        source=str(info.folder),
        environments=dict.fromkeys(texts, info.robot),
        success_from=columns.success or "",
    )


@dataclass(frozen=True)
class _Info:
    """What `meta/info.json` says."""

    folder: Path
    version: int  # 2 or 3
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    chunks_size: int
    total_episodes: int
    total_frames: int
    splits: Mapping[str, Any]
    robot: str  # "so101_follower at 30 fps"; "" where it is not said


def _read_info(folder: Path) -> _Info:
    path = folder / _INFO
    values = read_json(path, finite=False)
    if not isinstance(values, dict):
        raise InputError("damaged metadata", path=path, found=type(values).__name__, expected="an object")
    version = re.fullmatch(r"v([23])\.\d+", str(values.get("codebase_version")))
    if version is None:
        found, expected = repr(values.get("codebase_version")), "v2.0, v2.1 or v3.0"
        hint = "LeRobot's own conversion scripts bring older data sets to v2.1 or v3.0"
        problem = "this version of LeRobot's format can't be read"
        raise InputError(problem, path=path, field="codebase_version", found=found, expected=expected, hint=hint)
    wanted = {
        "features": dict,
        "data_path": str,
        "total_episodes": int,
        "total_frames": int,
        **({"chunks_size": int} if version[1] == "2" else {}),
    }
    for name, kind in wanted.items():
        if not isinstance(values.get(name), kind) or (kind is int and values[name] < 1):
            found = repr(values[name])[:80] if name in values else "absent"
            expected = {int: "a whole number above 0", str: "text", dict: "an object"}[kind]
            raise InputError("damaged metadata", path=path, field=name, found=found, expected=expected)
    for name, feature in values["features"].items():
        if not isinstance(feature, dict) or not isinstance(feature.get("shape"), list):
            expected = "an object with dtype and shape"
            raise InputError("damaged metadata", path=path, field=f"features.{name}", found=feature, expected=expected)
    splits = values.get("splits")
    robot, fps = values.get("robot_type"), values.get("fps")
    own: dict[str, Any] = {
        "splits": splits if isinstance(splits, dict) else {},
        "robot": f"{robot} at {fps} fps" if isinstance(robot, str) and isinstance(fps, (int, float)) else "",
    }
    return _Info(folder, int(version[1]), **own, **{"chunks_size": 0} | {name: values[name] for name in wanted})


@dataclass(frozen=True)
class _Columns:
    """The columns that are read, and how many numbers a step each has."""

    observation: Mapping[str, int]
    action: str
    action_dim: int
    reward: bool
    success: str | None


def _choose_columns(info: _Info, reading: Reading) -> _Columns:
    keys = reading.observation or tuple(key for key in _STATE if key in info.features)
    if not keys:
        raise _not_chosen(info, "observation.state", "observation")
    action = reading.action or "action"
    if action not in info.features and reading.action is None:
        raise _not_chosen(info, action, "action")
    own = (_SUCCESS,) if reading.success is None or reading.success in SUCCESS else ()
    success = next((name for name in (reading.success, *own) if name in info.features), None)
    if success is not None:
        _width(info, success)
    return _Columns(
        observation={key: _width(info, key) for key in keys},
        action=action,
        action_dim=_width(info, action),
        reward=_REWARD in info.features,
        success=success,
    )


def _split(info: _Info, part: str | None) -> range | None:
    """The episodes of a split, such as "train": "0:50"; None for all."""
    if part is None:
        return None
    span = re.fullmatch(r"(\d+):(\d+)", str(info.splits.get(part)))
    if span is None:
        found, path = json.dumps(info.splits)[:200], info.folder / _INFO
        raise InputError("no such split", path=path, field="splits", found=found, expected=f'"{part}": "FROM:TO"')
    return range(int(span[1]), int(span[2]))


def _fields(info: _Info) -> str:
    return list_fields((name, feature["shape"]) for name, feature in info.features.items())


def _not_chosen(info: _Info, missing: str, choice: str) -> InputError:
    problem, expected = f"no column {missing}", f"`{choice}` that names columns of one dimension a step"
    hint = "images and videos can't be observations here"
    path = info.folder / _INFO
    return InputError(problem, path=path, field="features", found=_fields(info), expected=expected, hint=hint)


def _width(info: _Info, name: str) -> int:
    """Numbers a step of a column. Raises InputError unless it is one of numbers in one dimension."""
    path, field = info.folder / _INFO, f"features.{name}"
    feature = info.features.get(name)
    if feature is None:
        hint = f"nearest names: {nearest_names(name, info.features)}"
        raise InputError("no such column", path=path, field=field, found=_fields(info), expected=name, hint=hint)
    shape, kind = feature["shape"], str(feature.get("dtype"))
    if len(shape) != 1 or type(shape[0]) is not int or not 1 <= shape[0] <= _WIDEST or not _NUMBERS.fullmatch(kind):
        problem, found = "this column can't be read", f"{kind} {shape}"
        raise InputError(problem, path=path, field=field, found=found, expected="numbers in one dimension a step")
    return shape[0]


def _tasks(info: _Info) -> dict[int, str]:
    """Task index → text."""
    if info.version == 2:
        path = info.folder / "meta/tasks.jsonl"
        rows = _read_lines(path)
    else:
        path = info.folder / "meta/tasks.parquet"
        rows = read_table(path).to_pylist()
    tasks: dict[int, str] = {}
    for number, row in enumerate(rows):
        # pandas names its index only where it has a name.
        index, text = row.get("task_index"), row.get("task", row.get("__index_level_0__"))
        if not isinstance(index, int) or not isinstance(text, str):
            found, expected = repr(row)[:80], "task_index, a whole number, and task, a text"
            raise InputError("damaged metadata", path=path, field=f"row {number}", found=found, expected=expected)
        if tasks.setdefault(index, text) != text:
            raise InputError(
                "a task index with two texts", path=path, field=f"task_index {index}", found=f"row {number}"
            )
    if not tasks:
        raise InputError("no task is listed", path=path, found="no row", expected="one or more")
    return tasks


def _name_tasks(tasks: Mapping[int, str]) -> tuple[dict[int, str], dict[str, str]]:
    """(task index → name, name → text). Equal texts are one task; where two texts give one name, both get the index."""
    first: dict[str, int] = {}
    for index, text in tasks.items():
        first.setdefault(text, index)
    plain = {text: task_name(text) for text in first}
    shared = {name for name, count in Counter(plain.values()).items() if count > 1} | {""}
    names = {text: f"{name or 'task'}-{first[text]}" if name in shared else name for text, name in plain.items()}
    return {index: names[text] for index, text in tasks.items()}, {name: text for text, name in names.items()}


@dataclass(frozen=True)
class _EpisodeRows:
    """Where the metadata say that an episode lies."""

    index: int
    length: int
    path: Path


def _listed(info: _Info) -> list[_EpisodeRows]:
    if info.version == 2:
        path = info.folder / "meta/episodes.jsonl"
        rows = _read_lines(path)
    else:
        path = info.folder / "meta/episodes"
        rows = _read_episode_tables(path)
    episodes = [_located(info, row, path) for row in rows]
    counted = (("total_episodes", len({e.index for e in episodes})), ("total_frames", sum(e.length for e in episodes)))
    for field, have in counted:
        want = getattr(info, field)
        if have != want:
            problem, found, expected = "the metadata disagree", f"{field} {want}", f"{have}, as listed in {path}"
            raise InputError(problem, path=info.folder / _INFO, field=field, found=found, expected=expected)
    return sorted(episodes, key=lambda episode: episode.index)


def _read_episode_tables(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise InputError(
            "no episodes listed", path=folder, found="no parquet file", expected="chunk-000/file-000.parquet"
        )
    wanted = (
        "episode_index",
        "length",
        "data/chunk_index",
        "data/file_index",
        "dataset_from_index",
        "dataset_to_index",
    )
    return [row for file in files for row in read_table(file, wanted).to_pylist()]


def _located(info: _Info, row: dict[str, Any], path: Path) -> _EpisodeRows:
    index, length = row.get("episode_index"), row.get("length")
    start, end = row.get("dataset_from_index"), row.get("dataset_to_index")
    if isinstance(start, int) and isinstance(end, int):
        reach = end - start
        length = reach if length is None else length
        if length != reach:
            found, expected = f"dataset_from_index {start}, dataset_to_index {end}", f"length {length}"
            field = f"episode {index}"
            raise InputError("the metadata disagree", path=path, field=field, found=found, expected=expected)
    if not isinstance(index, int) or index < 0 or not isinstance(length, int) or length < 1:
        found, expected = repr(row)[:120], "episode_index and length, whole numbers"
        raise InputError("damaged metadata", path=path, field="episodes", found=found, expected=expected)
    if info.version == 2:
        values: dict[str, Any] = {"episode_chunk": index // info.chunks_size, "episode_index": index}
    else:
        values = {"chunk_index": row.get("data/chunk_index"), "file_index": row.get("data/file_index")}
    return _EpisodeRows(index, length, info.folder / _fill(info, values))


def _fill(info: _Info, values: Mapping[str, Any]) -> PurePosixPath:
    """`data_path` with these numbers in its places such as {chunk_index:03d}."""

    def number(place: re.Match[str]) -> str:
        value = values.get(place[1])
        if not isinstance(value, int):
            raise _bad_path(info, f"{place[0]}, which is {value}")
        return format(value, place[2] or "d")

    path = PurePosixPath(re.sub(r"\{(\w+)(?::(0?\d{0,2}d))?\}", number, info.data_path))
    if path.is_absolute() or ".." in path.parts:
        raise _bad_path(info, info.data_path)
    return path


def _bad_path(info: _Info, found: str) -> InputError:
    expected = "a path inside the data set with places for numbers, as data/chunk-{chunk_index:03d}/…"
    return InputError(
        "wrong path of the data", path=info.folder / _INFO, field="data_path", found=found, expected=expected
    )


def _episodes(
    info: _Info, columns: _Columns, names: Mapping[int, str], chosen: range | None
) -> Iterator[EpisodeRecord]:
    if not columns.reward:
        say_once(_log, "%s: no column %s: rewards are 0", info.folder, _REWARD)
    files: dict[Path, list[_EpisodeRows]] = {}
    for episode in _listed(info):
        files.setdefault(episode.path, []).append(episode)
    for path, episodes in files.items():
        wanted = [episode for episode in episodes if chosen is None or episode.index in chosen]
        if not wanted:
            continue
        steps = _read_steps(columns, path)
        runs = _runs(steps)
        extra = sorted(set(runs) - {episode.index for episode in episodes})
        if extra:
            found, expected = f"rows of episode {extra[0]}", "rows of the episodes that the metadata list for this file"
            raise InputError(
                "the data and metadata disagree", path=path, field="episode_index", found=found, expected=expected
            )
        for episode in wanted:
            yield _record(steps, runs.get(episode.index, slice(0, 0)), episode, names)


@dataclass(frozen=True)
class _Steps:
    """The rows of one file."""

    path: Path
    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    success: NDArray[np.float32] | None
    success_name: str
    episode_index: NDArray[np.int64]
    frame_index: NDArray[np.int64]
    task_index: NDArray[np.int64]


def _read_steps(columns: _Columns, path: Path) -> _Steps:
    own = [*columns.observation, columns.action, *([_REWARD] if columns.reward else [])]
    own += [columns.success] if columns.success else []
    table = read_table(path, [*own, "episode_index", "frame_index", "task_index"])
    observations = [read_numbers(table, name, width, path) for name, width in columns.observation.items()]
    rewards = read_numbers(table, _REWARD, 1, path)[:, 0] if columns.reward else np.zeros(table.num_rows, np.float32)
    return _Steps(
        path,
        observations[0] if len(observations) == 1 else np.concatenate(observations, axis=1),
        read_numbers(table, columns.action, columns.action_dim, path),
        rewards,
        read_numbers(table, columns.success, 1, path)[:, 0] if columns.success else None,
        columns.success or "",
        **{name: read_integers(table, name, path) for name in ("episode_index", "frame_index", "task_index")},
    )


def _runs(steps: _Steps) -> dict[int, slice]:
    """Episode index → its rows, which lie together."""
    index = steps.episode_index
    starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))
    ends = np.append(starts[1:], len(index))
    runs: dict[int, slice] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        episode = int(index[start])
        if episode in runs:
            found, expected = f"episode {episode} again at row {start}", "the rows of an episode together"
            field = "episode_index"
            raise InputError("an episode in two places", path=steps.path, field=field, found=found, expected=expected)
        runs[episode] = slice(start, end)
    return runs


def _record(steps: _Steps, rows: slice, episode: _EpisodeRows, names: Mapping[int, str]) -> EpisodeRecord:
    path, label = steps.path, f" of episode {episode.index}"
    frames = steps.frame_index[rows]
    if len(frames) != episode.length or (frames != np.arange(episode.length)).any():
        wrong = int(np.argmax(frames != np.arange(len(frames))))
        found = f"{len(frames)} rows" if len(frames) != episode.length else f"{frames[wrong]} at row {wrong}"
        expected = f"0 to {episode.length - 1}, as listed in meta"
        raise InputError("steps are missing", path=path, field="frame_index" + label, found=found, expected=expected)
    tasks = np.unique(steps.task_index[rows]).tolist()
    if len(tasks) > 1 or tasks[0] not in names:
        found, expected = ", ".join(map(str, tasks[:8])), "one index of those in meta"
        problem = "an episode of several tasks" if len(tasks) > 1 else "a task that is not listed"
        raise InputError(problem, path=path, field="task_index" + label, found=found, expected=expected)
    success, step = -1, -1
    if steps.success is not None:
        success, step = first_success(as_flags(steps.success[rows], steps.success_name + label, path))
    return EpisodeRecord(
        steps.observations[rows],
        steps.actions[rows],
        steps.rewards[rows],
        names[tasks[0]],
        success=success,
        success_step=step,
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            row = parse_json(line, path, finite=False) if line.strip() else {}
        except InputError:
            row = None
        if not isinstance(row, dict):
            expected = "a JSON object"
            raise InputError("damaged metadata", path=path, field=f"line {number}", found=line[:80], expected=expected)
        rows += [row] if row else []
    return rows
