"""Columns of a data set that stay on the disk: rows are read when they are indexed.

All numbers of a step stand in one row of a file, so that a transition is one place on the disk, not one a column:

    observation [S] | action [A] | reward | the expert's action [A], if any | next observation [S], unless chained

In a chained shard the row after a step's holds its next observation, and each episode has one row more than steps.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]

STORED = ("observations", "actions", "rewards", "next_observations", "expert_actions")
"""The columns that may stay on the disk."""
BLOCK = 1 << 16
"""Rows that are worked on at once where all are gone through."""
_BEFORE = "before"  # the observation one step before, of a first step its own
_MOST_AT_ONCE = 1 << 28  # bytes of a column that may become an array by itself


@dataclass(frozen=True)
class Record:
    """Where the numbers of a step stand in its row."""

    state_dim: int
    action_dim: int
    expert: bool
    chained: bool

    @cached_property
    def places(self) -> dict[str, slice | int]:
        """The columns of each name's numbers."""
        s, a = self.state_dim, self.action_dim
        places: dict[str, slice | int] = {"observations": slice(0, s), "actions": slice(s, s + a), "rewards": s + a}
        end = s + a + 1
        if self.expert:
            places["expert_actions"] = slice(end, end + a)
            end += a
        if not self.chained:
            places["next_observations"] = slice(end, end + s)
        return places

    @property
    def width(self) -> int:
        """Numbers of a row."""
        experts, following = self.action_dim * self.expert, self.state_dim * (not self.chained)
        return self.state_dim + self.action_dim + 1 + experts + following


class Shard(NamedTuple):
    """Episodes, one row a step (see `Record`): numbers [R, W], in a file or in memory, and their SHA-256."""

    numbers: Floats
    record: Record
    sha256: str
    mapped: mmap.mmap | None = None  # of the file

    def read(self, names: Collection[str], rows: Rows, first: NDArray[np.bool_]) -> dict[str, Floats]:
        """The numbers of these names in rows [B], as new arrays; `first`: of a first step of its episode."""
        places, found = self.record.places, dict[str, Floats]()
        here = self.numbers.take(rows, axis=0) if any(name in places for name in names) else None
        for name in names:
            if name in places:
                assert here is not None, "taken above"
                part = here[:, places[name]]
            else:
                near = rows - ~first if name == _BEFORE else rows + 1
                part = self.numbers.take(near, axis=0)[:, : self.record.state_dim]
            found[name] = np.ascontiguousarray(part)
        return found


@dataclass(frozen=True, eq=False)
class Store:
    """Shards as one: E episodes whose rows are counted through all of them.

    starts [E]: the row of each episode's first step. extents: the least and the greatest of each number over each
    episode [E, 2, A], of "actions" and, where there are any, "expert_actions".
    """

    shards: tuple[Shard, ...]
    starts: Rows
    extents: Mapping[str, Floats]
    bounds: Rows = field(init=False)  # [shards + 1], the first row of each shard

    def __post_init__(self) -> None:
        bounds = np.cumsum([0, *(len(shard.numbers) for shard in self.shards)]).astype(np.int64)
        object.__setattr__(self, "bounds", bounds)

    def read(self, names: Collection[str], rows: Rows, first: NDArray[np.bool_]) -> dict[str, Floats]:
        """As `Shard.read`, of rows in any of the shards."""
        if len(self.shards) == 1 or not len(rows):
            return self.shards[0].read(names, rows, first)
        which = np.searchsorted(self.bounds, rows, side="right") - 1
        found: dict[str, Floats] = {}
        for number in np.unique(which):
            where = np.flatnonzero(which == number)
            part = self.shards[number].read(names, rows[where] - self.bounds[number], first[where])
            if len(where) == len(rows):
                return part
            for name, values in part.items():
                found.setdefault(name, np.empty((len(rows), *values.shape[1:]), np.float32))[where] = values
        return found


