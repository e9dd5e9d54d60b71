"""Steps as tasks of a Ray cluster, or of a local Ray that is started for them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.experiments.cell import Share
from llmdpd.experiments.executors.base import LOST, Executor, Resources, failed, no_gpu
from llmdpd.experiments.executors.local import count_gpus
from llmdpd.experiments.worker import Worker
from llmdpd.utils.cores import usable_cores
from llmdpd.utils.extras import extra


class RayExecutor(Executor):
    """Ray places the steps, each with its threads (and one GPU), and says which were lost with a worker or node.

    The cluster is the one that the environment variable RAY_ADDRESS names (Ray's own convention); without it a local
    one is started.
    """

    name = "ray"

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources)
        with extra("ray", "--executor"):
            import ray
        # Its types leave out what actors may be given.
        self._ray: Any = ray
        self._owner = not ray.is_initialized()
        if not self._owner:
            return
        local = {"address": "local", "num_cpus": usable_cores(), "num_gpus": count_gpus(), "include_dashboard": False}
        try:
            self._ray.init(**{} if os.environ.get("RAY_ADDRESS") else local, log_to_driver=False)
        except ConnectionError as error:
            raise InputError(
                "no Ray cluster answers",
                field="RAY_ADDRESS",
                found=os.environ.get("RAY_ADDRESS"),
                expected="the address of a running cluster; without the variable a local one is started",
            ) from error

    def shares(self, cells: int) -> list[Share]:
        if self.resources.device == "cuda" and not self._ray.cluster_resources().get("GPU"):
            raise no_gpu()
        return self._queued(cells, 1)

    def start(self, argv: list[str], share: Share, log: Path) -> RayStep:
        # What was lost is started again by the scheduler, which knows where the cell was left; not by Ray. Two calls at
        # once: the second is the one that stops the first. (A cancelled task of Ray loses its process's exit.)
        needs = {"num_cpus": share.threads, "num_gpus": int(share.cuda is not None)}
        worker = self._ray.remote(max_restarts=0, max_concurrency=2, **needs)(Worker).remote()
        return RayStep(self._ray, worker, argv, str(log.absolute()))

    def close(self) -> None:
        if self._owner:
            self._ray.shutdown()


class RayStep:
    """A step in a Ray actor of its own; see `Running`."""

    def __init__(self, ray: Any, worker: Any, argv: list[str], log: str) -> None:
        self._ray, self._worker, self._log = ray, worker, log
        self._placed = worker.__ray_ready__.remote()
        self._code = worker.run.remote(argv, log)

    def poll(self) -> int | str | None:
        if not self._has(self._code):
            return None
        try:
            code: int = self._ray.get(self._code)
        except self._ray.exceptions.RayTaskError as error:  # the step could not be started there
            return failed(self._log, error)
        except self._ray.exceptions.RayError:
            return LOST
        return code

    def is_queued(self) -> bool:
        return not self._has(self._placed)

    def stop(self) -> None:
        if not self.is_queued():
            self._worker.stop.remote()
        else:  # it waits in the queue
            self._ray.kill(self._worker)

    def wait(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._code)

    def _has(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])
