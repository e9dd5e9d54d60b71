"""Steps as processes of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from llmdpd.experiments.cell import Share
from llmdpd.experiments.executors.base import Executor, no_gpu
from llmdpd.experiments.worker import start_process
from llmdpd.utils.cores import usable_cores


class LocalExecutor(Executor):
    """A GPU for each cell where there are any, else the cores shared out."""

    name = "local"

    def shares(self, cells: int) -> list[Share]:
        gpus = 0 if self.resources.device == "cpu" else count_gpus()
        if self.resources.device == "cuda" and not gpus:
            raise no_gpu()
        count = min(self.resources.jobs or gpus or usable_cores(), max(1, cells))
        threads = self.resources.threads or max(1, usable_cores() // count)
        return [Share(threads, number % gpus if gpus else None) for number in range(count)]

    def start(self, argv: list[str], share: Share, log: Path) -> LocalStep:
        with log.open("a", encoding="utf-8") as file:
            return LocalStep(start_process(argv, file, share.cuda))


class LocalStep:
    """A process; see `Running`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def is_queued(self) -> bool:
        return False

    def stop(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.wait()


def count_gpus() -> int:
    """The number of GPUs that torch can use here."""
    from llmdpd.utils.device import usable_gpus  # which imports torch

    return usable_gpus()
