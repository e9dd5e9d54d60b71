"""`llmdpd data`: conversion to shards of what any reader reads, and their check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_writers import FORMATS, random_episodes

from llmdpd.__main__ import main
from llmdpd.data import TrajectoryDataset, load_dataset, save_minari
from llmdpd.tasks.base import Reading

pytestmark = pytest.mark.filterwarnings("ignore:env_spec is None")


@pytest.mark.parametrize("kind", FORMATS)
def test_data_of_any_format_become_shards(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    (tmp_path / "a").mkdir()
    path, out = FORMATS[kind].write(tmp_path / "a", random_episodes(rng), "push-v3", ""), tmp_path / "out"
    assert main(["data", "convert", str(path), str(out)]) == 0
    memory, stored = load_dataset(path), load_dataset(out)
    assert stored.stored
    assert (stored.tasks, stored.lengths.tolist()) == (memory.tasks, memory.lengths.tolist())
    rows = np.arange(memory.num_transitions)
    for own, other in zip(stored.gather(rows), memory.gather(rows), strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_folder_of_data_sets_becomes_one(
    metaworld_data: Callable[..., TrajectoryDataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = metaworld_data(), tmp_path / "out"
    save_minari(data, tmp_path / "in")
    assert main(["data", "convert", str(tmp_path / "in"), str(out)]) == 0
    assert main(["data", "check", str(out)]) == 0
    assert "6 episodes, 186 transitions of 2 tasks, 1 shards" in capsys.readouterr().out.splitlines()[-1]
    assert main(["data", "convert", str(tmp_path / "in"), str(out)]) == 2
    assert "a new folder" in capsys.readouterr().err
    shard = out / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    assert main(["data", "check", str(out)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_shards_beside_what_they_are_made_of_are_refused(
    metaworld_data: Callable[..., TrajectoryDataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every episode would be there twice."""
    folder = tmp_path / "in"
    save_minari(metaworld_data(), folder)
    assert main(["data", "convert", str(folder), str(folder / "shards")]) == 2
    assert "outside of SOURCE" in capsys.readouterr().err
    assert main(["data", "convert", str(folder), str(tmp_path / "out")]) == 0
    (tmp_path / "out").rename(folder / "copy")
    assert main(["data", "convert", str(folder), str(tmp_path / "twice")]) == 2
    assert "which may be their copies" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
    assert main(["data", "convert", str(folder / "copy"), str(tmp_path / "again")]) == 0
    assert main(["data", "check", str(folder)]) == 2
    told = capsys.readouterr().err
    assert "no data set in shards" in told
    assert "copy" in told


def test_shards_without_the_success_say_how_to_keep_it(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    count = 12
    arrays = {"observations": rng.normal(size=(count, 3)), "actions": rng.uniform(-1, 1, (count, 2))}
    flags = {"terminals": np.zeros(count, np.bool_), "timeouts": np.arange(count) % 6 == 5}
    np.savez(tmp_path / "fly.npz", rewards=np.zeros(count), arrived=np.ones(count, np.bool_), **arrays, **flags)
    reading = Reading(success="arrived")
    for name, words in (("without", []), ("with", ["--success", "arrived"])):
        assert main(["data", "convert", str(tmp_path / "fly.npz"), str(tmp_path / name), *words]) == 0
        caplog.clear()
        known = load_dataset(tmp_path / name, reading=reading).successes >= 0
        assert known.all() == (name == "with")
        assert ("convert --success arrived" in caplog.text) == (name == "without")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["turn", "a"], "turn"),
        (["check", "nowhere"], "shards.json"),
        (["check", "a", "b"], "convert alone"),
        (["convert", "a"], "convert alone"),
        (["convert", "nowhere", "b"], "no such file"),
        (["convert", "a", "b", "--shard-gigabytes", "0"], "shard_gigabytes"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words]) == 2
    assert told in capsys.readouterr().err
