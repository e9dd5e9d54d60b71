"""Data sets in shards, which need no memory: this project's format for data that are larger than it.

    FOLDER/shards.json        what all of it is: sizes, tasks, the shards and their SHA-256; written last
    FOLDER/episodes.npz       an entry an episode
    FOLDER/shard-00000.npy    float32 [rows, width], a row a step (see `llmdpd.data.columns`)

Rows are read through a memory map, when they are indexed. A shard is held against its SHA-256 when it is first loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmdpd.data import columns
from llmdpd.data.assemble import join_datasets
from llmdpd.data.columns import Record, Rows, Selection, Shard, Store, columns_of, episode_blocks
from llmdpd.data.content import read_npz
from llmdpd.data.trajectories import TrajectoryDataset, offsets_of
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading
from llmdpd.utils.files import atomic_directory, atomic_write_json, check_own_folder, file_sha256, read_json
from llmdpd.utils.plain import from_plain, to_plain

MANIFEST = "shards.json"
_EPISODES, _FIRST = "episodes.npz", "shard-00000.npy"
_FORMAT = 1
_NAME = re.compile(r"shard-\d{5,}\.npy")
_LEAST = 1 << 20  # bytes of a shard
_MOST = 1 << 48  # rows: no disk holds more
_HEADER = 128  # bytes, so that the number of rows can be written when it is known
_PER_EPISODE = ("task_ids", "noise_levels", "successes", "seeds", "success_steps")
_NAMED = ("tasks", "texts", "goal_visible", "environments", "success_from")
_verified: dict[Path, tuple[tuple[int, ...], str]] = {}
"""Shards that this process has read through: their identity and time of change, and the hash."""


@dataclass(frozen=True)
class ShardFile:
    """A shard, as the manifest has it; `chained`: see `llmdpd.data.columns`."""

    name: str
    rows: int
    episodes: int
    chained: bool
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `shards.json` holds. observation, action, part: the keys and the part that were read of the source."""

    format: int
    state_dim: int
    action_dim: int
    expert_actions: bool
    transitions: int
    episodes: int
    tasks: tuple[str, ...]
    texts: tuple[str, ...]
    environments: tuple[str, ...]
    behaviours: tuple[str, ...]
    goal_visible: bool | None
    success_from: str
    observation: tuple[str, ...]
    action: str | None
    part: str | None
    episodes_sha256: str
    shards: tuple[ShardFile, ...]


def _is_own(name: str) -> bool:
    return name in (MANIFEST, _EPISODES) or _NAME.fullmatch(name) is not None


def save_shards(
    datasets: Iterable[TrajectoryDataset],
    folder: str | Path,
    *,
    shard_bytes: int = 1 << 32,
    reading: Reading = DEFAULT_READING,
) -> Path:
    """Write data sets as one, in shards of about so many bytes; whole or not at all. A folder of shards is replaced.

    One after the other is taken, and let go when it is written: `datasets` may be a generator of parts of what no
    memory holds. Tasks of the same name become one (`join_datasets`). `reading` is how they were read, for what is
    asked of a reader later on.

    Raises:
        InputError: no data set; data sets that don't fit together; a shard size of less than a megabyte; a folder of
            other files.
    """
    folder = Path(folder)
    check_own_folder(folder, _is_own, "a new folder, or one of shards")
    if shard_bytes < _LEAST:
        raise InputError("too small a shard", field="shard_bytes", found=shard_bytes, expected=f"{_LEAST} or more")
    headers, files, extents = list[TrajectoryDataset](), list[_Open](), dict[str, list[NDArray[np.float32]]]()
    with atomic_directory(folder) as temporary:
        try:
            for dataset in datasets:
                record = _record_of(dataset)
                if headers:  # before anything of it is written
                    join_datasets([headers[0], _header(dataset, record)])
                headers.append(_header(dataset, record))
                for first, last in episode_blocks(dataset.offsets):
                    if not files or files[-1].record != record or files[-1].size >= shard_bytes:
                        if files:
                            files[-1].close()
                        files.append(_Open(temporary / f"shard-{len(files):05d}.npy", record))
                    block = _block(dataset, first, last)
                    offsets = dataset.offsets[first : last + 1] - dataset.offsets[first]
                    files[-1].write(columns.pack(block, offsets, record), last - first)
                    for name in ("actions", "expert_actions"):
                        if name in block:
                            extents.setdefault(name, []).append(columns.extents_of(block[name], offsets))
        finally:
            if files:
                files[-1].close()
        whole = join_datasets(headers)
        tables = {f"extents/{name}": np.concatenate(parts) for name, parts in extents.items()}
        _write_episodes(whole, tables, temporary / _EPISODES)
        shards = tuple(file.described() for file in files)
        manifest = _manifest(whole, reading, file_sha256(temporary / _EPISODES), shards)
        atomic_write_json(temporary / MANIFEST, to_plain(manifest))
    return folder


