from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmdpd.errors import InputError
from llmdpd.training.metrics import MetricsWriter, first_not_finite, read_metrics


def write(run: Path, iterations: range, resume_at: int | None = None, elapsed: float = 0.0) -> None:
    run.mkdir(exist_ok=True)
    with MetricsWriter(run, resume_at, elapsed) as metrics:
        for iteration in iterations:
            metrics.write(iteration, {"loss/a": iteration / 3, "q": float(iteration)})


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_records_and_scalars(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {"q": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl")[0]["q"] == 1.0, "on disk as soon as it is written"
        assert scalars(tmp_path, "q") == [(1, 1.0)]
    write(tmp_path / "whole", range(1, 5))
    tmp_path /= "whole"
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["iteration"], r["loss/a"], r["q"]) for r in records] == [(i, i / 3, float(i)) for i in range(1, 5)]
    assert all(r["wall_seconds"] >= 0 for r in records)
    assert scalars(tmp_path, "q") == [(i, float(i)) for i in range(1, 5)]
    assert scalars(tmp_path, "loss/a") == [(i, pytest.approx(i / 3)) for i in range(1, 5)]


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from llmdpd.errors import InputError
    from llmdpd.training.metrics import MetricsWriter

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails with EFBIG
    run, limit = Path(sys.argv[1]), int(sys.argv[2])
    try:
        with MetricsWriter(run) as metrics:
            metrics.write(1, {"q": 1.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for iteration in range(2, 50):
                metrics.write(iteration, {"q": 1.0})
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("limit", [60, 130, 700])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, limit: int) -> None:
    """Whichever of the two files meets the limit first; in a process of its own, where a thread's traceback shows."""
    (tmp_path / "checkpoint" / "step-00000040").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "the metrics could not be written" in done.stdout
    assert "File too large" in done.stdout
    assert "step-00000040 is whole" in done.stdout
    assert f"--resume {tmp_path}" in done.stdout
    assert done.stderr == ""
    assert len(read_metrics(tmp_path / "metrics.jsonl")) >= 1


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmdpd.training.metrics.atomic_write_text", refuse)
    with pytest.raises(InputError, match="the metrics could not be written"):
        MetricsWriter(tmp_path)


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9))
    write(tmp_path, range(6, 8), resume_at=5, elapsed=100.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["iteration"] for r in records] == [1, 2, 3, 4, 5, 6, 7]
    assert records[-1]["wall_seconds"] >= 100
    assert records[4]["wall_seconds"] < 100
    assert [step for step, _ in scalars(tmp_path, "q")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 4, "loss')
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2, 3]
    write(tmp_path, range(4, 6), resume_at=3)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_new_run_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    write(tmp_path, range(7, 8))
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [7]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite(value: float) -> None:
    window = [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": value}, {"a": value, "b": 1.0}]
    found = first_not_finite(window, 11)
    assert found is not None
    assert found[:2] == ("b", 12)
    assert repr(found[2]) == repr(value)
    assert first_not_finite(window[:1], 11) is None
    assert first_not_finite([], 11) is None
