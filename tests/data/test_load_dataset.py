"""One entry for all formats: which reader is taken, folders, the choice of tasks, nothing imported early."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from llmdpd.data import TrajectoryDataset, load_dataset, save_d4rl, save_minari
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading

MakeDataset = Callable[..., TrajectoryDataset]


def test_a_folder_is_joined_whatever_is_in_it(tmp_path: Path, make_dataset: MakeDataset) -> None:
    save_minari(make_dataset((("push-v3", 3), ("reach-v3", 2)), expert=False), tmp_path / "deep" / "minari")
    save_d4rl(make_dataset((("sweep-v3", 4),)), tmp_path / "b.hdf5")
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "broken.hdf5").write_text("never looked at")
    dataset = load_dataset(str(tmp_path))
    assert dataset.tasks == ("sweep-v3", "push-v3", "reach-v3")
    assert dataset.lengths.tolist() == [4, 3, 2]


def test_tasks_are_chosen_in_order(tmp_path: Path, make_dataset: MakeDataset) -> None:
    save_minari(make_dataset(), tmp_path)
    dataset = load_dataset(tmp_path, tasks=["sweep", "push-v2"])
    assert dataset.tasks == ("sweep-v3", "push-v3")
    assert dataset.lengths.tolist() == [5, 7, 3]
    assert dataset.task_ids.tolist() == [1, 1, 0]
    assert load_dataset(tmp_path, tasks=["reach-v3"]).lengths.tolist() == [1]


def test_only_what_is_asked_for_is_read(tmp_path: Path, make_dataset: MakeDataset) -> None:
    folders = save_minari(make_dataset(), tmp_path)
    (folders[2] / "data" / "main_data.hdf5").write_bytes(b"broken")
    assert load_dataset(tmp_path, tasks=["push", "reach"]).num_episodes == 3
    with pytest.raises(InputError, match="not an HDF5 file"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("kind", ["minari", "d4rl", "both"])
def test_an_unknown_task_offers_the_nearest(tmp_path: Path, make_dataset: MakeDataset, kind: str) -> None:
    if kind != "d4rl":
        save_minari(make_dataset(expert=False), tmp_path)
    if kind != "minari":
        save_d4rl(make_dataset((("push-v3", 2),)), tmp_path / "x.hdf5")
    with pytest.raises(InputError, match="no such task") as caught:
        load_dataset(tmp_path, tasks=["push-v3", "pusch-v3"])
    assert "push-v3" in str(caught.value.hint)
    assert caught.value.found == "'pusch-v3'"
    assert str(tmp_path) in str(caught.value.path)


@pytest.mark.parametrize("kind", ["minari", "d4rl", "npz", "list"])
def test_what_a_format_has_not_is_refused_or_said(
    tmp_path: Path, make_dataset: MakeDataset, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset((("pour", 4),), expert=False)
    dataset = dataclasses.replace(dataset, successes=np.full(1, -1, np.int8), success_steps=np.full(1, -1))
    fields = {name: getattr(dataset, name) for name in ("observations", "actions", "rewards", "next_observations")}
    fields |= {"terminals": np.zeros(4), "timeouts": np.array([0, 0, 0, 1])}
    if kind == "minari":
        save_minari(dataset, tmp_path)
    elif kind == "d4rl":
        save_d4rl(dataset, tmp_path / "pour.hdf5")
    elif kind == "npz":
        np.savez(tmp_path / "pour.npz", **fields)
    else:
        np.save(tmp_path / "pour.npy", np.array([fields | {"task": "pour"}], object))
    with pytest.raises(InputError, match="no named parts") as caught:
        load_dataset(tmp_path, reading=Reading(part="train"))
    assert (caught.value.field, caught.value.found) == ("part", "train")
    assert load_dataset(tmp_path, reading=Reading(success="is_sucess")).successes.tolist() == [-1]
    assert "no is_sucess in the data" in caplog.text


@pytest.mark.parametrize("kind", ["d4rl", "npz", "list"])
@pytest.mark.parametrize(("one", "other"), [("terminals", "terminations"), ("timeouts", "truncations")])
def test_two_names_of_one_flag_must_agree(
    tmp_path: Path, rng: np.random.Generator, kind: str, one: str, other: str
) -> None:
    fields = {name: rng.normal(size=(6, 3)) for name in ("observations", "actions", "next_observations")}
    fields |= {"rewards": rng.normal(size=6), "terminals": np.zeros(6), "timeouts": np.arange(6) == 2}
    row = int(rng.integers(6))
    for agree in (True, False):
        fields[other] = fields[one].astype(np.int64) ^ (0 if agree else np.arange(6) == row)
        if kind == "d4rl":
            with h5py.File(tmp_path / "pour.hdf5", "w") as file:
                file.update(fields)
        elif kind == "npz":
            np.savez(tmp_path / "pour.npz", **fields)
        else:
            np.save(tmp_path / "pour.npy", np.array([fields | {"task": "pour"}], object))
        if agree:
            assert load_dataset(tmp_path).lengths.tolist() == [3, 3]
    with pytest.raises(InputError, match="disagree") as caught:
        load_dataset(tmp_path)
    assert str(caught.value.field).startswith(other)
    assert f"at row {row}" in str(caught.value.found)


def test_two_data_sets_of_one_task_are_one(tmp_path: Path, make_dataset: MakeDataset) -> None:
    for number, name in enumerate(("a", "b")):
        save_minari(make_dataset((("push-v3", 3 + number),), goal_visible=True), tmp_path / name)
    for dataset in (load_dataset(tmp_path), load_dataset(tmp_path, tasks=["push"])):
        assert dataset.tasks == ("push-v3",)
        assert dataset.lengths.tolist() == [3, 4]


def test_parts_of_another_width_are_refused(tmp_path: Path, make_dataset: MakeDataset) -> None:
    save_d4rl(make_dataset((("a", 3),)), tmp_path / "a.h5")
    save_d4rl(make_dataset((("b", 3),), state_dim=11), tmp_path / "b.h5")
    with pytest.raises(InputError, match="don't fit together") as caught:
        load_dataset(tmp_path)
    assert caught.value.path == str(tmp_path / "b.h5")
    assert (caught.value.found, caught.value.expected) == ("11 numbers a step", "39 numbers a step")


@pytest.mark.parametrize("content", ["missing", "empty folder", "text folder", "text file", "hidden"])
def test_nothing_to_read_says_what_can_be_read(tmp_path: Path, content: str) -> None:
    path = tmp_path / "here"
    if content != "missing" and content != "text file":
        (path / "sub").mkdir(parents=True)
    if content == "text folder":
        (path / "sub" / "metadata.json").write_text('{"something": "else"}')
        (path / "sub" / "a.csv").write_text("1,2")
    if content == "hidden":
        (path / ".x.npy").write_text("")
    if content == "text file":
        path.write_text("x")
    with pytest.raises(InputError) as caught:
        load_dataset(path)
    assert caught.value.path == str(path)
    for word in ("Minari", ".hdf5", ".npy", "minari:ID", "d4rl:NAME"):
        assert word in str(caught.value.expected)


@pytest.mark.parametrize("spec", ["minari:", "d4rl:"])
def test_a_name_is_needed(spec: str) -> None:
    with pytest.raises(InputError, match="no name given"):
        load_dataset(spec)


def test_nothing_heavy_is_imported_early() -> None:
    code = (
        "import sys, llmdpd.data; "
        "heavy = {'minari', 'gymnasium', 'h5py', 'torch', 'metaworld'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_large_file_is_not_held_many_times(tmp_path: Path) -> None:
    """Peak memory of reading stays under twice the arrays read, float64 on disk included."""
    import tracemalloc

    import h5py

    rows, width = 20_000, 50
    with h5py.File(tmp_path / "big.hdf5", "w") as file:
        for name in ("observations", "next_observations"):
            file.create_dataset(name, data=np.random.default_rng(0).normal(size=(rows, width)))
        file.create_dataset("actions", data=np.zeros((rows, 2)))
        for name in ("rewards", "terminals", "timeouts"):
            file.create_dataset(name, data=np.zeros(rows, np.float32))
    load_dataset(tmp_path / "big.hdf5")  # imports h5py outside of the measurement
    tracemalloc.start()
    try:
        dataset = load_dataset(tmp_path / "big.hdf5")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dataset.num_transitions == rows
    assert peak < 2 * (dataset.observations.nbytes + dataset.next_observations.nbytes)
