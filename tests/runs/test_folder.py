from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from llmdpd.config.schema import PRESETS, TrainConfig
from llmdpd.errors import InputError
from llmdpd.policy.folder import resolve_policy
from llmdpd.runs.folder import RunFolder, decisive

CONFIG = PRESETS["smoke"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG)


def test_a_new_folder_holds_configuration_and_versions(run: RunFolder) -> None:
    assert run.read_config() == CONFIG
    meta = json.loads(run.meta.read_text())
    assert meta["versions"]["python"].startswith("3.")
    assert meta["machine"]["cores"] >= 1
    assert meta["times"] == {}
    assert RunFolder.open(run.path) == run


def test_its_name_tells_preset_seed_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(None, dataclasses.replace(CONFIG, seed=4))
    assert re.fullmatch(r"runs/smoke-seed4-\d{8}-\d{6}", str(run.path))


def test_an_empty_folder_will_do_and_a_used_one_not(tmp_path: Path, run: RunFolder) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", CONFIG)
    with pytest.raises(InputError, match="not empty"):
        RunFolder.create(tmp_path / "empty", CONFIG)
    with pytest.raises(InputError, match="is a file"):
        RunFolder.create(run.config, CONFIG)
    with pytest.raises(InputError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_a_run_that_is_trained_is_not_trained_by_another(run: RunFolder, tmp_path: Path) -> None:
    with run.lock():
        with pytest.raises(InputError, match="another process is at work in this run") as error, run.lock():
            pass
        assert error.value.found == f"process {os.getpid()}"
        with pytest.raises(InputError, match="another process is at work"):
            RunFolder.create(run.path, CONFIG)
    with run.lock():
        pass
    assert sorted(file.name for file in run.path.iterdir()) == ["config.json", "meta.json"]


def test_notes_are_merged(run: RunFolder) -> None:
    run.note(times={"a": 1})
    run.note(times={"b": 2}, other={"x": "y"})
    run.note(times={"a": 3})
    meta = json.loads(run.meta.read_text())
    assert meta["times"] == {"a": 3, "b": 2}
    assert meta["other"] == {"x": "y"}
    assert meta["versions"]


def test_times_add_up_over_processes_that_stopped(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 100.0, 105.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), run.timed("total_seconds"):
        raise KeyboardInterrupt
    assert json.loads(run.meta.read_text())["times"] == {"total_seconds": 10.0}
    with RunFolder.open(run.path).timed("total_seconds"):
        pass
    assert json.loads(run.meta.read_text())["times"] == {"total_seconds": 15.5}


def test_a_full_disk_while_times_are_noted_hides_no_error(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmdpd.runs.folder.atomic_write_json", refuse)
    with pytest.raises(InputError, match="the checkpoint"), run.timed("total_seconds"):
        raise InputError("the checkpoint could not be written")


def _changed(**parts: dict[str, object]) -> TrainConfig:
    changes = {name: dataclasses.replace(getattr(CONFIG, name), **fields) for name, fields in parts.items()}
    return dataclasses.replace(CONFIG, **changes)


def test_what_does_not_change_the_learning_may_change(run: RunFolder) -> None:
    config = _changed(
        evaluation={"episodes": 9, "videos": False},
        data={"workers": 1, "root": "elsewhere"},
        training={"checkpoint_every": 3},
    )
    run.take_up(config)
    assert run.read_config() == config
    assert decisive(config) == decisive(CONFIG)
    assert decisive(_changed(evaluation={"max_steps": 9})) != decisive(CONFIG)


def test_every_field_that_may_not_change_is_named(run: RunFolder) -> None:
    # Selection rolls out max_steps steps: they decide which policy is the best.
    evaluation = {"episodes": 9, "max_steps": 7}
    config = _changed(agent={"lr": 0.5}, tasks={"seen": ("reach-v3",)}, evaluation=evaluation)
    with pytest.raises(InputError) as error:
        run.take_up(config)
    found = str(error.value.found)
    assert f"agent.lr: {CONFIG.agent.lr!r} → 0.5" in found
    assert "tasks.seen: " in found
    assert "evaluation.max_steps: " in found
    assert "episodes" not in found
    assert run.read_config() == CONFIG


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(run: RunFolder) -> None:
    half = [run.path / ".policy.x1.tmp", run.path / ".policy_best.x2.tmp", run.path / "checkpoint" / ".step-5.x.tmp"]
    whole = [run.path / "policy", run.path / "checkpoint" / "step-00000005"]
    for folder in (*half, *whole):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    run.take_up(CONFIG)
    assert not any(folder.exists() for folder in half)
    assert all((folder / "file").exists() for folder in whole)


@pytest.mark.parametrize("name", ["policy", "policy_best"])
def test_a_policy_that_a_kill_left_under_its_temporary_name_is_put_back(run: RunFolder, name: str) -> None:
    left = run.path / f".{name}.0123abcd.old"
    left.mkdir()
    (left / "file").write_text("x")
    RunFolder.open(run.path)
    assert (run.path / name / "file").read_text() == "x"


def test_a_policy_is_put_back_where_it_is_loaded(run: RunFolder) -> None:
    left = run.path / ".policy.0123abcd.old"
    left.mkdir()
    (left / "policy.json").write_text("{}")
    assert resolve_policy(run.path) == run.path / "policy"
    (run.path / "policy").rename(left)
    assert resolve_policy(run.path / "policy") == run.path / "policy"


def test_a_run_has_begun_with_its_first_metrics(run: RunFolder) -> None:
    assert not run.begun
    (run.path / "metrics.jsonl").write_text("")
    assert run.begun


def test_what_is_discarded_is_the_runs_own(run: RunFolder) -> None:
    run.prompts.mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.discard()
    assert [file.name for file in run.path.iterdir()] == ["notes.txt"]
    (run.path / "notes.txt").unlink()
    run.discard()
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"agent": {"learning_rate": 1}}, ["unknown field", "agent.learning_rate", "lr"]),
        ({"seed": "zero"}, ["wrong value", "seed", "'zero'", "int"]),
    ],
)
def test_a_configuration_that_was_altered(run: RunFolder, change: dict[str, object], parts: list[str]) -> None:
    run.config.write_text(json.dumps(json.loads(run.config.read_text()) | change))
    with pytest.raises(InputError) as error:
        run.read_config()
    for part in (*parts, str(run.config)):
        assert part in str(error.value)
