"""Worker processes whose death, or silence, does not end the run.

A worker is a fresh interpreter started with nothing but a socket pair, not `multiprocessing.Process`: "spawn" would
import the parent's main module again in every worker (`python -m llmdpd.train` imports torch: seconds and hundreds of
MB each), and "fork" copies torch's threads in an undefined state.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from llmdpd.errors import InputError
from llmdpd.tasks.simulation.channel import start_worker
from llmdpd.tasks.user import file_in_use
from llmdpd.utils.cores import usable_cores

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Work during which this many workers died is given up."""
STEP_SECONDS, EPISODE_SECONDS = 120.0, 900.0
"""How long a worker may take, by default, for a step of all its environments, and for starting them or a whole episode.
The environment variables LLMDPD_STEP_SECONDS and LLMDPD_EPISODE_SECONDS say otherwise."""
POLL_SECONDS = 0.5
"""The longest time between two looks at silent workers and at stop signals."""
_ALLOW_LONGER = "; LLMDPD_STEP_SECONDS and LLMDPD_EPISODE_SECONDS allow longer"

_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
# "-I" keeps a stray json.py in the working directory out; then the parent's import path is taken over as it is.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from llmdpd.tasks.simulation.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


class WorkerDiedError(Exception):
    """A worker's process ended without being asked to."""


class WorkerError(RuntimeError):
    """An exception inside a worker, whose traceback the message holds; or work that three workers died of."""


@dataclass(frozen=True)
class Death:
    """A worker that died, or was ended since it gave no answer for `silent` seconds; it has been replaced."""

    worker: int
    pid: int
    exit_code: int
    silent: float | None = None

    def __str__(self) -> str:
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        how = f"died: {how}" if self.silent is None else f"was ended: no answer within {self.silent:g} s"
        return f"worker {self.worker} (process {self.pid}) {how}"

    @property
    def hint(self) -> str:
        """What may help where it was ended for its silence, to follow a message; "" of one that died by itself."""
        return "" if self.silent is None else _ALLOW_LONGER


def time_limits() -> tuple[float, float]:
    """The seconds that a worker may take for a step of all its environments, and for starting them or a whole episode.

    Raises:
        InputError: an environment variable that says no positive number.
    """
    found = []
    for name, usual in (("LLMDPD_STEP_SECONDS", STEP_SECONDS), ("LLMDPD_EPISODE_SECONDS", EPISODE_SECONDS)):
        said = os.environ.get(name) or str(usual)
        try:
            found.append(float(said))
        except ValueError:
            found.append(0.0)
        if not found[-1] > 0:
            raise InputError("a time limit that is no positive number", field=name, found=said, expected="seconds")
    return found[0], found[1]


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
        self._limits: deque[float] = deque()
        self._start()

    def _start(self) -> None:
        boot = [sys.executable, "-I", "-c", _BOOT]
        self._process, self.connection = start_worker(boot, [json.dumps(sys.path)], self._environment)
        self.pending.clear()
        self._limits.clear()
        self._looked, self._silent = time.monotonic(), 0.0
        self._overdue: float | None = None
        self._send((self._factory, self._arguments, self._file))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def call(self, tag: Any, method: str, *arguments: Any, seconds: float | None = None) -> None:
        """Request a method call; `tag` is returned with its answer. A death raises in `receive`, not here.

        `seconds`: how long the answer may take (see `answered`), by default as long as a whole episode.
        """
        if not self.pending:
            self._looked, self._silent = time.monotonic(), 0.0
        self.pending.append(tag)
        self._limits.append(time_limits()[1] if seconds is None else seconds)
        self._send((method, arguments))

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            self.connection.send(message)
        except OSError:
            # It is dead, or does not read; what follows half a message would be taken for its rest. Its last answers
            # can still be read.
            logger.debug("worker %d took no more calls", self.index)
            self._process.kill()

    def hurry(self) -> None:
        """End the process if the oldest call took longer than it may: `receive` then raises as for any other death.

        Only time in which the parent was waiting counts, not that in which it was stopped itself.
        """
        now = time.monotonic()
        self._silent, self._looked = self._silent + min(now - self._looked, 2 * POLL_SECONDS), now
        if self._limits and self._silent > self._limits[0] and self._overdue is None:
            self._overdue = self._limits[0]
            self._process.kill()

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
        tag = None
        if self.pending:
            tag, _ = self.pending.popleft(), self._limits.popleft()
        self._looked, self._silent = time.monotonic(), 0.0
        if status == "ok":
            return tag, content[0]
        exception, text = content
        if exception is not None:
            raise exception
        raise WorkerError(f"exception in worker {self.index}:\n{text}")

    def replace(self) -> Death:
        """Start a new process in place of one that died, or is past its time."""
        death = Death(self.index, self.pid, self.stop(), self._overdue)
        logger.warning("%s; it is replaced and its work redone", death)
        self._start()
        return death

    def stop(self) -> int:
        """End the process, even if it is busy; returns its exit code, a negative signal where one ended it."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()


def answered(workers: Iterable[Worker]) -> list[Worker]:
    """Those of the workers, of which each has a call pending, that have an answer or are dead.

    Waits for `POLL_SECONDS` at most, so that the caller can look at stop signals; then the list may be empty. A worker
    past its call's time limit is ended.
    """
    by_connection: dict[Any, Worker] = {worker.connection: worker for worker in workers}
    found = [by_connection[connection] for connection in wait(list(by_connection), POLL_SECONDS)]
    for worker in by_connection.values():
        if worker not in found:
            worker.hurry()
    return found


def map_unordered(
    factory: str,
    arguments: tuple[Any, ...],
    method: str,
    items: Sequence[tuple[Any, ...]],
    *,
    workers: int | None = None,
    deaths: list[Death] | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Any]]:
    """Call `method(*item)` for each item in worker processes; yields (index, result) in the order of completion.

    Args:
        factory, arguments: build the object whose method is called, once in each worker.
        method: its name.
        items: positional arguments of each call; taken in order, by whichever worker is free.
        workers: processes, one a core by default.
        deaths: workers that died are appended here; their items are redone.
        waiting: called whenever no result came for `POLL_SECONDS`; may raise to stop.

    Raises:
        WorkerError: a call raised an exception (an `InputError` is raised as itself), or three workers died of one
            item or took longer for it than `time_limits` allow.
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
            ready = answered(worker for worker in pool if worker.pending)
            if not ready:
                waiting()
            for worker in ready:
                try:
                    result = worker.receive()
                except WorkerDiedError:
                    unfinished = list(worker.pending)
                    death = worker.replace()
                    if deaths is not None:
                        deaths.append(death)
                    died[unfinished[0]] += 1
                    if died[unfinished[0]] >= MAX_DEATHS:
                        what = f"{MAX_DEATHS} workers died of {items[unfinished[0]]}"
                        raise WorkerError(f"{what}: {death}{death.hint}") from None
                    queue.extendleft(reversed(unfinished))
                    feed(worker)
                    continue
                feed(worker)
                done += 1
                yield result
    finally:
        for worker in pool:
            worker.stop()