@dataclass(frozen=True, eq=False)
class Selection:
    """Episodes of a store, in the order of a data set: their numbers in the store [E], and their offsets [E + 1]."""

    store: Store
    episodes: Rows
    offsets: Rows

    def select(self, chosen: Rows) -> Selection:
        """These of its episodes."""
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        return Selection(self.store, self.episodes[chosen], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class Change(NamedTuple):
    """What is done to a column's rows as they are read.

    apply(rows [B, …], the store's episodes that they are of [B]) → rows; label: what says that two do the same.
    """

    apply: Callable[[Floats, Rows], Floats]
    label: str


class StoredColumn:
    """A column [N, …] of a data set that stays on the disk; indexing reads rows, as new arrays.

    Args:
        selection: of which episodes.
        name: one of `STORED`.
        changes: done to the rows as they are read, in this order.
        remembered: numbers of the observation one step before that are appended (`TrajectoryDataset.with_remembered`).

    Raises:
        TypeError: what needs the whole column at once, unless it is small.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, selection: Selection, name: str, changes: tuple[Change, ...] = (), remembered: tuple[int, ...] = ()
    ) -> None:
        self.selection, self.name, self.changes, self.remembered = selection, name, changes, remembered
        record, length = selection.store.shards[0].record, int(selection.offsets[-1])
        widths = {"rewards": (), "actions": (record.action_dim,), "expert_actions": (record.action_dim,)}
        self.shape = (length, *widths.get(name, (record.state_dim + len(remembered),)))
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self.name} {list(self.shape)} on disk>"

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, np.integer)):
            return self[np.array([key])][0]
        if isinstance(key, slice):
            rows = np.arange(*key.indices(len(self)))
        else:
            rows = np.asarray(key)
            rows = np.flatnonzero(rows) if rows.dtype == np.bool_ and rows.shape == (len(self),) else rows
            if rows.dtype.kind not in "iu":
                raise IndexError(f"rows of {self!r} are taken by whole numbers, not by {type(key).__name__}")
            rows = np.where(rows < 0, rows + len(self), rows).astype(np.int64, copy=False)
            if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
                raise IndexError(f"a row outside 0 … {len(self) - 1}")
        return read({self.name: self}, rows.reshape(-1))[self.name].reshape(*rows.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if 4 * int(np.prod(self.shape)) > _MOST_AT_ONCE:
            self._refuse()
        return self[:].astype(dtype or self.dtype, copy=False)

    def _refuse(self) -> NoReturn:
        raise TypeError(f"{self!r} is not read into memory as a whole: take rows of it, column[a:b]")

    def of(self, selection: Selection) -> StoredColumn:
        """The column of other episodes of the same store."""
        return StoredColumn(selection, self.name, self.changes, self.remembered)

    def changed(self, change: Change) -> StoredColumn:
        """The column with one more change."""
        return StoredColumn(self.selection, self.name, (*self.changes, change), self.remembered)

    def remembering(self, indices: Sequence[int]) -> StoredColumn:
        """The column of observations, or next observations, with what is remembered of those one step before."""
        return StoredColumn(self.selection, self.name, self.changes, tuple(indices))

    def clipped(self, low: Floats, high: Floats) -> StoredColumn:
        """The column of actions with each episode's clipped to bounds of its own, [E, A]."""
        store, episodes = self.selection.store, self.selection.episodes
        limits = np.empty((2, len(store.starts), low.shape[1]), np.float32)
        limits[:, episodes] = low, high
        digest = hashlib.sha256(low.tobytes() + high.tobytes()).hexdigest()
        return self.changed(Change(lambda rows, own: rows.clip(limits[0][own], limits[1][own]), f"clipped {digest}"))

    def episode_extents(self) -> tuple[Floats, Floats]:
        """The least and the greatest of each number over each episode [E, A], of actions as they are in the store."""
        table = self.selection.store.extents[self.name][self.selection.episodes]
        return table[:, 0], table[:, 1]

    def identity(self) -> bytes:
        """What tells its content from that of others: the files' hashes, the episodes' places, the changes."""
        store, episodes = self.selection.store, self.selection.episodes
        files, labels = [shard.sha256 for shard in store.shards], [change.label for change in self.changes]
        return repr((self.name, files, labels, self.remembered)).encode() + store.starts[episodes].tobytes()


def read(columns: Mapping[str, StoredColumn], rows: Rows, episodes: Rows | None = None) -> dict[str, Floats]:
    """Rows [B] of several columns of one data set, read together; `episodes` [B] of the data set, where known."""
    selection = next(iter(columns.values())).selection
    if episodes is None:
        episodes = np.searchsorted(selection.offsets, rows, side="right") - 1
    steps, origin = rows - selection.offsets[episodes], selection.episodes[episodes]
    names = dict.fromkeys(column.name for column in columns.values())
    for column in columns.values():
        if column.remembered:
            names |= {_BEFORE if column.name == "observations" else "observations": None}
    found = selection.store.read(names, selection.store.starts[origin] + steps, steps == 0)
    result = {}
    for key, column in columns.items():
        values = found[column.name]
        if column.remembered:
            before = found[_BEFORE if column.name == "observations" else "observations"]
            values = np.concatenate([values, before[:, list(column.remembered)]], axis=1)
        for change in column.changes:
            values = change.apply(values, origin)
        result[key] = values
    return result


def take(columns: Mapping[str, Any], rows: Rows, episodes: Rows) -> dict[str, Any]:
    """Rows [B], which are of these episodes [B], of each column, as new arrays; of None it is None."""
    stored = {name: column for name, column in columns.items() if isinstance(column, StoredColumn)}
    found: dict[str, Any] = dict(read(stored, rows, episodes)) if stored else {}
    return {name: found[name] if name in found else None if a is None else a[rows] for name, a in columns.items()}


def expect_single_rows(column: Any) -> None:
    """Tell the system that rows of a column, if it is on the disk, will be read here and there.

    Of a file that the memory does not hold, it would else read 32 pages around each one, and let go of others for them.
    """
    for shard in column.selection.store.shards if isinstance(column, StoredColumn) else ():
        if shard.mapped is not None and hasattr(mmap, "MADV_RANDOM"):
            shard.mapped.madvise(mmap.MADV_RANDOM)


def blocks(column: Any) -> Iterator[NDArray[Any]]:
    """The rows of an array or a column, a block at a time."""
    for start in range(0, len(column), BLOCK):
        yield column[start : start + BLOCK]


def extent(column: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the greatest of each number [A] over all rows of an array or a column [N, A]."""
    if isinstance(column, StoredColumn):
        if column.name in column.selection.store.extents and not column.changes:
            least, most = column.episode_extents()
            return least.min(0), most.max(0)
        parts = [(block.min(0), block.max(0)) for block in blocks(column)]
        return np.min([low for low, _ in parts], axis=0), np.max([high for _, high in parts], axis=0)
    return column.min(0), column.max(0)


def episode_blocks(offsets: Rows) -> Iterator[tuple[int, int]]:
    """The first and the last (exclusive) episode of blocks of whole episodes; `offsets` [E + 1]."""
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1)
        yield first, last
        first = last


def is_chained(observations: Any, following: Any, offsets: Rows) -> bool:
    """Whether each next observation is the observation of the next step, to the bit, within the episodes."""
    for first, last in episode_blocks(offsets):
        rows, ends = slice(int(offsets[first]), int(offsets[last])), offsets[first + 1 : last] - offsets[first]
        own, other = (np.ascontiguousarray(array[rows]).view(np.uint32) for array in (observations, following))
        same = (own[1:] == other[:-1]).all(axis=1)
        same[ends - 1] = True  # from an episode's last step to the next one's first
        if not same.all():
            return False
    return True


def pack(columns: Mapping[str, Any], offsets: Rows, record: Record) -> Floats:
    """The rows [R, W] of whole episodes, from arrays [N, …] by name; `offsets` [E + 1] begin with 0."""
    count, lengths = int(offsets[-1]), np.diff(offsets)
    place = np.arange(count)
    if record.chained:
        place += np.repeat(np.arange(len(lengths)), lengths)
    numbers = np.zeros((count + len(lengths) * record.chained, record.width), np.float32)
    for name, where in record.places.items():
        numbers[place, where] = columns[name]
    if record.chained:
        last = offsets[1:] - 1
        numbers[place[last] + 1, : record.state_dim] = columns["next_observations"][last]
    return numbers


def extents_of(actions: Any, offsets: Rows) -> Floats:
    """The least and the greatest of each number over each episode [E, 2, A]."""
    parts = [reduce.reduceat(actions, offsets[:-1], axis=0) for reduce in (np.minimum, np.maximum)]
    return np.stack(parts, axis=1)


def in_memory(columns: Mapping[str, Any], offsets: Rows) -> dict[str, StoredColumn]:
    """Arrays in memory as columns of a store, so that they can be joined with those on the disk."""
    kept = {name: column for name, column in columns.items() if column is not None}
    sizes = kept["observations"].shape[1], kept["actions"].shape[1]
    chained = is_chained(kept["observations"], kept["next_observations"], offsets)
    record = Record(*sizes, "expert_actions" in kept, chained)
    numbers = pack(kept, offsets, record)
    shard = Shard(numbers, record, hashlib.sha256(numbers.data).hexdigest())
    starts = offsets[:-1] + np.arange(len(offsets) - 1) * chained
    extents: dict[str, Floats] = {n: extents_of(kept[n], offsets) for n in ("actions", "expert_actions") if n in kept}
    store = Store((shard,), starts, extents)
    return columns_of(Selection(store, np.arange(len(offsets) - 1), offsets))


def columns_of(selection: Selection) -> dict[str, Any]:
    """All columns of the episodes of a store."""
    expert = selection.store.shards[0].record.expert
    return {name: StoredColumn(selection, name) for name in STORED if expert or name != "expert_actions"}


def join(parts: Sequence[Mapping[str, StoredColumn]]) -> dict[str, StoredColumn]:
    """The columns of several data sets, one after the other, as columns of one store; nothing is read."""
    selections = [part["observations"].selection for part in parts]
    # A store that several parts are of counts once, unless the same episode could be changed in several ways.
    changed = any(column.changes for part in parts for column in part.values())
    keys = [number if changed else id(selection.store) for number, selection in enumerate(selections)]
    distinct = dict(zip(keys, (selection.store for selection in selections), strict=True))
    stores = list(distinct.values())
    before = dict(zip(distinct, np.cumsum([0, *(len(store.starts) for store in stores[:-1])]).tolist(), strict=True))
    starts = [before[key] for key in keys]
    rows = np.cumsum([0, *(int(store.bounds[-1]) for store in stores[:-1])])
    whole = Store(
        tuple(shard for store in stores for shard in store.shards),
        np.concatenate([store.starts + row for store, row in zip(stores, rows, strict=True)]),
        {
            name: np.concatenate([store.extents[name] for store in stores])
            for name in stores[0].extents
            if all(name in store.extents for store in stores)
        },
    )
    episodes = np.concatenate([own.episodes + start for own, start in zip(selections, starts, strict=True)])
    lengths = np.concatenate([np.diff(selection.offsets) for selection in selections])
    selection = Selection(whole, episodes, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    joined = {}
    for name in parts[0]:
        own = [part[name] for part in parts]
        if len({column.remembered for column in own}) > 1:
            raise ValueError("columns that remember different numbers can't be joined")
        changes = (_joined_changes(own, starts),) if any(column.changes for column in own) else ()
        joined[name] = StoredColumn(selection, name, changes, own[0].remembered)
    return joined


def _joined_changes(columns: Sequence[StoredColumn], starts: Sequence[int]) -> Change:
    """One change that does to the episodes of each column, which begin at `starts`, what its own changes do."""

    def apply(values: Floats, origin: Rows) -> Floats:
        own, result = np.searchsorted(starts, origin, side="right") - 1, values.copy()
        for number in np.unique(own):
            where = own == number
            for change in columns[number].changes:
                result[where] = change.apply(result[where], origin[where] - starts[number])
        return result

    return Change(apply, repr([[change.label for change in column.changes] for column in columns]))


def selected(columns: Mapping[str, Any], selection: Selection) -> dict[str, Any]:
    """The columns of other episodes of the same store; what is None stays so."""
    return {name: None if column is None else column.of(selection) for name, column in columns.items()}
