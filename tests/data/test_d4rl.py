"""D4RL's layout: where episodes end, what is a terminal, and every way in which a file can be wrong."""

from __future__ import annotations

import sys
import types
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdpd.data import TrajectoryDataset, load_dataset, save_d4rl
from llmdpd.data.d4rl import collector_of, load_d4rl, load_d4rl_by_name
from llmdpd.errors import InputError

MakeDataset = Callable[..., TrajectoryDataset]


def fields(rows: int = 8, terminals: tuple[int, ...] = (2,), timeouts: tuple[int, ...] = (5,)) -> dict[str, Any]:
    """Observation i is [i, i]; the next one i + 0.5, so that it is seen where a next observation comes from."""
    numbers = np.arange(rows, dtype=np.float32)
    return {
        "observations": np.stack([numbers, numbers], axis=1),
        "actions": numbers[:, None] / 10,
        "rewards": numbers * 2,
        "next_observations": np.stack([numbers, numbers], axis=1) + 0.5,
        "terminals": np.isin(np.arange(rows), terminals),
        "timeouts": np.isin(np.arange(rows), timeouts),
    }


def write(path: Path, data: dict[str, Any], **attributes: Any) -> Path:
    """The fields of `data` as an HDF5 file; None leaves a field out, "group" makes it a group."""
    with h5py.File(path, "w") as file:
        for name, value in data.items():
            if isinstance(value, str):
                file.create_group(name)
            elif value is not None:
                file.create_dataset(name, data=value)
        file.attrs.update(attributes)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hopper-medium.hdf5"


def test_next_observations_keep_every_row(path: Path) -> None:
    dataset = load_dataset(write(path, fields(), environment="Hopper-v4"))
    assert dataset.offsets.tolist() == [0, 3, 6, 8]
    assert np.flatnonzero(dataset.terminals).tolist() == [2]
    np.testing.assert_array_equal(dataset.next_observations[:, 0], np.arange(8) + 0.5)
    np.testing.assert_array_equal(dataset.actions[:, 0], np.arange(8, dtype=np.float32) / 10)
    np.testing.assert_array_equal(dataset.rewards, np.arange(8) * 2)
    assert dataset.tasks == ("Hopper-v4",)
    assert (dataset.expert_actions, dataset.goal_visible, dataset.source) == (None, None, str(path))


def test_without_next_observations_nothing_is_joined_across_episodes(path: Path) -> None:
    data = fields()
    del data["next_observations"]
    dataset = load_d4rl(write(path, data))
    # Row 5 timed out and row 7 is cut off: their next observations are not known. Row 2 is terminal: it stays.
    assert dataset.observations[:, 0].tolist() == [0, 1, 2, 3, 4, 6]
    assert dataset.next_observations[:, 0].tolist() == [1, 2, 2, 4, 5, 7]
    assert dataset.offsets.tolist() == [0, 3, 5, 6]
    assert np.flatnonzero(dataset.terminals).tolist() == [2]
    assert dataset.tasks == ("hopper-medium",)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["", "terminal", "timeout", "both"]), min_size=1, max_size=12))
