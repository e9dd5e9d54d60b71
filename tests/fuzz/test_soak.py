"""Some kills, stops and full disks of the soak, others each run; and the soak itself, which must see every fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")


def run_python(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=900, env=environment)


def test_what_is_disturbed_ends_as_what_is_not(fresh_seed: int) -> None:
    done = run_python(FUZZ / "soak.py", "--only", "collect --tasks", "--seed", fresh_seed)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    tried = ["killed", "a worker killed", "a worker stopped", "stopped and continued", "a full disk"]
    if done.returncode == 2:
        assert "file systems cannot be mounted here" in done.stderr
        tried.remove("a full disk")
    for what in tried:
        assert f"| collect --tasks | {what} |" in done.stdout


FAULTS = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import forks, soak, soak_jobs

def command(words):
    place, (what, *_) = Path.cwd() / sys.argv[2] / "case", words
    (place / "result").write_text("wrong" if what == "different" else "right")
    if what == "lost": return 3
    if what == "signals": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "tracebacks": raise KeyError
    if what == "files": (place / "x.tmp").touch()
    if what == "stuck": time.sleep(60)
    if what == "processes":
        if os.fork() == 0: time.sleep(60)
        time.sleep(0.5)
    return 0

def job(*words):
    return soak_jobs.Job(lambda _: ["fine"], lambda _: list(words), lambda place: (place / "result").read_text())

soak.LIMIT, soak._STAYS, forks.commands.main = 1.0, 0.2, command
forks._LATER = ()
kinds = ("fine", "different", "lost", "signals", "tracebacks", "files", "stuck", "processes")
soak_jobs.jobs = lambda data: {kind: job(kind) for kind in kinds}
forks.prepare()
found = soak.Soak(Path(sys.argv[2]), 0, "")
soak.KINDS = {"": {"goes on": lambda case: case.finish()}}
found.run("", 0)
found.print_table()
assert found.faults == len(kinds) - 1
counts = {name: {key for key, value in counts.items() if value} for (name, _), counts in found.counts.items()}
assert counts == {
    "fine": {"runs", "equal"}, "different": {"runs", "different"}, "lost": {"runs", "lost"},
    "signals": {"runs", "signals"}, "tracebacks": {"runs", "lost", "tracebacks"}, "files": {"runs", "equal", "files"},
    "stuck": {"runs", "stuck"}, "processes": {"runs", "equal", "processes"},
}, counts
"""


def test_the_soak_sees_what_is_wrong(tmp_path: Path) -> None:
    done = run_python("-c", FAULTS, FUZZ, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
