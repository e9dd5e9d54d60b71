"""Data sets in shards: what is read of them is what was written, and nothing is read whole; damage is named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmdpd.data import TrajectoryDataset, columns, join_datasets, load_dataset, save_shards, shards
from llmdpd.data.collecting.scripted import content_hash
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading
from llmdpd.training.batches import _Transitions
from llmdpd.utils.files import file_sha256

MakeDataset = Callable[..., TrajectoryDataset]
EPISODES = (("push-v3", 5), ("reach-v3", 1), ("push-v3", 7), ("sweep-v3", 3), ("reach-v3", 6), ("push-v3", 2))


@pytest.fixture(autouse=True)
def nothing_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, no column becomes an array by itself."""
    monkeypatch.setattr(columns, "_MOST_AT_ONCE", 0)


@pytest.fixture(params=["a shard", "shards", "data sets"])
def in_shards(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The same data set from the disk: in one shard, a shard for each one or two episodes, or joined of several."""

    def write(dataset: TrajectoryDataset) -> TrajectoryDataset:
        if request.param == "data sets":
            for part, episodes in enumerate(np.array_split(np.arange(dataset.num_episodes), 3)):
                save_shards([dataset.select(episodes)], tmp_path / f"data-{part}")
            return dataclasses.replace(load_dataset(tmp_path), source=dataset.source)
        if request.param == "shards":
            monkeypatch.setattr(columns, "BLOCK", 6)
            monkeypatch.setattr(shards, "_LEAST", 1)
        save_shards([dataset], tmp_path / "data", shard_bytes=1 if request.param == "shards" else 1 << 20)
        count = len(list((tmp_path / "data").glob("shard-*.npy")))
        assert count == 1 if request.param == "a shard" else count > 3
        return dataclasses.replace(load_dataset(tmp_path / "data"), source=dataset.source)

    return write


def arrays(dataset: TrajectoryDataset) -> dict[str, Any]:
    """All that a data set holds; columns on the disk a row at a time."""
    whole = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    return {
        name: np.stack([value[row] for row in range(len(value))]) if isinstance(value, columns.StoredColumn) else value
        for name, value in whole.items()
    }


def check_same(stored: TrajectoryDataset, memory: TrajectoryDataset) -> None:
    assert stored.stored
    assert not memory.stored
    own, other = arrays(stored), arrays(memory)
    for name, value in other.items():
        if isinstance(value, np.ndarray):
            assert own[name].dtype == value.dtype, name
            np.testing.assert_array_equal(own[name], value, err_msg=name)
        else:
            assert own[name] == value, name


def apart(dataset: TrajectoryDataset) -> TrajectoryDataset:
    """The same, but for a next observation that is not the next step's observation, as in a shuffled replay."""
    following = dataset.next_observations.copy()
    following[0] += 1
    return dataclasses.replace(dataset, next_observations=following)


@pytest.mark.parametrize("expert", [True, False])
@pytest.mark.parametrize("chained", [True, False])
def test_all_is_kept(
    make_dataset: MakeDataset, in_shards: Callable[..., Any], rng: np.random.Generator, expert: bool, chained: bool
) -> None:
    memory = make_dataset(EPISODES, expert=expert, texts={"push-v3": "Push."}, goal_visible=True, source="made")
    memory = memory if chained else apart(memory)
    stored = in_shards(memory)
    check_same(stored, memory)
    rows = rng.integers(memory.num_transitions, size=50)
    for own, other in zip(stored.gather(rows), memory.gather(rows), strict=True):
        assert (own is None) == (other is None)
        assert other is None or (own.dtype, own.tobytes()) == (other.dtype, other.tobytes())
    assert len(stored.gather([]).observations) == 0
    for e in range(memory.num_episodes):
        np.testing.assert_array_equal(stored.episode(e).observations, memory.episode(e).observations)
        assert (stored.episode(e).task, stored.episode(e).seed) == (memory.episode(e).task, memory.episode(e).seed)
    assert stored.returns().tobytes() == memory.returns().tobytes()
    assert stored.returns_to_go().tobytes() == memory.returns_to_go().tobytes()
    assert stored.target_returns() == memory.target_returns()


def test_what_is_made_of_it_is_the_same(
    make_dataset: MakeDataset, in_shards: Callable[..., Any], rng: np.random.Generator
) -> None:
    memory = make_dataset(EPISODES, goal_visible=True, source="made")
    stored = in_shards(memory)
    order = rng.permutation(memory.num_episodes)[:4]

    def double(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows + rows

    makings: dict[str, Callable[[TrajectoryDataset], TrajectoryDataset]] = {
        "episodes": lambda data: data.select(order),
        "tasks": lambda data: data.select_tasks(["sweep", "push"]),
        "selections of selections": lambda data: (
            data.select(order).select([2, 0, 1]).select_tasks([data.tasks[data.task_ids[order[2]]]])
        ),
        "actions": lambda data: data.with_actions(double, "double"),
        "remembered": lambda data: data.with_remembered([3, 0]),
        "all": lambda data: data.with_remembered([2]).select(order).with_actions(double, "double"),
        "joined": lambda data: join_datasets([data.select([1, 0]), data, data.select(order)]),
        "joined after changes": lambda data: join_datasets(
            [data.select([1, 0]).with_actions(double, "double"), data.select([0, 3])]
        ),
    }
    for name, make in makings.items():
        check_same(make(stored), make(memory))
        assert name
    other = make_dataset((("sweep-v3", 4), ("hammer-v3", 2)), goal_visible=True, source="other")
    check_same(join_datasets([stored, other]), join_datasets([memory, other]))
    check_same(join_datasets([other, stored]), join_datasets([other, memory]))


def test_of_each_task_every_transition_is_drawn_once_in_an_epoch(
    make_dataset: MakeDataset, in_shards: Callable[..., Any], rng: np.random.Generator
) -> None:
    """A sampler's numbers 0 … n - 1 stand for each transition of a task once, however many shards there are."""
    memory = make_dataset((*EPISODES, *(("push-v3", int(n)) for n in rng.integers(1, 9, 5))))
    chosen = np.sort(rng.permutation(memory.num_episodes)[:9])
    for dataset, whole in ((in_shards(memory), memory), (in_shards(memory).select(chosen), memory.select(chosen))):
        found: list[bytes] = []
        for task in dict.fromkeys(whole.tasks[number] for number in whole.task_ids):
            pool = _Transitions(dataset, dataset.episodes_of(task))
            rows = pool[np.arange(len(pool))]
            assert rows.tolist() == whole.transitions_of(task).tolist()
            found += [row.tobytes() for row in dataset.gather(rng.permutation(rows)).observations]
        assert sorted(found) == sorted(row.tobytes() for row in whole.observations)
        assert len(set(found)) == whole.num_transitions


def test_a_folder_of_other_files_is_kept(make_dataset: MakeDataset, tmp_path: Path) -> None:
    folder = save_shards([make_dataset((("a", 3),))], tmp_path / "s")
    assert save_shards([make_dataset((("a", 4),))], folder) == folder
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="other files") as error:
        save_shards([make_dataset((("a", 5),))], folder)
    assert (error.value.path, error.value.found) == (str(folder), "notes.txt")
    assert load_dataset(folder).lengths.tolist() == [4]


def test_rows_are_taken_as_of_an_array(make_dataset: MakeDataset, in_shards: Callable[..., Any]) -> None:
    memory = make_dataset(EPISODES)
    stored, count = in_shards(memory), memory.num_transitions
    index = np.array([[0, count - 1], [-1, 3]])
    for name in ("observations", "rewards", "next_observations"):
        column, array = getattr(stored, name), getattr(memory, name)
        np.testing.assert_array_equal(column[index], array[index])
        np.testing.assert_array_equal(column[2:7], array[2:7])
        np.testing.assert_array_equal(column[::-3], array[::-3])
        np.testing.assert_array_equal(column[np.arange(count) % 2 == 0], array[::2])
        assert (column.shape, column.ndim, len(column)) == (array.shape, array.ndim, len(array))
    for wrong in ([count], [-count - 1], [0.5], "a"):
        with pytest.raises(IndexError):
            stored.observations[wrong]
    with pytest.raises(TypeError, match="not read into memory"):
        np.asarray(stored.observations)


def test_small_columns_become_arrays(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make_dataset()
    stored = load_dataset(save_shards([memory], tmp_path / "data"))
    monkeypatch.setattr(columns, "_MOST_AT_ONCE", memory.observations.nbytes)
    np.testing.assert_array_equal(np.asarray(stored.observations), memory.observations)


def test_a_generator_of_data_sets_becomes_one(make_dataset: MakeDataset, tmp_path: Path) -> None:
    """Chained and unchained ones, tasks that several have, and another width that is refused before it is written."""
    parts = [make_dataset(EPISODES[:3]), apart(make_dataset(EPISODES[2:5])), make_dataset((("hammer-v3", 4),))]
    save_shards((part for part in parts), tmp_path / "data")
    check_same(dataclasses.replace(load_dataset(tmp_path / "data"), source="", goal_visible=None), join_datasets(parts))
    wider = make_dataset(state_dim=40)
    with pytest.raises(InputError, match="don't fit together"):
        save_shards(iter([parts[0], wider]), tmp_path / "other")
    with pytest.raises(InputError, match="no data set"):
        save_shards([], tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    array = np.load(tmp_path / "data" / "shard-00000.npy", mmap_mode="r")  # any program reads it
    np.testing.assert_array_equal(array[:5, :39], parts[0].observations[:5])


def test_signs_of_zero_and_least_differences_are_kept(make_dataset: MakeDataset, tmp_path: Path) -> None:
    memory = make_dataset(EPISODES[:1])
    memory.observations[1, 0], memory.next_observations[0, 0] = 0.0, -0.0
    stored = load_dataset(save_shards([memory], tmp_path / "data"))
    assert stored.next_observations[:5].tobytes() == memory.next_observations.tobytes()
    assert stored.observations[:5].tobytes() == memory.observations.tobytes()


def test_the_hash_is_of_the_content(make_dataset: MakeDataset, tmp_path: Path) -> None:
    memory = make_dataset(EPISODES)
    first, again = (load_dataset(save_shards([memory], tmp_path / name)) for name in ("a", "b"))
    assert content_hash(first) == content_hash(again)
    changed = memory.with_actions(lambda rows: rows * np.float32(0.5), "half")
    others = [
        load_dataset(save_shards([changed], tmp_path / "c")),
        first.select([0, 1]),
        first.select([1, 0]),
        first.with_actions(lambda rows: rows * np.float32(0.5), "half"),
        first.with_actions(lambda rows: rows * np.float32(0.3), "third"),
        dataclasses.replace(first, texts=("a", "b", "c")),
    ]
    assert len({content_hash(each) for each in (first, *others)}) == 7


@pytest.fixture
def written(make_dataset: MakeDataset, tmp_path: Path) -> Path:
    parts = [make_dataset(EPISODES), apart(make_dataset(EPISODES))]
    return save_shards(parts, tmp_path / "data", reading=Reading(("state", "goal"), part="train"))


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "shards.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _flip(name: str, place: int) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return flip


def _cut(folder: Path) -> None:
    path = folder / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-8])


def _swap(folder: Path) -> None:
    """Another's shard, as large."""
    path = folder / "shard-00000.npy"
    array = np.load(path)
    np.save(path, array[::-1])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "half written": (lambda folder: (folder / "shards.json").unlink(), "half written or half copied", "data"),
    "newer": (_edit(format=2), "another version's format", "shards.json"),
    "missing": (lambda folder: (folder / "shard-00001.npy").unlink(), "a shard is missing", "shard-00001.npy"),
    "cut": (_cut, "cut, or half copied", "shard-00001.npy"),
    "foreign": (_swap, "not the file that was written", "shard-00000.npy"),
    "flipped": (_flip("shard-00001.npy", 1000), "damaged", "shard-00001.npy"),
    "header": (_flip("shard-00000.npy", 60), "not the shard", "shard-00000.npy"),
    "episodes": (_flip("episodes.npz", 100), "damaged", "episodes.npz"),
    "no episodes": (lambda folder: (folder / "episodes.npz").unlink(), "is missing", "episodes.npz"),
    "out of the folder": (
        _edit(shards=[{"name": "../a.npy", "rows": 1, "episodes": 1, "chained": True, "sha256": ""}]),
        "damaged list of shards",
        "shards.json",
    ),
    "more than can be": (_edit(transitions=10**30), "damaged list of shards", "shards.json"),
    "no shards": (_edit(shards=[]), "damaged list of shards", "shards.json"),
    "episodes of others": (_edit(transitions=49), "not the shards'", "episodes.npz"),
    "fewer behaviours": (_edit(behaviours=["a"]), "not the shards'", "episodes.npz"),
    "fewer tasks": (_edit(tasks=["push-v3"]), "one text a task", "data"),
    "no text": (_edit(tasks=3), "wrong value", "shards.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(written: Path, what: str) -> None:
    assert load_dataset(written).num_episodes == 12, "and so it has been read before"
    damage, problem, file = DAMAGE[what]
    damage(written)
    with pytest.raises(InputError, match=problem) as caught:
        load_dataset(written)
    assert Path(str(caught.value.path)).name == file


def test_keys_are_those_that_were_read(written: Path) -> None:
    assert load_dataset(written, reading=Reading(("state", "goal"), part="train")).state_dim == 39
    for reading in (Reading(("goal", "state")), Reading(action="delta"), Reading(part="valid")):
        with pytest.raises(InputError, match="no such key"):
            load_dataset(written, reading=reading)


def test_a_shard_is_read_through_once(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(path: Path, *start: int) -> str:
        read.append(path.name)
        return file_sha256(path, *start)

    monkeypatch.setattr(shards, "file_sha256", noted)
    monkeypatch.setattr(shards, "_verified", {})
    for _ in range(2):
        load_dataset(written)
        assert sorted(read) == ["episodes.npz", "shard-00000.npy", "shard-00001.npy"]
    copy = written.with_name("copy")
    shutil.copytree(written, copy)
    load_dataset(copy)
    assert len(read) == 6


def test_too_small_a_shard_is_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too small a shard"):
        save_shards([make_dataset()], tmp_path / "data", shard_bytes=1000)


def test_the_system_reads_no_more_than_a_row_of_batches_needs(make_dataset: MakeDataset, tmp_path: Path) -> None:
    stored = load_dataset(save_shards([make_dataset()], tmp_path / "data"))

    def advised() -> list[bool]:
        maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
        parts = itertools.pairwise(maps)
        return [" rr " in flags.splitlines()[0] for head, flags in parts if str(tmp_path) in head]

    assert advised() == [False], "what goes through all rows reads ahead"
    columns.expect_single_rows(stored.observations)
    assert advised() == [True]
