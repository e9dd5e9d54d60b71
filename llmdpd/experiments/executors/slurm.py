"""Steps as jobs of Slurm, submitted by submitit."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.experiments.cell import Share
from llmdpd.experiments.executors.base import LOST, Executor, Resources, failed
from llmdpd.experiments.worker import run_here
from llmdpd.utils.extras import extra

_GONE = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "REVOKED", "DEADLINE", "OUT_OF_MEMORY")
"""States of Slurm in which the job was ended from without."""


class SlurmExecutor(Executor):
    """Each step is a job. `--slurm NAME=VALUE …` are submitit's parameters, such as slurm_partition or timeout_min.

    `--slurm cluster=local` takes submitit's processes of this machine in Slurm's place, to try it out.
    """

    name = "slurm"

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources)
        self._options = dict(map(_option, resources.options))
        self._cluster = self._options.pop("cluster", None)
        with extra("slurm", "--executor"):
            import submitit
        self._submitit = submitit

    def shares(self, cells: int) -> list[Share]:
        return self._queued(cells, 1)

    def start(self, argv: list[str], share: Share, log: Path) -> SlurmStep:
        try:
            executor = self._submitit.AutoExecutor(folder=log.parent.absolute() / "slurm", cluster=self._cluster)
            needs = {"cpus_per_task": share.threads, "gpus_per_node": int(share.cuda is not None), "name": log.stem}
            executor.update_parameters(**needs | self._options)
        except (ValueError, NameError, TypeError, RuntimeError) as error:
            raise InputError(
                f"submitit refuses this: {error}",
                field="--slurm",
                found=" ".join(self.resources.options) or "no options, on a machine without Slurm",
                expected="parameters of submitit's AutoExecutor on a machine that submits to Slurm",
            ) from error
        return SlurmStep(executor.submit(run_here, argv, str(log.absolute())), log)


class SlurmStep:
    """A job of submitit; see `Running`."""

    def __init__(self, job: Any, log: Path) -> None:
        self._job, self._log = job, log

    def poll(self) -> int | str | None:
        if not self._job.done():
            return None
        error = self._job.exception()
        if error is None:
            code: int = self._job.result()
            return code
        # A job that left no result was ended from without, whatever its state is called.
        if self._job.state.split(" ")[0] in _GONE or not self._job.paths.result_pickle.exists():
            return LOST
        return failed(self._log, error)

    def is_queued(self) -> bool:
        return bool(self._job.state == "PENDING")

    def stop(self) -> None:
        # Of a local job submitit interrupts a process of its own, by SIGINT, which is ignored where it was started
        # unattended; SIGTERM it passes on.
        process = getattr(self._job, "_process", None)
        if process is None:
            self._job.cancel(check=False)
        else:
            process.terminate()

    def wait(self) -> None:
        pause = 0.25
        with contextlib.suppress(Exception):  # of whatever kind: it has ended
            # By itself submitit asks Slurm once a minute.
            while not self._job.done(force_check=True):
                time.sleep(pause)
                pause = min(2 * pause, 30)


def _option(words: str) -> tuple[str, Any]:
    name, sign, value = words.partition("=")
    if not (name and sign):
        raise InputError("an option without a value", field="--slurm", found=words, expected="NAME=VALUE")
    return name, int(value) if re.fullmatch("[0-9]{1,18}", value) else value
