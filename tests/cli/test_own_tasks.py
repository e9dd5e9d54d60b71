"""A user's own tasks from beginning to end: trained, evaluated, resumed and acted with, from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llmdpd
from llmdpd.cli.evaluate import main as evaluate_main
from llmdpd.data import load_dataset
from llmdpd.evaluation.results import read_results
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.policy.policy import Policy
from llmdpd.runs.folder import RunFolder

Family = Callable[..., Path]
Train = Callable[..., int]
Capture = pytest.CaptureFixture[str]

SIZES = {
    "training.iterations": 20,
    "training.checkpoint-every": 10,
    "training.select-every": 10,
    "training.select-episodes": 1,
    "method.batch-size": 16,
    "method.prompts-per-batch": 2,
    "method.network.hidden-dim": 16,
    "method.network.context.encoder.width": 16,
    "method.network.context.encoder.inner": 32,
    "evaluation.episodes": 2,
    "data.workers": 1,
    "threads": 1,
}
OPTIONS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))] + ["--evaluation.no-videos"]
THREE = ("reach", "visit", "hover")


def evaluate(*words: object) -> int:
    return evaluate_main([str(word) for word in ("--workers", 1, "--threads", 1, "--episodes", 2, *words)])


def test_from_another_folder_by_commands_alone(family: Family, tmp_path: Path) -> None:
    """In processes of their own that have nothing of the tests on their path."""
    path = family(THREE)
    places = [str(Path(llmdpd.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "llmdpd", *words]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", "--tasks-file", os.path.relpath(path, elsewhere), "--run-dir", "run", *OPTIONS)
    shown = run("evaluate", "run", "--episodes", "3", "--workers", "1")
    for name in THREE:
        assert any(line.startswith(name) for line in shown.splitlines())
    assert (elsewhere / "run" / "tasks.toml").read_text() == path.read_text()


@pytest.mark.parametrize("keyed", [False, True])
def test_a_run_is_trained_evaluated_and_acted_with(
    family: Family, train: Train, tmp_path: Path, keyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = tmp_path / "run", family(THREE, keyed=keyed)
    assert train("--tasks-file", path, "--run-dir", run, *OPTIONS) == 0
    records = read_results(run / "results.json")
    assert {(record.task, record.split) for record in records} == {
        *(("reach", "seen"), ("visit", "seen"), ("hover", "unseen"))
    }
    for record in records:
        assert (record.protocol, record.max_steps, record.goal_visible) == ("tasks", 70, None)
        assert record.successes is not None
    monkeypatch.chdir("/")
    policy = Policy.load(run)
    demonstration = load_dataset(run / "prompt_data").select_tasks(["hover"]).episode(0)
    policy.prompt("Task: Hold the open hand above the box.", demonstration)
    assert policy.act(np.zeros(13)).shape == (4,)
    assert evaluate(run, "--tasks", "hover", "--prompts", "no-text", "--out", tmp_path / "one.json") == 0
    (record, *_) = read_results(tmp_path / "one.json")
    assert record.task == "hover"


def test_a_run_without_environment_is_judged_by_recorded_episodes(
    family: Family, train: Train, tmp_path: Path, capsys: Capture
) -> None:
    run, path = tmp_path / "run", family(THREE, env=False, suite="")
    assert train("--tasks-file", path, "--run-dir", run, *OPTIONS) == 0
    records = read_results(run / "results.json")
    assert {record.task for record in records} >= {"reach", "visit"}
    assert all(record.successes is None for record in records)
    assert evaluate_main([str(run)]) == 0
    assert evaluate(run, "--tasks-file", path, "--out", tmp_path / "out.json") == 2
    assert "cannot be rolled out" in capsys.readouterr().err


@pytest.fixture
def trained(family: Family, train: Train, tmp_path: Path) -> tuple[Path, Path]:
    """A run's folder and its task file."""
    path, run = family(THREE), tmp_path / "run"
    assert train("--tasks-file", path, "--run-dir", run, *OPTIONS) == 0
    return run, path


