"""`llmdpd train` by several processes: one run, whatever their number, and one end of it for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmdpd.methods.llmdpd.method import LLMDPD

Contents = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def run_by_two(
    train: Any, in_processes: Any, tiny_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As `straight_run`, by two processes."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    assert in_processes(2, lambda _: train("--run-dir", folder, *tiny_options)) == [0, 0]
    return folder


@pytest.fixture
def disturbed(
    train: Any, in_processes: Any, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], tuple[Path, list[int]]]:
    """Runs `straight_run` by two processes, of which the second gets a signal in iteration 160; the exit codes."""

    def run(number: int) -> tuple[Path, list[int]]:
        update = LLMDPD.update

        def signalled(self: Any, batch: Any, iteration: int) -> Any:
            if iteration == 160 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), number)
            return update(self, batch, iteration)

        with monkeypatch.context() as patch:
            patch.setattr(LLMDPD, "update", signalled)
            codes = in_processes(2, lambda _: train("--run-dir", tmp_path / "run", *tiny_options))
        return tmp_path / "run", codes

    return run


def weights(run: Path) -> dict[str, np.ndarray]:
    (checkpoint,) = (run / "checkpoint").iterdir()
    return load_file(checkpoint / "networks.safetensors")


def losses(run: Path) -> np.ndarray:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss/diffusion"] for line in lines if "loss/diffusion" in line])


def assert_same_but_for_rounding(run: Path, other: Path) -> None:
    # Of a run that was stopped the records are cut there once more: the last ones are of the same iterations.
    np.testing.assert_allclose(losses(run)[-3:], losses(other)[-3:], rtol=1e-4)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Root mean squares: Adam takes whole steps by a gradient that is nothing but rounding.
        size, error = (np.sqrt(np.square(part).mean()) for part in (value, value - theirs[name]))
        assert error <= 1e-2 * size + 1e-4, (name, size, error)


def test_two_processes_do_what_one_does(run_by_two: Path, straight_run: Path) -> None:
    np.testing.assert_allclose(losses(run_by_two), losses(straight_run), rtol=1e-4)
    assert_same_but_for_rounding(run_by_two, straight_run)
    files = ({str(f.relative_to(run)) for f in run.rglob("*") if f.is_file()} for run in (straight_run, run_by_two))
    alone, shared = ({name for name in found if "tfevents" not in name} for found in files)
    assert alone == shared
    told = ("task", "split", "checkpoint", "episodes", "successes")
    alone, shared = (
        [tuple(record[name] for name in told) for record in json.loads((run / "results.json").read_text())["records"]]
        for run in (straight_run, run_by_two)
    )
    assert alone == shared


def test_a_stop_of_one_process_saves_all_and_resumes_bit_for_bit(
    disturbed: Any, run_by_two: Path, in_processes: Any, train: Any, contents: Contents, tmp_path: Path
) -> None:
    run, codes = disturbed(signal.SIGTERM)
    assert codes == [143, 143]
    assert json.loads((run / "policy" / "policy.json").read_text())["metadata"]["iterations"] == 161
    alone = shutil.copytree(run, tmp_path / "alone")
    assert in_processes(2, lambda _: train("--resume", run)) == [0, 0]
    assert contents(run) == contents(run_by_two)
    # At another number of processes the same draws go on.
    assert train("--resume", alone) == 0
    assert_same_but_for_rounding(alone, run_by_two)


def test_the_death_of_a_process_ends_all_and_leaves_a_whole_checkpoint(
    disturbed: Any,
    run_by_two: Path,
    in_processes: Any,
    train: Any,
    contents: Contents,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, codes = disturbed(signal.SIGKILL)
    assert codes == [1, -signal.SIGKILL]
    error = capfd.readouterr().err
    assert "process 0 has lost another process of the run" in error
    assert "Traceback" not in error
    assert [checkpoint.name for checkpoint in (run / "checkpoint").iterdir()] == ["step-00000150"]
    assert in_processes(2, lambda _: train("--resume", run)) == [0, 0]
    assert contents(run) == contents(run_by_two)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method.lr", "-1"), "method.lr"),
        (("--method.batch-size", "15", "--method.prompts-per-batch", "3"), "shared out evenly among the processes"),
        (("--method", "otto"), "cannot share this method"),
    ],
)
def test_what_the_first_process_refuses_ends_all_with_one_message(
    words: tuple[str, ...],
    message: str,
    in_processes: Any,
    train: Any,
    data_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    own = ["--run-dir", tmp_path / "run", "--data.path", data_folder / "train", "--tasks.seen", "reach", "push"]
    assert in_processes(2, lambda _: train(*own, "--tasks.unseen", "door-lock", *words)) == [2, 2]
    error = capfd.readouterr().err
    assert error.count("error:") == 1
    assert message in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_may_be_started_again_needs_a_folder(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert "needs a folder that it finds again" in refused("--tasks.seen", "reach")


KILLED_ONCE = """
import os, signal, sys
from llmdpd.cli.train import main
from llmdpd.methods.llmdpd.method import LLMDPD

update = LLMDPD.update

def killed(self, batch, iteration):
    if iteration == 17 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch, iteration)

LLMDPD.update = killed
code = main()
threads = [open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")]
assert not [name for name in threads if "gloo" in name], "the interpreter's end would meet them at work"
raise SystemExit(code)
"""


def test_torchrun_starts_again_what_died(
    in_processes: Any, train: Any, tiny_options: list[str], cache_home: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killed_once.py"
    script.write_text(textwrap.dedent(KILLED_ONCE))
    short = ["--training.iterations", "30", "--training.checkpoint-every", "10", "--evaluation.mode", "none"]
    words = [*map(str, tiny_options), *short]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(script)]
    again = [*command, "--run-dir", str(tmp_path / "again"), *words]
    done = subprocess.run(again, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "at iteration 10" in done.stdout  # resumed from there
    assert in_processes(2, lambda _: train("--run-dir", tmp_path / "straight", *words)) == [0, 0]
    again, straight = (
        {file.name: file.read_bytes() for file in sorted((tmp_path / run / "checkpoint" / "step-00000030").iterdir())}
        for run in ("again", "straight")
    )
    assert again.keys() == straight.keys()
    for name in again.keys() - {"state.json"}:  # which holds the time
        assert again[name] == straight[name]