def _record_of(dataset: TrajectoryDataset) -> Record:
    chained = columns.is_chained(dataset.observations, dataset.next_observations, dataset.offsets)
    return Record(dataset.state_dim, dataset.action_dim, dataset.expert_actions is not None, chained)


def _header(dataset: TrajectoryDataset, record: Record) -> TrajectoryDataset:
    """A data set without its numbers, of which nothing can be read."""
    nothing = Shard(np.empty((0, record.width), np.float32), record, "")
    store = Store((nothing,), np.zeros(dataset.num_episodes, np.int64), {})
    selection = Selection(store, np.arange(dataset.num_episodes), dataset.offsets)
    return dataclasses.replace(dataset, **columns_of(selection))


def _block(dataset: TrajectoryDataset, first: int, last: int) -> dict[str, Any]:
    """The arrays of some episodes."""
    rows = np.arange(dataset.offsets[first], dataset.offsets[last])
    lengths = np.diff(dataset.offsets[first : last + 1])
    found = columns.take(dataset.numbers(), rows, np.repeat(np.arange(first, last), lengths))
    return {name: array for name, array in found.items() if array is not None}


class _Open:
    """A shard that is being written."""

    def __init__(self, path: Path, record: Record) -> None:
        self.path, self.record = path, record
        self.size = self._rows = self._episodes = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")
        self._file.write(b"\0" * _HEADER)

    def write(self, numbers: NDArray[np.float32], episodes: int) -> None:
        """Append rows [R, W] of whole episodes."""
        data = numbers.astype("<f4", copy=False).data
        self._digest.update(data)
        self._file.write(data)
        self.size, self._rows, self._episodes = (
            self.size + data.nbytes,
            self._rows + len(numbers),
            self._episodes + episodes,
        )

    def close(self) -> None:
        """Write the header; nothing where that was done."""
        if not self._file.closed:
            self._file.seek(0)
            self._file.write(_npy_header(self._rows, self.record.width))
            self._file.close()

    def described(self) -> ShardFile:
        """Of the closed file."""
        sums = self._digest.hexdigest()
        return ShardFile(self.path.name, self._rows, self._episodes, self.record.chained, sums)


def _npy_header(rows: int, width: int) -> bytes:
    """The first bytes of an .npy file, so that any program reads it."""
    magic = np.lib.format.magic(1, 0)
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    length = _HEADER - len(magic) - 2
    return magic + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def _write_episodes(whole: TrajectoryDataset, extents: dict[str, Any], path: Path) -> None:
    names = {name: number for number, name in enumerate(dict.fromkeys(whole.behaviours))}
    behaviours = np.array([names[name] for name in whole.behaviours], np.int32)
    arrays = {name: getattr(whole, name) for name in _PER_EPISODE}
    arrays |= {"lengths": whole.lengths, "terminated": whole.terminals[whole.offsets[1:] - 1], "behaviours": behaviours}
    with path.open("wb") as file:
        np.savez(file, **arrays, **extents)


