"""The example of docs/guides/your-tasks.md and its folder, with fewer episodes and iterations."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llmdpd
from llmdpd.evaluation.results import read_results

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
COMMANDS = [
    "pip install gymnasium-robotics && python record.py",
    "llmdpd tasks check tasks.toml",
    "llmdpd train --tasks-file tasks.toml --run-dir runs/fetch",
    "llmdpd evaluate runs/fetch --prompts swapped",
]
FEWER = {
    "train": "--iterations 4 --evaluation.episodes 1 --training.select-every 0 --evaluation.no-videos --threads 1",
    "evaluate": "--episodes 1 --threads 1 --workers 1",
}


def blocks(language: str) -> list[str]:
    page = (GUIDES / "your-tasks.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_fetch_from_its_script_to_an_evaluation(tmp_path: Path) -> None:
    (commands,) = blocks("bash")
    assert commands.splitlines() == COMMANDS, "the page has changed"
    script = (GUIDES / "fetch" / "record.py").read_text("utf-8")
    assert "EPISODES = 40" in script
    (tmp_path / "record.py").write_text(script.replace("EPISODES = 40", "EPISODES = 4"))
    shutil.copy(GUIDES / "fetch" / "tasks.toml", tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(Path(llmdpd.__file__).parents[1]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "COLUMNS": "100",
    }

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("record.py")
    for task in ("pick", "push"):
        recorded = np.load(tmp_path / f"{task}.npz")
        assert recorded["observations"].shape == (200, 28)
        succeeded = recorded["is_success"].reshape(4, 50).any(axis=1)
        assert succeeded.sum() >= 3, "the expert of the page does the task"
    for command in COMMANDS[1:]:
        _, name, *words = command.split()
        said = run("-m", "llmdpd", name, *words, *FEWER.get(name, "").split())
        assert "pick" in said
        assert "push" in said
    assert (tmp_path / "tasks.png").is_file()
    records = read_results(tmp_path / "runs" / "fetch" / "results.json")
    assert {(record.task, record.episodes, record.max_steps) for record in records} == {
        ("pick", 1, 50),
        ("push", 1, 50),
    }
    assert len(list((tmp_path / "runs" / "fetch" / "evaluations").glob("*.json"))) == 1