def test_a_file_that_was_changed_or_is_gone_is_told_and_the_runs_own_copy_serves(
    trained: tuple[Path, Path], capsys: Capture
) -> None:
    run, path = trained
    own = path.read_text()
    capsys.readouterr()
    assert evaluate(run) == 0
    assert "tasks.toml" not in capsys.readouterr().out
    path.write_text(own.replace("[tasks.hover]", "[tasks.float]"))
    assert evaluate(run) == 0
    assert "was changed since the run was begun" in capsys.readouterr().out
    path.unlink()
    assert evaluate(run) == 0
    assert "is gone" in capsys.readouterr().out
    (path.parent / "tabletop.py").unlink()
    sys.modules.pop("tabletop")
    sys.path[:] = [place for place in sys.path if not place.endswith("family")]
    assert evaluate(run) == 2
    assert f"a module that is installed, or lies in {path.parent}" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_run_goes_on_unless_its_file_was_changed(
    family: Family,
    train: Train,
    tmp_path: Path,
    stopped_and_resumed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    path = family(THREE)
    options = ["--tasks-file", str(path), *OPTIONS]
    assert train("--run-dir", tmp_path / "straight", *options) == 0
    run = tmp_path / "run"
    stopped_and_resumed(run, options, LLMDPD, at=15)
    same = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("straight", "run")]
    assert same[0] == same[1]
    own = path.read_text()
    path.write_text(own.replace("to the goal", "to it"))
    capsys.readouterr()
    assert train("--resume", run) == 2
    assert "the task file was changed since the run was begun" in capsys.readouterr().err
    path.unlink()
    assert train("--resume", run) == 0
    assert "is gone" in capsys.readouterr().out
    path.write_text(own.replace("to the goal", "to it"))
    (run / "tasks.toml").write_text(path.read_text())
    assert train("--resume", run) == 2
    assert "task file" in capsys.readouterr().err


def test_a_file_moved_or_with_another_task_can_be_evaluated(
    trained: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    run, path = trained
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("tabletop.py", "demos"):
        shutil.move(path.parent / part, moved / part)
    text = path.read_text().replace("[tasks.hover]", "[tasks.float]")
    path.unlink()
    (moved / "tasks.toml").write_text(text)
    out = tmp_path / "out.json"
    assert evaluate(run, "--tasks-file", moved / "tasks.toml", "--tasks", "float", "--out", out) == 0
    records = read_results(out)
    assert {(record.task, record.split) for record in records} == {("float", "unseen")}
    assert evaluate("--baseline", "replay", "--tasks-file", moved / "tasks.toml", "--out", out) == 0
    assert {record.task for record in read_results(out)} == {"reach", "visit", "float"}
    wide = text.replace('success = "is_success"', 'observation = ["observation"]\nsuccess = "is_success"')
    wide = wide.replace("keyed = false", "keyed = true").replace("goal = [10, 11, 12] ", "").replace("9], }", "9] }")
    (moved / "tasks.toml").write_text(wide)
    assert evaluate(run, "--tasks-file", moved / "tasks.toml", "--tasks", "float", "--out", out) == 2


def test_a_run_that_is_refused_leaves_nothing(family: Family, train: Train, tmp_path: Path, capsys: Capture) -> None:
    path, run = family(THREE), tmp_path / "run"
    shutil.rmtree(path.parent / "demos")
    assert train("--tasks-file", path, "--run-dir", run, *OPTIONS) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert not run.exists()
    assert not RunFolder(run).tasks.exists()


@pytest.mark.parametrize("method", ["diffusion-ql", "td3-bc", "trajectory-diffusion", "dt", "mtdiff"])
def test_other_methods_remember_the_step_before_too(method: str, family: Family, train: Train, tmp_path: Path) -> None:
    """Critics, trajectories and histories of observations with more numbers than the environment gives."""
    path, run = family(THREE), tmp_path / "run"
    few = ("--iterations", 2, "--training.select-every", 0, "--evaluation.episodes", 1, "--threads", 1)
    plain = ("--data.workers", 1, "--evaluation.no-videos")
    assert train("--tasks-file", path, "--method", method, "--run-dir", run, *few, *plain) == 0
    spaces = Policy.load(run).network.spaces
    assert spaces.observed_dim == 13
    assert len(spaces.remembered) == 12
    assert {record.task for record in read_results(run / "results.json")} == set(THREE)
