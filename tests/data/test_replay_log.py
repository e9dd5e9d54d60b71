"""Steps in pieces: what was appended comes back, in whatever pieces; what no checkpoint counts on goes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from llmdpd.data.replay_log import ReplayLog
from llmdpd.errors import InputError


@pytest.fixture
def steps(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"observations": rng.normal(size=(40, 3)).astype(np.float32), "rewards": rng.normal(size=40).astype("f4")}


def write(folder: Path, steps: dict[str, np.ndarray], marks: list[int], start: int = 0) -> ReplayLog:
    log = ReplayLog(folder)
    log.take_up(start)
    for end in marks:
        log.append({name: array[log.steps : end] for name, array in steps.items()}, end)
    return log


def assert_begins(found: dict[str, np.ndarray], steps: dict[str, np.ndarray], count: int) -> None:
    assert found.keys() == steps.keys()
    assert all(np.array_equal(found[name], steps[name][:count]) for name in steps)


def test_pieces_are_put_together(tmp_path: Path, steps: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    marks = sorted(rng.choice(np.arange(1, 40), 4, replace=False).tolist())
    assert write(tmp_path / "log", steps, [*marks, marks[-1]]).steps == marks[-1]
    assert len(list((tmp_path / "log").iterdir())) == 4, "nothing new, no piece"
    log = ReplayLog(tmp_path / "log")
    assert_begins(log.take_up(marks[-1]), steps, marks[-1])
    assert log.steps == marks[-1]


def test_what_came_after_the_checkpoint_is_dropped(tmp_path: Path, steps: dict[str, np.ndarray]) -> None:
    write(tmp_path, steps, [10, 25])
    (tmp_path / ".steps-000000025-000000030.npz.0a.tmp").write_bytes(b"half")
    (tmp_path / "note.txt").write_text("mine")
    write(tmp_path, steps, [14, 25, 40], start=10)
    assert_begins(ReplayLog(tmp_path).take_up(40), steps, 40)
    assert len(list(tmp_path.iterdir())) == 5, "four pieces, and what is not the log's"
    assert ReplayLog(tmp_path).take_up(0) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_nothing_there_is_no_steps(tmp_path: Path) -> None:
    assert ReplayLog(tmp_path / "log").take_up(0) == {}
    with pytest.raises(InputError, match="missing"):
        ReplayLog(tmp_path / "log").take_up(3)


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "flipped", "short", "narrow", "other", "scalar", "bytes"])
def test_damage_is_told(damage: str, tmp_path: Path, steps: dict[str, np.ndarray]) -> None:
    write(tmp_path, steps, [10, 20, 30])
    piece = tmp_path / "steps-000000010-000000020.npz"
    whole = piece.read_bytes()
    if damage == "gone":
        piece.unlink()
    elif damage == "short":
        np.savez(piece, **{name: array[10:19] for name, array in steps.items()})
    elif damage == "bytes":
        with zipfile.ZipFile(piece, "a") as archive:
            archive.writestr("times.npy", b"no array")
    elif damage in ("narrow", "other", "scalar"):
        part = {name: array[10:20] for name, array in steps.items()}
        states = part.pop("observations")
        changed = {
            "narrow": {"observations": states[:, :2]},
            "other": {"states": states},
            "scalar": {"x": np.float32(1)},
        }
        np.savez(piece, **part, **changed[damage])
    else:
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 0xFF
        piece.write_bytes({"cut": whole[:100], "empty": b"", "flipped": bytes(flipped)}[damage])
    with pytest.raises(InputError, match="missing" if damage == "gone" else "damaged") as caught:
        ReplayLog(tmp_path).take_up(30)
    assert str(tmp_path) in str(caught.value.path)
