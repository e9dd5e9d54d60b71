from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdpd.config.parse import parse_train
from llmdpd.config.presets import PRESETS
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.methods.td3_bc import TD3BC
from llmdpd.policy.folder import resolve_policy
from llmdpd.prompts import task_prompt
from llmdpd.runs.folder import RunFolder, decisive
from llmdpd.utils.legacy import leaves
from llmdpd.utils.plain import to_plain

Patch = pytest.MonkeyPatch
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


def test_its_name_has_preset_seed_and_time(tmp_path: Path, monkeypatch: Patch) -> None:
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


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("{}"), "a file"),
        (lambda path: path.mkdir(), "no config.json"),
        (lambda path: [(path / f"seed-{n}").mkdir(parents=True) for n in range(2)], "no config.json"),
    ],
)
def test_what_is_no_run_folder_is_told(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    """A folder of several runs, as of several seeds, names one of them."""
    path = tmp_path / "it"
    make(path)
    with pytest.raises(InputError) as caught:
        RunFolder.open(path)
    assert caught.value.found == words
    assert caught.value.hint is None
    for run in path.glob("seed-*"):
        (run / "config.json").write_text("{}")
        with pytest.raises(InputError) as caught:
            RunFolder.open(path)
        assert str(path / "seed-") in str(caught.value.hint)


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
    assert (meta["times"], meta["other"]) == ({"a": 3, "b": 2}, {"x": "y"})
    assert meta["versions"]


def test_times_add_up_over_processes_that_stopped(run: RunFolder, monkeypatch: Patch) -> None:
    clock = iter([0.0, 10.0, 100.0, 105.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), run.timed("total_seconds"):
        raise KeyboardInterrupt
    assert json.loads(run.meta.read_text())["times"] == {"total_seconds": 10.0}
    with RunFolder.open(run.path).timed("total_seconds"):
        pass
    assert json.loads(run.meta.read_text())["times"] == {"total_seconds": 15.5}


def test_the_time_of_several_runs_is_divided(run: RunFolder, monkeypatch: Patch) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with run.timed("total_seconds", runs=4):
        pass
    assert json.loads(run.meta.read_text())["times"] == {"total_seconds": 2.5}


def test_a_full_disk_while_times_are_noted_hides_no_error(run: RunFolder, monkeypatch: Patch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmdpd.runs.folder.atomic_write_json", refuse)
    with pytest.raises(InputError, match="the checkpoint"), run.timed("total_seconds"):
        raise InputError("the checkpoint could not be written")


def _changed(**parts: dict[str, Any]) -> TrainConfig:
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


def test_a_run_from_before_its_configuration_said_that_texts_are_kept_is_resumed(tmp_path: Path) -> None:
    now = parse_train(["--protocol", "text"])
    then = dataclasses.replace(now, method=PRESETS["metaworld"].method)
    assert then != now
    run = RunFolder.create(tmp_path / "run", then)
    state = {"format": 1, "iteration": 5, "config": to_plain(then)}
    (run.path / "checkpoint" / "step-00000005").mkdir(parents=True)
    (run.path / "checkpoint" / "step-00000005" / "state.json").write_text(json.dumps(state))
    run.take_up(now)
    run.check_inputs({"config": decisive(now)})
    usual = dataclasses.replace(now, tasks=PRESETS["metaworld"].tasks)  # there a run may drop texts
    kept = RunFolder.create(tmp_path / "usual", dataclasses.replace(usual, method=then.method))
    with pytest.raises(InputError, match="contradicted_text: 'drop' → 'keep'"):
        kept.take_up(usual)


def test_every_field_that_may_not_change_is_named(run: RunFolder) -> None:
    # Selection rolls out max_steps steps: they decide which policy is the best.
    evaluation = {"episodes": 9, "max_steps": 7}
    config = _changed(method={"lr": 0.5}, tasks={"seen": ("reach-v3",)}, evaluation=evaluation)
    with pytest.raises(InputError) as error:
        run.take_up(config)
    found = str(error.value.found)
    assert f"method.lr: {CONFIG.method.lr!r} → 0.5" in found
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


def test_a_policy_that_a_kill_left_under_its_temporary_name_is_put_back(run: RunFolder) -> None:
    for name in ("policy", "policy_best"):
        left = run.path / f".{name}.0123abcd.old"
        left.mkdir()
        (left / "policy.json").write_text("{}")
    RunFolder.open(run.path)
    assert all((run.policy(name) / "policy.json").is_file() for name in ("last", "best"))
    left = run.path / ".policy.0123abcd.old"
    (run.path / "policy").rename(left)
    assert resolve_policy(run.path) == run.path / "policy"
    (run.path / "policy").rename(left)
    assert resolve_policy(run.path / "policy") == run.path / "policy"


def test_a_run_has_begun_with_its_first_metrics_and_what_is_discarded_is_its_own(run: RunFolder) -> None:
    assert not run.begun
    (run.path / "metrics.jsonl").write_text("")
    assert run.begun
    (run.path / "metrics.jsonl").unlink()
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
        ({"method": {"name": "llmdpd", "learning_rate": 1}}, ["unknown field", "method.learning_rate", "lr"]),
        ({"method": {"name": "guesswork"}}, ["unknown method", "method.name", "guesswork"]),
        ({"method": "guesswork"}, ["unknown method", "method", "guesswork"]),
        ({"method": ["llmdpd"]}, ["an object"]),
        ({"seed": "zero"}, ["wrong value", "seed", "'zero'", "int"]),
    ],
)
def test_a_configuration_that_was_altered(run: RunFolder, change: dict[str, object], parts: list[str]) -> None:
    run.config.write_text(json.dumps(json.loads(run.config.read_text()) | change))
    with pytest.raises(InputError) as error:
        run.read_config()
    for part in (*parts, str(run.config)):
        assert part in str(error.value)


def test_a_configuration_of_version_0_1_is_read(run: RunFolder) -> None:
    old: dict[str, Any] = {
        **{"preset": "smoke", "seed": 3, "method": "td3-bc", "td3_bc": {"alpha": 1.5}, "agent": {"lr": 9.0}},
        **{"data": {"prompts": "x", "prompt_episodes": 2, "tail": 5}, "evaluation": {"films": False}},
        **{"training": {"batch_size": 24, "prompts_per_batch": 12, "iterations": 7, "augmentation": {"turn": 0.25}}},
        **{"policy": {"hidden_dim": 16, "context": {"kind": "retrieval"}}, "acting": {"views": 1, "samples": 2}},
    }
    run.config.write_text(json.dumps(old))
    read = run.read_config()
    assert (read.preset, read.seed, read.training.iterations, read.evaluation.videos) == ("smoke", 3, 7, False)
    assert (read.data.demonstrations, read.data.demonstration_episodes, read.data.post_success_steps) == ("x", 2, 5)
    own = {"alpha": 1.5, "batch_size": 24, "prompts_per_batch": 12, "augmentation.rotate": 0.25}
    own |= {"network.hidden_dim": 16, "network.context.kind": "retrieval"}
    found = dict(leaves(to_plain(read.method)))
    changed = {name: value for name, value in leaves(to_plain(TD3BC.Config())) if found[name] != value}
    assert {name: found[name] for name in changed} == own
    run.config.write_text(json.dumps(old | {"acting": {"views": 8}}))
    with pytest.raises(InputError, match="no longer possible") as error:
        run.read_config()
    assert error.value.field == "acting.views"


def test_texts_of_text_files_are_kept_with_the_task_file(
    family: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = family(("reach",))
    path.write_text(re.sub('text = "(.*)"', 'text_file = "reach.txt"', path.read_text()))
    (tmp_path / "reach.txt").write_text("Task: reach.")
    config = parse_train(["--tasks-file", str(path)])
    run = RunFolder.create(tmp_path / "run", config)
    run.use_tasks(config, unchanged=True)
    assert capsys.readouterr().out == ""
    (tmp_path / "reach.txt").write_text("Task: go.")
    with pytest.raises(InputError, match="a text file that the task file names was changed"):
        run.use_tasks(config, unchanged=True)
    run.use_tasks(config, unchanged=False)
    assert "a text file that" in capsys.readouterr().out
    assert task_prompt("reach").task == "reach."
    (tmp_path / "reach.txt").unlink()
    with pytest.raises(InputError, match="file not found"):
        run.use_tasks(config, unchanged=True)
    run.use_tasks(config, unchanged=False)
    assert "reach.txt" in capsys.readouterr().out
    path.unlink()
    run.use_tasks(config, unchanged=True)
    assert task_prompt("reach").task == "reach."
    run.discard()
    assert not run.path.exists()


class Kill(BaseException):
    """SIGKILL: nothing runs after it."""


def test_killed_at_any_moment_of_its_creation_it_is_created_by_the_next_try(tmp_path: Path, monkeypatch: Patch) -> None:
    import llmdpd.utils.files as files

    real, left = files.sync, 0

    def fsync(path: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Kill
        real(path)

    moments = 0
    for moments in range(100):
        left = moments
        folder = tmp_path / str(moments)
        monkeypatch.setattr(files, "sync", fsync)
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # nothing is cleaned up
        try:
            RunFolder.create(folder, CONFIG)
        except Kill:
            monkeypatch.undo()
            if (folder / "config.json").exists():  # the last of its files: the run is whole
                assert RunFolder.open(folder).read_config() == CONFIG
            else:
                RunFolder.create(folder, CONFIG)
            continue
        monkeypatch.undo()
        break
    assert 3 < moments < 99


def test_killed_at_any_moment_of_its_removal_it_is_whole_or_created_by_the_next_try(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    real, left = Path.unlink, 0

    def unlink(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Kill
        real(path, missing_ok)

    def rmtree(path: Path, **options: object) -> None:
        for file in path.iterdir():
            unlink(file)
        path.rmdir()

    for moments in range(100):
        run = RunFolder.create(tmp_path / str(moments), CONFIG)
        run.prompts.mkdir()
        for file in (run.prompts / "a", run.path / "prompts.json"):
            file.write_text("{}")
        left = moments
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            patch.setattr("llmdpd.runs.folder.shutil.rmtree", rmtree)
            try:
                run.discard()
                break
            except Kill:
                pass
        if run.config.exists():
            assert RunFolder.open(run.path).read_config() == CONFIG
            assert run.meta.exists()
        else:
            RunFolder.create(run.path, CONFIG)
    assert moments > 5
    assert not run.path.exists()


def test_files_that_were_deleted_meanwhile_are_named(run: RunFolder) -> None:
    for path in (run.results, run.path / "metrics.jsonl", run.policy("last") / "policy.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (run.path / "checkpoint" / "step-00000001").mkdir(parents=True)
    run.check_whole()
    for path in (run.results, run.path / "metrics.jsonl", run.policy("last") / "policy.json", run.meta, run.config):
        content = path.read_text()
        path.unlink()
        with pytest.raises(InputError, match="deleted while it ran") as error:
            run.check_whole()
        assert path.name in str(error.value.found)
        path.write_text(content)
    (run.path / "checkpoint" / "step-00000001").rmdir()
    with pytest.raises(InputError, match="checkpoint"):
        run.check_whole()


@pytest.mark.parametrize("content", ["[]", '{"times": 3}', '{"times": {"data_seconds": "x"}}', '{"times": {"a": NaN}}'])
def test_damaged_notes_are_named(run: RunFolder, content: str) -> None:
    run.meta.write_text(content)
    with pytest.raises(InputError) as error:
        run.note(times={"data_seconds": 1.0})
    assert error.value.path == str(run.meta)