def test_episodes_follow_the_flags(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    path = tmp_path_factory.mktemp("d4rl") / "x.h5"
    terminal = tuple(i for i, kind in enumerate(kinds) if kind in ("terminal", "both"))
    timeout = tuple(i for i, kind in enumerate(kinds) if kind in ("timeout", "both"))
    data = fields(len(kinds), terminal, timeout)
    whole = load_d4rl(write(path, data))
    assert np.flatnonzero(whole.terminals).tolist() == list(terminal)
    ends = sorted({*terminal, *timeout, len(kinds) - 1})
    assert (whole.offsets[1:] - 1).tolist() == ends
    del data["next_observations"]
    kept = [i for i in range(len(kinds)) if i not in ends or i in terminal]
    write(path, data)
    if not kept:
        with pytest.raises(InputError, match="no transition with a next observation"):
            load_d4rl(path)
        return
    short = load_d4rl(path)
    assert short.observations[:, 0].tolist() == kept
    assert np.flatnonzero(short.terminals).tolist() == [kept.index(i) for i in terminal]
    parts = [[i for i in kept if a < i <= b] for a, b in zip([-1, *ends[:-1]], ends, strict=True)]
    assert short.lengths.tolist() == [len(part) for part in parts if part]


def test_other_types_and_columns_are_read(path: Path) -> None:
    data = fields()
    data["rewards"] = data["rewards"].astype(np.float64)[:, None]
    data["observations"] = data["observations"].astype(np.float64)
    data["terminals"] = data["terminals"].astype(np.uint8)[:, None]
    data["timeouts"] = data["timeouts"].astype(np.float32)
    dataset = load_d4rl(write(path, data, environment=np.bytes_(b"Hopper-v2")))
    assert dataset.rewards.shape == (8,)
    assert dataset.observations.dtype == np.float32
    assert dataset.offsets.tolist() == [0, 3, 6, 8]
    assert dataset.tasks == ("Hopper-v2",)
    assert load_d4rl(path, task="mine").tasks == ("mine",)


def test_what_is_saved_is_read(path: Path, make_dataset: MakeDataset) -> None:
    dataset = make_dataset((("Hopper-v4", 4), ("Hopper-v4", 1), ("Hopper-v4", 6)))
    save_d4rl(dataset, path, collector="SAC", final_eval_return=3.5)
    back = load_dataset(path)
    for name in ("observations", "actions", "rewards", "next_observations", "terminals", "offsets"):
        np.testing.assert_array_equal(getattr(back, name), getattr(dataset, name), err_msg=name)
    assert back.tasks == ("Hopper-v4",)
    assert collector_of(path) == "SAC"
    with h5py.File(path) as file:
        assert set(file) == {"observations", "actions", "rewards", "next_observations", "terminals", "timeouts"}
        assert dict(file.attrs) == {"environment": "Hopper-v4", "collector": "SAC", "final_eval_return": 3.5}
        assert file["terminals"].dtype == file["timeouts"].dtype == bool
        assert np.flatnonzero(file["timeouts"][()]).tolist() == [3, 10]
        assert file["rewards"].shape == (11,)


def test_saving_is_whole_or_not_at_all(path: Path, make_dataset: MakeDataset) -> None:
    save_d4rl(make_dataset((("a", 2),)), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="one task"):
        save_d4rl(make_dataset((("a", 2), ("b", 2))), path)
    with pytest.raises(TypeError):
        save_d4rl(make_dataset((("a", 2),)), path, wrong=object())  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_damage_inside_a_chunk(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name, value in fields(400).items():
            file.create_dataset(name, data=value, compression="gzip", fletcher32=True)
        offset = file["actions"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_d4rl(path)


def test_by_name_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "d4rl", None)
    with pytest.raises(InputError, match="d4rl package cannot be used") as caught:
        load_dataset("d4rl:hopper-medium-replay-v0")
    assert "hopper_medium_replay-v2.hdf5" in str(caught.value.hint)
    with pytest.raises(InputError) as caught:
        load_d4rl_by_name("kitchen-mixed-v0")
    assert "give its path" in str(caught.value.hint)
    assert "curl" not in str(caught.value.hint)


def test_by_name_with_the_package(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    write(path, fields())
    fetched: list[str] = []

    def download(url: str) -> str:
        fetched.append(url)
        return str(path)

    infos = types.SimpleNamespace(DATASET_URLS={"hopper-medium-v2": "http://x/h.hdf5"})
    offline = types.SimpleNamespace(download_dataset_from_url=download)
    for name, module in (("d4rl", types.ModuleType("d4rl")), ("d4rl.infos", infos), ("d4rl.offline_env", offline)):
        monkeypatch.setitem(sys.modules, name, module)
    assert load_dataset("d4rl:hopper-medium-v2").tasks == ("hopper-medium-v2",)
    assert fetched == ["http://x/h.hdf5"]
    with pytest.raises(InputError, match="no such data set"):
        load_dataset("d4rl:hopper-worst-v2")

    def offline_download(url: str) -> str:
        raise urllib.error.URLError("no route")

    offline.download_dataset_from_url = offline_download
    with pytest.raises(InputError, match="can't fetch") as caught:
        load_dataset("d4rl:hopper-medium-v2")
    assert "http://x/h.hdf5" in str(caught.value.hint)


REQUIRED = ("observations", "actions", "rewards", "terminals", "timeouts")


def spoiled(name: str, row: int, value: float, kind: str = "f4") -> dict[str, Any]:
    array = fields()[name].astype(kind)
    array[row] = value
    return {name: array}


REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    *[({name: None}, "missing", name, "next_observations") for name in REQUIRED],
    ({"timeouts": None}, "missing", "timeouts", "-v2 file"),
    (dict.fromkeys(fields()), "missing", "observations", "no field at all"),
    (dict.fromkeys(fields()) | {"episode_0/observations": np.zeros((3, 2))}, "missing", "observations", "Minari"),
    *[(spoiled(name, 6, v), "NaN or Inf", name, f"{v} at [6") for name in fields() for v in (np.nan, np.inf, -np.inf)],
    (spoiled("rewards", 3, 1e39, "f8"), "NaN or Inf", "rewards", "[3]"),  # beyond float32
    *[({name: fields()[name][:-2]}, "unequal lengths", name, "8 rows") for name in fields() if name != "observations"],
    ({"observations": np.zeros(8)}, "dimensions", "observations", "[N, width]"),
    ({"observations": np.zeros((8, 2, 2))}, "dimensions", "observations", "[8, 2, 2]"),
    ({"actions": np.zeros(8)}, "dimensions", "actions", "[8]"),
    ({"rewards": np.zeros((8, 2))}, "dimensions", "rewards", "[N, 1]"),
    ({"rewards": np.float32(1)}, "dimensions", "rewards", "[]"),
    ({"next_observations": np.zeros((8, 3))}, "wrong width", "next_observations", "[8, 2]"),
    ({"actions": np.array([b"text"] * 8)}, "not an array of numbers", "actions", "S4"),
    ({"rewards": np.zeros(8, complex)}, "not an array of numbers", "rewards", "complex"),
    ({"observations": h5py.Empty("f4")}, "not an array of numbers", "observations", "real numbers"),
    ({"actions": "group"}, "not an array", "actions", "a group"),
    ({"terminals": np.arange(8)}, "wrong flags", "terminals", "2.0 at row 2"),
    ({"timeouts": np.full(8, 0.5)}, "wrong flags", "timeouts", "0 or 1"),
    (fields(0, (), ()), "empty", "observations", "0 rows"),
]


@pytest.mark.parametrize(("changes", "problem", "field", "detail"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_wrong_field_is_named(path: Path, changes: dict[str, Any], problem: str, field: str, detail: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        load_dataset(write(path, fields() | changes))
    assert (caught.value.path, caught.value.field) == (str(path), field)
    assert detail in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda whole: b"", "the file is empty"),
        (lambda whole: b"PK\x03\x04 a zip, not HDF5", "not an HDF5 file"),
        *[
            (lambda whole, part=part: whole[: int(len(whole) * part)], "cut off or damaged")
            for part in (0.05, 0.5, 0.99)
        ],
    ],
)
def test_a_damaged_file_is_named(path: Path, spoil: Callable[[bytes], bytes], problem: str) -> None:
    path.write_bytes(spoil(write(path, fields(400)).read_bytes()))
    with pytest.raises(InputError, match=problem) as caught:
        load_dataset(path)
    assert caught.value.path == str(path)
    assert "observations" in str(caught.value.expected)
    path.unlink()
    with pytest.raises(InputError, match="not found"):
        load_d4rl(path)
