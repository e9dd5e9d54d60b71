"""Running an experiment's cells, several at once, each of them from where it was left."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmdpd.experiments.cell import Cell, Share, Step
from llmdpd.experiments.executors import LOST, Executor, Running
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.files import process_lock
from llmdpd.utils.progress import ProgressBar, Stopwatch, console

_POLL_SECONDS = 0.2
_TAIL_LINES = 15
_MOST_LOSSES = 5
"""Times that a cell is lost with its worker without an iteration more, until it counts as failed: it may be what kills
them."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: done before (`reused`), done now, or failed; then the step and the end of its log."""

    cell: Cell
    seconds: float = 0.0
    reused: bool = False
    failed_step: str | None = None
    log_tail: str = ""

    @property
    def words(self) -> str:
        if self.failed_step:
            return f"failed ({self.failed_step})"
        return "was done before" if self.reused else f"done in {self.seconds:.0f} s"


@dataclass
class _Job:
    """A cell that is being worked on; `step` is `running`. `losses`: workers lost since `iterations` were done."""

    cell: Cell
    share: Share
    log: Path
    step: Step
    running: Running
    watch: Stopwatch = field(default_factory=Stopwatch)
    losses: int = 0
    iterations: int = 0

    def lose(self) -> bool:
        """Note that a worker was lost; whether the cell may go on."""
        done = self.cell.iterations_done
        self.losses = 1 if done > self.iterations else self.losses + 1
        self.iterations = done
        return self.losses <= _MOST_LOSSES


class Scheduler:
    """Runs cells, as many at once as there are shares.

    Args:
        cells: in the order in which they begin.
        executor: what runs their steps.
        logs: folder of the logs, one a cell, appended to.
        stop: the stop signals; they are passed on to what runs.
    """

    def __init__(self, cells: Sequence[Cell], executor: Executor, logs: Path, stop: StopSignals) -> None:
        self._waiting, self._free = list(cells), executor.shares(len(cells))
        self._executor, self.at_once = executor, len(self._free)
        self._total, self._logs, self._stop = len(cells), logs, stop
        self._running: list[_Job] = []
        self._busy: set[str] = set()
        self.outcomes: list[Outcome] = []

    def execute(self) -> list[Outcome]:
        """Run every cell to its end; a failed one does not stop the others. Outcomes in the order of the ends.

        Raises:
            StopRequestedError: a stop was asked for; what ran has saved and ended.
            InputError: a cell's folder holds something that is not the cell's.
        """
        try:
            with ProgressBar("experiment", "cells") as bar:
                while self._waiting or self._running:
                    self._stop.check()
                    self._begin()
                    self._look()
                    bar.update(len(self.outcomes), self._total, self._note())
                    if self._running or self._waiting:
                        time.sleep(_POLL_SECONDS)
        finally:
            self._end_running()
        return self.outcomes

    def _begin(self) -> None:
        """Start waiting cells while there are shares; one that another process is at work in keeps waiting."""
        for cell in list(self._waiting):
            if not self._free:
                return
            if _is_busy(cell):
                if cell.name not in self._busy:
                    console.print(f"{cell.name}: another process is at work in it; waiting for that")
                    self._busy.add(cell.name)
                continue
            self._waiting.remove(cell)
            step = cell.next_step(self._free[0])
            if step is None:
                self._tell(Outcome(cell, reused=True))
                continue
            share = self._free.pop(0)
            log = self._logs / f"{cell.name}.log"
            running = self._run_step(step, share, log)
            self._running.append(_Job(cell, share, log, step, running, iterations=cell.iterations_done))

    def _look(self) -> None:
        """For each job that has ended start the cell's next step, or note its outcome."""
        for job in list(self._running):
            code = job.running.poll()
            if code is None:
                continue
            lost = code == LOST
            step = None if code and not lost else job.cell.next_step(job.share)
            if lost:
                failed = None if job.lose() else f"{job.step.what}, whose worker was lost {job.losses} times"
                _write(job.log, f"# the worker of this step was lost: {job.step.what}")
            else:
                # A step that succeeds and leaves the same to do would be repeated for ever.
                failed = job.step.what if code or step == job.step else None
            if step is not None and failed is None:
                job.step, job.running = step, self._run_step(step, job.share, job.log)
                continue
            self._running.remove(job)
            self._free.append(job.share)
            tail = "\n".join(_last_lines(job.log, _TAIL_LINES)) if failed else ""
            self._tell(Outcome(job.cell, job.watch.seconds, failed_step=failed, log_tail=tail))

    def _tell(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        console.print(f"{len(self.outcomes)} of {self._total}: {outcome.cell.name} {outcome.words}")

    def _note(self) -> str:
        notes = []
        for job in self._running:
            last = "".join(_last_lines(job.log, 1))
            notes.append(f"{job.cell.name} {job.step.what} {'' if last.startswith('$ ') else last[:60]}".strip())
        return "; ".join(notes)

    def _end_running(self) -> None:
        """Where the loop was left early: ask what runs to save and end, and wait for it."""
        if not self._running:
            return
        console.print(f"stopping {', '.join(job.cell.name for job in self._running)}")
        for job in self._running:
            job.running.stop()
        for job in self._running:
            job.running.wait()

    def _run_step(self, step: Step, share: Share, log: Path) -> Running:
        log.parent.mkdir(parents=True, exist_ok=True)
        _write(log, f"$ {shlex.join(('python', '-m', *step.words))}")
        return self._executor.start(step.argv, share, log)


def _write(log: Path, line: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _is_busy(cell: Cell) -> bool:
    """Whether another process holds the run's lock."""
    lock = cell.folder / ".lock"
    if not lock.exists():
        return False

    def refuse(holder: int | None) -> None:
        raise BlockingIOError

    try:
        with process_lock(lock, refuse):
            return False
    except BlockingIOError:
        return True


def _last_lines(log: Path, count: int) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


def seconds_left(cell: Cell, known: Iterable[Cell]) -> float | None:
    """Seconds until the cell is done, from the mean of finished runs of its method, else of its preset.

    None until such a run has finished. Iterations that the cell has done already are subtracted in proportion.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    for other in known:
        if other.preset == cell.preset and other.config.method.name == cell.config.method.name and other.records():
            seconds = other.run.notes().get("times", {}).get("total_seconds")
            if seconds is not None:
                times[other.method == cell.method].append(seconds)
    found = times[True] or times[False]
    if not found:
        return None
    share_left = 1 - cell.iterations_done / cell.config.training.iterations
    return share_left * sum(found) / len(found)
