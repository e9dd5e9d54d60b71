"""docs/tutorials/your-own-robot.md from beginning to end, as it stands there, with fewer episodes and iterations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmdpd
from llmdpd.evaluation.results import read_results

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "your-own-robot.md"
FILES = PAGE.parent / "desk"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
FEWER = {
    "range(40)": "range(4)",
    "--iterations 3000": "--iterations 4 --evaluation.episodes 1 --threads 1 --data.workers 1",
    "--episodes 100": "--episodes 1 --threads 1 --workers 1",
    '"--iterations", "300"': '"--iterations", "4"',
}
"""What the page or its files have → what the test has in its place; each stands there."""


def stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def test_the_page_shows_what_stands_in_its_files() -> None:
    shown = [(name, body) for _, name, body in BLOCK.findall(PAGE.read_text("utf-8")) if (FILES / name).is_file()]
    assert [name for name, _ in shown] == ["record.py", "tasks.toml"]
    for name, body in shown:
        whole = stripped((FILES / name).read_text("utf-8"))
        assert [part for part in stripped(body).split("\n\n") if part.strip() not in whole] == [], name


@pytest.mark.slow
def test_the_page_from_beginning_to_end(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="Minari's DataCollector needs it")
    work = tmp_path / "work"
    work.mkdir()
    text = PAGE.read_text("utf-8")
    files = {file.name: file.read_text("utf-8") for file in FILES.iterdir() if file.is_file()}
    for old, new in FEWER.items():
        assert any(old in each for each in (text, *files.values())), "the page has changed"
        text = text.replace(old, new)
        files = {name: each.replace(old, new) for name, each in files.items()}
    for name, each in files.items():
        (work / name).write_text(each)
    (tmp_path / "bin").mkdir()
    for name, words in (("python", ""), ("llmdpd", "-m llmdpd ")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        script.chmod(0o755)
    places = os.pathsep.join([str(Path(llmdpd.__file__).parents[1]), *sys.path])
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": places,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def run(command: str) -> str:
        done = subprocess.run(["sh", "-ec", command], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    said: dict[str, str] = {}
    for language, name, body in BLOCK.findall(text):
        if name and name not in files:
            (work / name).write_text(body)
        if language == "bash":
            said["commands"] = said.get("commands", "") + run(body)
        elif name in ("act.py", "logs.py"):
            said[name] = run(f"python {name}")
    assert "set-right" in said["commands"]
    assert said["act.py"].strip() in ("success", "no success")
    action = said["logs.py"][said["logs.py"].rindex("[") + 1 :].strip("]\n ").split()
    assert len([float(number) for number in action]) == 7
    tasks = {record.task: record.split for record in read_results(work / "runs" / "desk" / "results.json")}
    assert len(tasks) == 8
    assert [task for task, split in tasks.items() if split == "unseen"] == ["set-right", "point-at-plate"]
    assert all(not record.rolled_out for record in read_results(work / "runs" / "robot" / "results.json"))