def _manifest(
    whole: TrajectoryDataset, reading: Reading, episodes_sha256: str, shards: tuple[ShardFile, ...]
) -> Manifest:
    return Manifest(
        format=_FORMAT,
        state_dim=whole.state_dim,
        action_dim=whole.action_dim,
        expert_actions=whole.expert_actions is not None,
        transitions=whole.num_transitions,
        episodes=whole.num_episodes,
        behaviours=tuple(dict.fromkeys(whole.behaviours)),
        episodes_sha256=episodes_sha256,
        shards=shards,
        **{name: getattr(whole, name) for name in _NAMED},
        **{name: getattr(reading, name) for name in ("observation", "action", "part")},
    )


def is_shards(folder: Path) -> bool:
    """Whether a folder is a data set in shards, or what is left of one."""
    return (folder / MANIFEST).is_file() or (folder / _FIRST).is_file()


def shards_environment(folder: Path) -> str:
    """The id of the environment in which the data were recorded, where it is one; otherwise ""."""
    environments = {*_read_manifest(folder).environments}
    return environments.pop() if len(environments) == 1 else ""


def load_shards(folder: str | Path, reading: Reading = DEFAULT_READING) -> TrajectoryDataset:
    """Open a data set in shards; its numbers stay on the disk.

    Raises:
        InputError: a folder that is half written or copied; a shard that is missing, cut, another one or damaged; a
            newer format; keys of observations or actions other than those that the shards were made of.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for field in ("observation", "action", "part"):
        wanted, found = getattr(reading, field), getattr(manifest, field)
        if wanted and wanted != found:
            problem, hint = "no such key or part in shards that were made of another", "convert their source again"
            raise InputError(problem, path=folder, field=field, found=wanted, expected=found, hint=hint)
    arrays = _read_episodes(folder, manifest)
    offsets, terminals = offsets_of(arrays["lengths"]), np.zeros(manifest.transitions, np.bool_)
    terminals[offsets[1:] - 1] = arrays["terminated"]
    named: dict[str, Any] = {name: getattr(manifest, name) for name in _NAMED} | {n: arrays[n] for n in _PER_EPISODE}
    shards = tuple(_open(folder, manifest, file) for file in manifest.shards)
    store = Store(shards, _starts(manifest, arrays["lengths"], folder), _extents(manifest, arrays, folder))
    return TrajectoryDataset(
        **columns_of(Selection(store, np.arange(manifest.episodes), offsets)),
        terminals=terminals,
        offsets=offsets,
        **named,
        behaviours=tuple(manifest.behaviours[number] for number in arrays["behaviours"]),
        source=str(folder),
    )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        expected = f"{MANIFEST}, written last"
        if not (folder / _FIRST).exists():
            within = sorted(each.parent.name for each in folder.glob(f"*/{MANIFEST}"))[:8]
            raise InputError("no data set in shards", path=folder, found=within or "none", expected=expected)
        problem = "a data set in shards that is half written or half copied"
        raise InputError(problem, path=folder, found="shards alone", expected=expected)
    value = read_json(path)
    if isinstance(value, dict) and value.get("format") != _FORMAT:
        problem, hint = "shards of another version's format", "update llmdpd, or convert the data again"
        raise InputError(problem, path=path, field="format", found=value.get("format"), expected=_FORMAT, hint=hint)
    manifest = from_plain(Manifest, value, path)
    names = [file.name for file in manifest.shards]
    if not names or len({*names}) != len(names) or not all(map(_NAME.fullmatch, names)):
        raise InputError(
            "damaged list of shards", path=path, field="shards", found=names[:8], expected="shard-00000.npy, …"
        )
    sizes = [manifest.state_dim, manifest.action_dim, manifest.episodes, manifest.transitions]
    sizes += [number for file in manifest.shards for number in (file.rows, file.episodes)]
    if min(sizes) < 1 or max(sizes) > _MOST:
        raise InputError("damaged list of shards", path=path, field="sizes", found=sizes[:8], expected=f"1 to {_MOST}")
    return manifest


def _read_episodes(folder: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """The arrays an episode, as they were written."""
    path = folder / _EPISODES
    _check_hash(path, manifest.episodes_sha256)
    arrays = read_npz(path)
    count, lengths, behaviours = manifest.episodes, arrays["lengths"], arrays["behaviours"]
    same = len(lengths) == count and int(lengths.sum()) == manifest.transitions
    if not same or behaviours.max(initial=-1) != len(manifest.behaviours) - 1:
        found, expected = f"{len(lengths)} episodes, {int(lengths.sum())} steps", f"{count}, {manifest.transitions}"
        raise InputError("the episodes are not the shards'", path=path, field="lengths", found=found, expected=expected)
    return arrays


def _open(folder: Path, manifest: Manifest, file: ShardFile) -> Shard:
    """A shard, mapped into memory after it was held against its hash."""
    path = folder / file.name
    record = Record(manifest.state_dim, manifest.action_dim, manifest.expert_actions, file.chained)
    expected = _HEADER + 4 * file.rows * record.width
    if not path.is_file():
        raise InputError("a shard is missing", path=path, found="no such file", expected=f"{expected:,} bytes")
    if (size := path.stat().st_size) != expected:
        problem = "a shard is cut, or half copied" if size < expected else "a shard is longer than it was"
        raise InputError(problem, path=path, found=f"{size:,} bytes", expected=f"{expected:,} bytes")
    with path.open("rb") as opened:
        header = opened.read(_HEADER)
        if header != _npy_header(file.rows, record.width):
            problem, sizes = "this is not the shard that was written here", f"{file.rows} × {record.width}"
            raise InputError(problem, path=path, field="header", found=header[10:80], expected=sizes)
        _check_hash(path, file.sha256, _HEADER)
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    numbers = np.frombuffer(mapped, "<f4", offset=_HEADER).reshape(file.rows, record.width)
    return Shard(numbers, record, file.sha256, mapped)


def _check_hash(path: Path, expected: str, start: int = 0) -> None:
    """Raise `InputError` unless a file's bytes from `start` on have this SHA-256; an unchanged one is read once."""
    if not path.is_file():
        raise InputError("a file of the shards is missing", path=path, found="no such file")
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if _verified.get(path) != (identity, expected):
        if (found := file_sha256(path, start)) != expected:
            problem = "damaged, or not the file that was written here"
            raise InputError(problem, path=path, field="SHA-256", found=found, expected=expected)
        _verified[path] = identity, expected


