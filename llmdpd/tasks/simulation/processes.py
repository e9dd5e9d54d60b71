"""Worker processes whose death does not end the run.

A worker is a fresh interpreter started with nothing but a socket pair, not `multiprocessing.Process`: "spawn" would
import the parent's main module again in every worker (`python -m llmdpd.train` imports torch: seconds and hundreds of
MB each), and "fork" copies torch's threads in an undefined state.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from llmdpd.tasks.user import file_in_use
from llmdpd.utils.cores import usable_cores

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Work during which this many workers died is given up."""

_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
# "-I" keeps a stray json.py in the working directory out; then the parent's import path is taken over as it is.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from llmdpd.tasks.simulation.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


class WorkerDiedError(Exception):
    """A worker's process ended without being asked to."""


class WorkerError(RuntimeError):
    """An exception inside a worker; the message holds the worker's traceback."""


@dataclass(frozen=True)
class Death:
    """A worker that died: when it is reported, it has been replaced."""

    worker: int
    pid: int
    exit_code: int

    def __str__(self) -> str:
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return f"worker {self.worker} (process {self.pid}) died: {how}"


class Worker:
    """One worker process and its pending calls, in the order of their answers.

    The task file that is in use when it is made is in use in the process, too, as it was read then.

    Args:
        index: the worker's number, for messages.
        factory: name ("module:callable") of the factory of the object whose methods are called in the worker.
        arguments: its positional arguments.
        environment: additional environment variables.
    """

    def __init__(
        self, index: int, factory: str, arguments: tuple[Any, ...], environment: dict[str, str] | None = None
    ) -> None:
        self.index, self._factory, self._arguments = index, factory, arguments
        self._environment, self._file = {**os.environ, **_ONE_THREAD, **(environment or {})}, file_in_use()
        self.pending: deque[Any] = deque()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-c", _BOOT, str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=self._environment
            )
        self.connection = Connection(ours.detach())
        self.pending.clear()
        self.connection.send((self._factory, self._arguments, self._file))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def call(self, tag: Any, method: str, *arguments: Any) -> None:
        """Request a method call; `tag` is returned with its answer. A death raises in `receive`, not here."""
        self.pending.append(tag)
        try:
            self.connection.send((method, arguments))
        except OSError:
            # Its last answers can still be read.
            logger.debug("worker %d took no more calls", self.index)

    def receive(self) -> tuple[Any, Any]:
        """The next answer as (tag, value).

        Raises:
            WorkerDiedError: the process is gone and all its answers are read; `pending` holds the unanswered calls.
            WorkerError: the call raised an exception (an `InputError` is raised as itself).
        """
        try:
            status, *content = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDiedError(str(self.index)) from error
        tag = self.pending.popleft() if self.pending else None
        if status == "ok":
            return tag, content[0]
        exception, text = content
        if exception is not None:
            raise exception
        raise WorkerError(f"exception in worker {self.index}:\n{text}")

    def replace(self) -> Death:
        """Start a new process in place of one that died."""
        death = Death(self.index, self.pid, self.stop())
        logger.warning("%s; it is replaced and its work redone", death)
        self._start()
        return death

    def stop(self) -> int:
        """End the process, even if it is busy; returns its exit code, a negative signal where one ended it."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()


def map_unordered(
    factory: str,
    arguments: tuple[Any, ...],
    method: str,
    items: Sequence[tuple[Any, ...]],
    *,
    workers: int | None = None,
    deaths: list[Death] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Call `method(*item)` for each item in worker processes; yields (index, result) in the order of completion.

    Args:
        factory, arguments: build the object whose method is called, once in each worker.
        method: its name.
        items: positional arguments of each call; taken in order, by whichever worker is free.
        workers: processes, one a core by default.
        deaths: workers that died are appended here; their items are redone.

    Raises:
        WorkerError: a call raised an exception (an `InputError` is raised as itself).
        RuntimeError: three workers died of one item.
    """
    count = min(workers or usable_cores(), len(items))
    queue = deque(range(len(items)))
    died = [0] * len(items)
    pool: list[Worker] = []

    def feed(worker: Worker) -> None:
        # One item in work and one waiting, so that no worker idles while its answer travels.
        while queue and len(worker.pending) < 2:
            index = queue.popleft()
            worker.call(index, method, *items[index])

    try:
        for number in range(count):
            pool.append(Worker(number, factory, arguments))
            feed(pool[-1])
        done = 0
        while done < len(items):
            by_connection = {worker.connection: worker for worker in pool if worker.pending}
            for connection in wait(list(by_connection)):
                worker = by_connection[connection]  # type: ignore[index]
                try:
                    result = worker.receive()
                except WorkerDiedError:
                    unfinished = list(worker.pending)
                    death = worker.replace()
                    if deaths is not None:
                        deaths.append(death)
                    died[unfinished[0]] += 1
                    if died[unfinished[0]] >= MAX_DEATHS:
                        raise RuntimeError(f"{MAX_DEATHS} workers died of {items[unfinished[0]]}: {death}") from None
                    queue.extendleft(reversed(unfinished))
                    feed(worker)
                    continue
                feed(worker)
                done += 1
                yield result
    finally:
        for worker in pool:
            worker.stop()
