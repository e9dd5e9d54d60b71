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
        self._is_local = self._owner and not os.environ.get("RAY_ADDRESS")
        self._idle: list[Any] = []
        if not self._owner:
            return
        local = {"address": "local", "num_cpus": usable_cores(), "num_gpus": count_gpus(), "include_dashboard": False}
        try:
            self._ray.init(**local if self._is_local else {}, log_to_driver=False)
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
        shares = self._queued(cells, 1)
        # On a cluster, which may grow and be used by others, what does not fit waits in Ray's queue.
        return shares[: self._fitting(shares[0])] if self._is_local else shares

    def _fitting(self, share: Share) -> int:
        """How many such shares a local Ray has.

        Raises:
            InputError: not one, so that a step would wait for ever.
        """
        known = self._ray.cluster_resources()
        cores = int(known["CPU"])
        if share.threads > cores:
            expected = f"at most {cores}, or a cluster (RAY_ADDRESS)"
            raise InputError("a local Ray has fewer cores", field="--threads", found=share.threads, expected=expected)
        fitting = cores // share.threads
        return fitting if share.cuda is None else min(fitting, int(known["GPU"]))

    def start(self, argv: list[str], share: Share, log: Path) -> RayStep:
        # What was lost is started again by the scheduler, which knows where the cell was left; not by Ray. Two calls at
        # once: the second is the one that stops the first. (A cancelled task of Ray loses its process's exit.)
        needs = {"num_cpus": share.threads, "num_gpus": int(share.cuda is not None)}
        make = self._ray.remote(max_restarts=0, max_concurrency=2, **needs)(Worker).remote
        # A local Ray's workers serve step after step: each takes a second to start. Elsewhere one that is kept would
        # keep others from its place.
        worker = self._idle.pop() if self._idle else make()
        return RayStep(self._ray, worker, argv, str(log.absolute()), self._idle if self._is_local else None)

    def close(self) -> None:
        if self._owner:
            self._ray.shutdown()


class RayStep:
    """A step in a Ray actor, which is put into `idle` when it has ended; see `Running`."""

    def __init__(self, ray: Any, worker: Any, argv: list[str], log: str, idle: list[Any] | None) -> None:
        self._ray, self._worker, self._log, self._idle = ray, worker, log, idle
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
        if self._idle is not None:
            self._idle.append(self._worker)
            self._idle = None
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
