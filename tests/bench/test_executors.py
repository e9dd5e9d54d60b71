"""What the benchmark of executors calls done, lost and done twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import executors

BEGIN, LOST, END = "$ python -m llmdpd.train x", "# the worker of this step was lost: train", "results: r/results.json"


def test_it_sees_what_is_lost_or_done_twice(tmp_path: Path) -> None:
    logs = {
        "plain": [BEGIN, END],
        "lost once": [BEGIN, LOST, BEGIN, END],
        "begun twice": [BEGIN, BEGIN, END],
        "done twice": [BEGIN, END, LOST, BEGIN, END],
        "failed": [BEGIN],
        "half": [BEGIN, END],
    }
    (tmp_path / "logs").mkdir()
    cells: list[Any] = []
    for name, lines in logs.items():
        (tmp_path / "logs" / f"{name}.log").write_text("\n".join(lines))
        state = "partial" if name == "half" else "done"
        cells.append(SimpleNamespace(name=name, folder=tmp_path / name, state=state))
    outcomes: list[Any] = [
        SimpleNamespace(cell=cell, failed_step="train" if cell.name == "failed" else None) for cell in cells
    ]
    assert executors.judge(cells, outcomes) == {"done": 4, "lost": 2, "twice": 2, "workers_lost": 2}


def test_it_counts_the_time_of_all_processes() -> None:
    looks = executors.Processes()
    looks.look()
    before = looks.seconds
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(0, flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", f"{code}input()"], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert looks.seconds - before >= 0.25
        assert "input()" in looks.titles[process.pid]
        process.communicate("\n")
    assert looks.seconds - before >= 0.25, "its time is kept after its end"
    assert os.getpid() in looks.titles
