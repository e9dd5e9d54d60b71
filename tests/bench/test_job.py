"""The benchmark of a whole run, on a run of seconds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import job
import pytest


def test_its_stages_add_up_to_the_wait(
    tmp_path: Path, tiny_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--training.iterations", "4", "--training.select-every", "0", "--evaluation.episodes", "1"]
    start = time.perf_counter()
    assert job.main(["--json", str(tmp_path / "x.json"), "--", *tiny_options, *short]) == 0
    waited = time.perf_counter() - start
    report = json.loads((tmp_path / "x.json").read_text())
    seconds = report["seconds"]
    assert {"data", "training", "evaluation", "other"} <= seconds.keys()
    assert all(value >= 0 for value in seconds.values())
    assert 0 < sum(seconds.values()) <= waited
    assert 0 <= report["unseen_success"] <= 1
    shown = capsys.readouterr().out
    assert all(f"| {stage} |" in shown for stage in seconds)


def test_a_run_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="non-zero exit status"):
        job.main(["--json", str(tmp_path / "x.json"), "--", "--preset", "no-such-preset"])
    assert not (tmp_path / "x.json").exists()