def _starts(manifest: Manifest, lengths: Rows, folder: Path) -> Rows:
    """The row of each episode's first step, through all shards."""
    counts = np.array([file.episodes for file in manifest.shards], np.int64)
    if counts.min() < 1 or counts.sum() != len(lengths):
        found, expected = counts.tolist()[:8], f"{len(lengths)} episodes"
        raise InputError(
            "damaged list of shards", path=folder / MANIFEST, field="shards", found=found, expected=expected
        )
    rows = lengths + np.repeat([file.chained for file in manifest.shards], counts)
    ends = np.cumsum(rows)
    if (np.diff(ends[np.cumsum(counts) - 1], prepend=0) != [file.rows for file in manifest.shards]).any():
        raise InputError(
            "the episodes are not the shards'", path=folder / _EPISODES, field="lengths", expected="their rows"
        )
    starts: Rows = ends - rows
    return starts


def _extents(manifest: Manifest, arrays: dict[str, NDArray[Any]], folder: Path) -> dict[str, NDArray[np.float32]]:
    names = ("actions", "expert_actions") if manifest.expert_actions else ("actions",)
    found = {name: arrays[f"extents/{name}"] for name in names}
    for name, table in found.items():
        if table.shape != (manifest.episodes, 2, manifest.action_dim):
            raise InputError("the episodes are not the shards'", path=folder / _EPISODES, field=f"extents/{name}")
    return found
