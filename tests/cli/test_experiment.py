"""The experiment command: interrupted and resumed, never twice, what fails and what is there is told."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.cli.experiment import main
from llmdpd.experiments.plan import Settings, make_plan
from llmdpd.runs.folder import RunFolder
from llmdpd.utils.checkpoint import latest_checkpoint

Capture = pytest.CaptureFixture[str]
Words = Callable[..., list[str]]
PATIENCE = 240.0
Started = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def words(tmp_path: Path, shared_options: list[str], cache_home: Path) -> Callable[..., list[str]]:
    """The command's words for figure 2 with tiny runs, one seed, one run at a time, into tmp_path/grid."""

    def make(*more: str) -> list[str]:
        own = ["figure2", "--seeds", "1", "--episodes", "2", "--jobs", "1", "--out", str(tmp_path / "grid")]
        options = [*shared_options, "--training.select-every", "0"]
        return [*own, "--data-root", str(tmp_path / "data"), *more, "--", *options]

    return make


def times(folder: Path) -> dict[str, int]:
    """When each file below was written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_experiment_goes_on_where_it_was(
    started: Started, wait_until: Callable[..., None], words: Words, tmp_path: Path, capsys: Capture
) -> None:
    grid = tmp_path / "grid"
    first, second = grid / "full-seed0", grid / "no-prompts-seed0"
    process = started("experiment", *words())
    wait_until(lambda: latest_checkpoint(second / "checkpoint"), process)
    # The run's process: it must not outlive the experiment, nor may a second experiment begin meanwhile.
    trainer = int((second / ".lock").read_text())
    assert main(words()) == 2
    assert f"process {process.pid}" in capsys.readouterr().err
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not alive(trainer))
    assert (first / "report.html").is_file()
    assert not (second / "results.json").exists(), "it was killed too late"
    before = times(first)

    assert main(words()) == 0
    assert times(first) == before
    log = (grid / "logs" / "no-prompts-seed0.log").read_text()
    assert log.count("$ python -m llmdpd.train --run-dir") == 1
    assert log.count("$ python -m llmdpd.train --resume") == 1
    assert "resumed from" in log
    assert (grid / "logs" / "full-seed0.log").read_text().count("$ python") == 1
    output = capsys.readouterr().out
    assert "1 of 2 runs to do" in output
    assert f"page: {grid / 'figure2.html'}" in output

    before = {run: times(run) for run in (first, second, grid / "logs")}
    assert main(words()) == 0
    assert "0 of 2 runs to do" in capsys.readouterr().out
    assert {run: times(run) for run in before} == before
    assert "runs are done" not in (grid / "figure2.html").read_text()

    # More episodes than there are: evaluated anew, not trained anew.
    checkpoint, one = times(first / "checkpoint"), words("--only", "full")
    assert main([*one[:4], "3", *one[5:]]) == 0
    assert times(first / "checkpoint") == checkpoint
    options = tuple(one[one.index("--") + 1 :])
    plan = make_plan(Settings("figure2", seeds=1, episodes=3, only=("full",), out=grid, options=options))
    assert {cell.state for cell in plan.runnable} == {"done"}


def test_ctrl_c_saves_and_tells(
    started: Started, wait_until: Callable[..., None], words: Words, tmp_path: Path
) -> None:
    run = tmp_path / "grid" / "full-seed0"
    process = started("experiment", *words())
    wait_until(lambda: latest_checkpoint(run / "checkpoint"), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "stopping full-seed0" in output
    assert "Traceback" not in output
    assert "saved; go on with" in (tmp_path / "grid" / "logs" / "full-seed0.log").read_text()
    assert (tmp_path / "grid" / "figure2.html").is_file()


def test_a_failing_run_is_told_and_the_others_run(words: Words, tmp_path: Path, capsys: Capture) -> None:
    # No data where it is said to be: every run fails, and each leaves no half folder.
    assert main([*words(), "--data.path", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    for name in ("full-seed0", "no-prompts-seed0"):
        assert f"{name} failed (train); the end of its log" in error
        assert not (tmp_path / "grid" / name).exists()
    assert str(tmp_path / "nowhere") in error
    assert "0 of 2 runs are done" in (tmp_path / "grid" / "figure2.html").read_text()


def test_a_folder_of_another_run_stops_the_command_before_anything_runs(
    words: Words, tmp_path: Path, capsys: Capture
) -> None:
    given = words()
    options = tuple(given[given.index("--") + 1 :])
    plan = make_plan(Settings("figure2", seeds=1, out=tmp_path / "grid", options=(*options, "--method.lr", "0.5")))
    foreign = plan.cells["no-prompts"][0]
    RunFolder.create(foreign.folder, foreign.config)
    before = times(foreign.folder)
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "method.lr: 0.5 → 0.0006" in error
    assert str(foreign.folder) in error
    assert times(foreign.folder) == before
    assert not (tmp_path / "grid" / "full-seed0").exists()


def test_a_dry_run_shows_the_plan_and_does_nothing(words: Words, tmp_path: Path, capsys: Capture) -> None:
    assert main(words("--dry-run", "--only", "full")) == 0
    output = capsys.readouterr().out
    assert ["full-seed0", "missing", "not", "known"] in [line.split() for line in output.splitlines()]
    assert "no-prompts" not in output
    assert "1 runs to do, 1 at once: about 0 s and those not known" in output
    assert not (tmp_path / "grid").exists()


def test_wrong_names_are_named(capsys: Capture) -> None:
    for words, near in ((["tabel2"], "table2"), (["table2", "--seed", "1"], "--seeds")):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert words[-2 if len(words) > 1 else 0] in error
        assert near in error
