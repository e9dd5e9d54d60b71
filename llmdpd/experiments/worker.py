"""What runs a step's command on the machine that it falls to. Imports little: an engine starts it for every step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO


def start_process(argv: list[str], log: IO[str], cuda: int | None = None) -> subprocess.Popen[str]:
    """A command in a session of its own: a terminal's Ctrl-C reaches it through the scheduler alone, and so once."""
    environment = dict(os.environ)
    if cuda is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[cuda] if visible else str(cuda)
    return subprocess.Popen(
        [sys.executable, "-m", "llmdpd.experiments.child", str(os.getpid()), *argv],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        start_new_session=True,
    )


class Worker:
    """On a machine of an engine: runs one command, with that machine's interpreter."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()

    def run(self, argv: list[str], log: str) -> int:
        """Run a command, whose output is appended to `log`, to its end; its exit code."""
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with Path(log).open("a", encoding="utf-8") as file:
            self._process = start_process([sys.executable, *argv[1:]], file)
        if self._stopped.is_set():
            self._process.terminate()
        return self._process.wait()

    def stop(self) -> None:
        """Ask the command to save and end, from another thread."""
        self._stopped.set()
        if self._process is not None:
            self._process.terminate()


def run_here(argv: list[str], log: str) -> int:
    """Run a command as `Worker.run` does; where the process is told to end, so is the command."""
    worker = Worker()
    for number in (signal.SIGTERM, signal.SIGINT):  # Slurm's; and submitit's own, at a job's time limit
        signal.signal(number, lambda *_: worker.stop())
    return worker.run(argv, log)
