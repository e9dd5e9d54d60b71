"""MTDiff's files: read right in every container, and refused with file and field where something is wrong."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmdpd.data import load_dataset
from llmdpd.data.mtdiff import load_mtdiff
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading


def record(rng: np.random.Generator, steps: int = 6, task: Any = None, **changes: Any) -> dict[str, Any]:
    observations = rng.normal(size=(steps + 1, 39)).astype(np.float32)
    terminals = np.zeros((steps, 1), np.float32)
    if steps:
        terminals[-1] = 1
    return {
        "observations": observations[:-1],
        "actions": rng.uniform(-1, 1, (steps, 4)).astype(np.float32),
        "rewards": rng.normal(size=(steps, 1)).astype(np.float32),
        "next_observations": observations[1:],
        "terminals": terminals,
        "task": np.array("box-close-v2") if task is None else task,
    } | changes


def objects(records: list[Any]) -> np.ndarray:
    array = np.empty(len(records), object)
    array[:] = records
    return array


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".npy":
        np.save(path, objects(records), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez_compressed(path, objects(records))
    else:
        path.write_bytes(pickle.dumps(records))
    return path


def test_names_that_are_not_metaworlds_stay_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    records = [record(rng, 3, name) for name in ("cheetah-v2", "push", "push-v1", "reach-v3")]
    path = write(tmp_path / "data.npy", records)
    # Whether its flags are true ends or time limits, nobody knows but who asks.
    with pytest.raises(InputError, match="true ends or time limits") as caught:
        load_dataset(path)
    assert caught.value.field == "timeouts of record 0"
    for terminates in (True, False):
        dataset = load_dataset(path, reading=Reading(terminates=terminates))
        assert dataset.tasks == ("cheetah-v2", "push-v3", "reach-v3")
        assert dataset.terminals.sum() == (4 if terminates else 0)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl", ".pickle"])
def test_every_container(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    records = [record(rng), record(rng, 3, "push-v2"), record(rng, 1)]
    dataset = load_dataset(write(tmp_path / f"data{suffix}", records))
    assert dataset.tasks == ("box-close-v3", "push-v3")
    assert dataset.task_ids.tolist() == [0, 1, 0]
    assert dataset.lengths.tolist() == [6, 3, 1]
    assert not dataset.terminals.any()
    assert dataset.goal_visible is True
    assert dataset.source == str(tmp_path / f"data{suffix}")
    for field in ("observations", "actions", "next_observations"):
        want = np.concatenate([r[field] for r in records])
        np.testing.assert_array_equal(getattr(dataset, field), want)
    np.testing.assert_array_equal(dataset.rewards, np.concatenate([r["rewards"][:, 0] for r in records]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_flat_columns(tmp_path: Path, rng: np.random.Generator, protocol: int) -> None:
    one = record(rng)
    one["rewards"], one["terminals"] = one["rewards"][:, 0], one["terminals"][:, 0].astype(bool)
    one["observations"] = one["observations"].astype(np.float64)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(one, protocol=protocol))
    dataset = load_mtdiff(path)
    np.testing.assert_array_equal(dataset.rewards, one["rewards"])
    assert dataset.observations.dtype == np.float32


def test_flags_part_joined_episodes(tmp_path: Path, rng: np.random.Generator) -> None:
    one = record(rng, 7)
    one["terminals"][:] = 0
    one["terminals"][[1, 4]] = 1
    dataset = load_mtdiff(write(tmp_path / "a.npy", [one]))
    assert dataset.lengths.tolist() == [2, 3, 2]
    # The next observation is the file's own, also where an episode ends.
    np.testing.assert_array_equal(dataset.next_observations, one["next_observations"])
    assert not dataset.terminals.any()


def test_npz_of_one_episode_takes_the_task_from_its_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    one = record(rng)
    del one["task"]
    folder = tmp_path / "drawer-open-v2" / "run" / "dataset"
    folder.mkdir(parents=True)
    np.savez(folder / "0.npz", **one)
    dataset = load_dataset(folder / "0.npz")
    assert dataset.tasks == ("drawer-open-v3",)
    np.testing.assert_array_equal(dataset.actions, one["actions"])


@pytest.mark.parametrize("place", ["robot_v2/{}.npz", "drawer-open-v2/{}.npz", "robot_v3_{}.npz"])
def test_a_folder_of_anybody_is_no_task(tmp_path: Path, rng: np.random.Generator, place: str) -> None:
    """Only a suite says that a folder's name is a task's, and of data of its own widths."""
    for name in ("pour", "wipe"):
        one = record(rng) | {"timeouts": np.zeros(6)}
        del one["task"]
        one["actions"] = one["actions"][:, :3]
        path = tmp_path / place.format(name)
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **one)
    assert load_dataset(tmp_path).tasks == tuple(Path(place.format(name)).stem for name in ("pour", "wipe"))


def test_hidden_goals_are_seen(tmp_path: Path, rng: np.random.Generator) -> None:
    hidden, shown = record(rng), record(rng)
    for field in ("observations", "next_observations"):
        hidden[field] = hidden[field].copy()
        hidden[field][:, 36:39] = 0
    assert load_dataset(write(tmp_path / "h.npy", [hidden, hidden])).goal_visible is False
    with pytest.raises(InputError, match="others hide it"):
        load_dataset(write(tmp_path / "m.npy", [shown, hidden]))


def test_other_widths_are_read_with_unknown_goal(tmp_path: Path, rng: np.random.Generator) -> None:
    one = record(rng)
    for field in ("observations", "next_observations"):
        one[field] = one[field][:, :12]
    path = write(tmp_path / "w.npy", [one])
    # Data of other widths are not Meta-World's, whose flags would mean time limits, whatever their name is.
    with pytest.raises(InputError, match="true ends or time limits"):
        load_dataset(path)
    dataset = load_dataset(path, reading=Reading(terminates=True))
    assert dataset.terminals.sum() == 1
    assert (dataset.state_dim, dataset.goal_visible) == (12, None)
    with pytest.raises(InputError, match="does not match push-v3"):
        dataset.check_matches(39, 4, "push-v3")


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl"])
def test_code_in_a_file_is_not_run(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / f"evil{suffix}", [record(rng), record(rng, task=Runs(f"touch {mark}"))])
    with pytest.raises(InputError, match="nothing of it was run") as caught:
        load_dataset(path)
    assert caught.value.path == str(path)
    assert "system" in str(caught.value.found)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl"])
def test_damaged_files(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    path = write(tmp_path / f"x{suffix}", [record(rng)])
    whole = path.read_bytes()
    for size in (3, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as caught:
            load_dataset(path)
        assert caught.value.path == str(path)
    path.write_bytes(b"this is no data at all, whatever its name says")
    with pytest.raises(InputError):
        load_dataset(path)


REFUSED: list[tuple[str, Any, str]] = [
    *[(name, None, "missing") for name in ("observations", "actions", "rewards", "terminals")],
    ("task", None, "task is not known"),
    ("rewards", np.zeros(5), "unequal lengths"),
    ("actions", np.zeros((6, 4, 1)), "dimensions"),
    ("observations", np.full((6, 39), np.nan), "NaN or Inf"),
    ("next_observations", np.zeros((6, 38)), "wrong width"),
    ("terminals", np.full((6, 1), 0.5), "wrong flags"),
    *[("task", task, "wrong task") for task in (np.array(["a-v2", "b-v2"]), np.array(3), np.array(""), 5)],
]


@pytest.mark.parametrize(("name", "value", "problem"), REFUSED)
def test_a_wrong_field_is_named(tmp_path: Path, rng: np.random.Generator, name: str, value: Any, problem: str) -> None:
    path, wrong = tmp_path / "x.npy", record(rng) | {name: value}
    if value is None:
        del wrong[name]
    with pytest.raises(InputError, match=problem) as caught:
        load_mtdiff(write(path, [record(rng), wrong]))
    assert caught.value.field == (name if problem == "NaN or Inf" else f"{name} of record 1")
    assert caught.value.path == str(path)


def test_files_of_another_content(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((30, 2)))
    np.savez(tmp_path / "plain.npz", a=np.zeros(3))
    (tmp_path / "text.pkl").write_bytes(pickle.dumps("text"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "plain.npy").read_bytes()[:-8])
    (tmp_path / "nothing.npy").touch()
    write(tmp_path / "none.npy", [])
    write(tmp_path / "none.pkl", [])
    write(tmp_path / "short.npy", [record(rng, 0)])
    for name, problem in {
        **dict.fromkeys(("plain.npy", "plain.npz", "text.pkl"), "not a layout that is known(.|\n)*observations"),
        **dict.fromkeys(("nothing.npy", "none.npy", "none.pkl"), "empty"),
        **{"cut.npy": "cut off", "short.npy": "without steps", "absent.npy": "not found"},
    }.items():
        with pytest.raises(InputError, match=problem) as caught:
            load_mtdiff(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
