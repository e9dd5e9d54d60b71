"""Running an experiment's cells, several at once, each of them from where it was left."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llmdpd.errors import InputError
from llmdpd.experiments import mirrored
from llmdpd.experiments.cell import Cell, Share, Step
from llmdpd.experiments.durations import Durations
from llmdpd.experiments.executors import LOST, Executor, Running
from llmdpd.experiments.mirror import Mirror
from llmdpd.experiments.stores import PATIENCE_SECONDS, SECONDS_BETWEEN_QUESTIONS, UnreachableError
from llmdpd.experiments.table import LiveTable, Row, State
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.files import process_lock
from llmdpd.utils.progress import Stopwatch, console

_POLL_SECONDS = 0.2
_TAIL_LINES = 15
_TAIL_BYTES = 1 << 16
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
    """A cell that is being worked on; `step` is `running`, or was, where `running` is None: its worker was lost.

    `code`: what the step has ended with; asked for once, because asking again may have effects.
    `losses`: workers lost since `iterations` were done, of which `begun` were there at the start.
    `mirrored`: iterations of the mirrored checkpoint, when it was `asked` for.
    """

    cell: Cell
    share: Share
    log: Path
    begun: int
    step: Step | None = None
    running: Running | None = None
    code: int | str | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    losses: int = 0
    iterations: int = 0
    mirrored: int = 0
    asked: float = 0.0

    def lose(self) -> bool:
        """Note that a worker was lost; whether the cell may go on."""
        done = self.cell.iterations_done
        self.losses = 1 if done > self.iterations else self.losses + 1
        self.iterations = done
        self.running = None
        return self.losses <= _MOST_LOSSES


class Scheduler:
    """Runs cells, as many at once as there are shares.

    Args:
        cells: in the order in which they begin.
        executor: what runs their steps.
        logs: folder of the logs, one a cell, appended to.
        stop: the stop signals; they are passed on to what runs.
        durations: of cells that finished before, by which the time left is judged.
        mirror: where the cells' runs are mirrored, and looked for before each step.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        executor: Executor,
        logs: Path,
        stop: StopSignals,
        durations: Durations | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self._waiting, self._free = list(cells), executor.shares(len(cells))
        self._executor, self.at_once = executor, len(self._free)
        self._cells, self._logs, self._stop = tuple(cells), logs, stop
        self._running: list[_Job] = []
        self._busy: set[str] = set()
        self._durations, self._mirror = durations or Durations(), mirror
        self._silent_since: float | None = None  # the mirror
        self._ask_again = 0.0
        self.outcomes: list[Outcome] = []

    def execute(self) -> list[Outcome]:
        """Run every cell to its end; a failed one does not stop the others. Outcomes in the order of the ends.

        Raises:
            StopRequestedError: a stop was asked for; what ran has saved and ended.
            InputError: a cell's folder holds something that is not the cell's; the mirror has not answered for long.
        """
        try:
            with LiveTable(self.state) as table:
                while self._waiting or self._running:
                    self._stop.check()
                    self._begin()
                    self._look()
                    table.update()
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
            if not self._fetch(cell):
                return
            self._waiting.remove(cell)
            if cell.next_step(self._free[0]) is None:
                self._tell(Outcome(cell, reused=True))
                continue
            done = cell.iterations_done
            job = _Job(cell, self._free.pop(0), self._logs / f"{cell.name}.log", done, iterations=done)
            self._running.append(job)
            self._go_on(job)

    def _look(self) -> None:
        """For each job that has ended start the cell's next step, or note its outcome."""
        for job in list(self._running):
            if job.running is None:
                # What was lost with its worker may still be saving, as on SIGTERM.
                if not _is_busy(job.cell):
                    self._go_on(job)
                continue
            if job.code is None:
                job.code = job.running.poll()
            if job.code is None:
                continue
            assert job.step is not None
            if not self._fetch(job.cell, job.log):
                continue
            if job.code == LOST:
                _write(job.log, f"# the worker of this step was lost: {job.step.what}")
                if not job.lose():
                    self._end(job, f"{job.step.what}, whose worker was lost {job.losses} times")
            elif job.code:
                self._end(job, job.step.what)
            else:
                self._go_on(job)

    def _fetch(self, cell: Cell, log: Path | None = None) -> bool:
        """Bring to this machine what a step has done, and printed, on another one; whether the mirror answers."""
        if self._mirror is None:
            return True
        now = time.monotonic()
        if now < self._ask_again:
            return False
        try:
            if not _is_busy(cell):  # a step whose worker was lost on this machine may still be saving in the folder
                self._mirror.fetch(cell.folder)
            if log is not None:
                mirrored.take_log(self._mirror, cell.name, log)
        except UnreachableError as error:
            if self._silent_since is None:
                self._silent_since = now
                minutes = round(PATIENCE_SECONDS / 60)
                console.print(
                    f"{error}\n  It is asked again, for {minutes} minutes; cells that run go on.", markup=False
                )
            if now - self._silent_since >= PATIENCE_SECONDS:
                raise
            self._ask_again = now + SECONDS_BETWEEN_QUESTIONS
            return False
        self._silent_since = None
        return True

    def _go_on(self, job: _Job) -> None:
        """Start the cell's next step, or end the job."""
        if job.step is not None and job.running is None and not self._fetch(job.cell, job.log):
            return  # it is called again
        step = job.cell.next_step(job.share)
        if step is None:
            self._end(job)
        elif job.running is not None and step == job.step:
            # It succeeded and left the same to do: it would be repeated for ever.
            self._end(job, step.what)
        else:
            job.step, job.running = step, self._run_step(job.cell, step, job.share, job.log)
            job.code = None

    def _run_step(self, cell: Cell, step: Step, share: Share, log: Path) -> Running:
        log.parent.mkdir(parents=True, exist_ok=True)
        _write(log, f"$ {shlex.join(('python', '-m', *step.words))}")
        argv = step.argv if self._mirror is None else mirrored.words(self._mirror, cell.folder, log, step.argv)
        return self._executor.start(argv, share, log)

    def _end(self, job: _Job, failed: str | None = None) -> None:
        self._running.remove(job)
        self._free.append(job.share)
        tail = "\n".join(_last_lines(job.log, _TAIL_LINES)) if failed else ""
        self._tell(Outcome(job.cell, job.watch.seconds, failed_step=failed, log_tail=tail))

    def _tell(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if not outcome.failed_step:
            self._durations.add(outcome.cell)
        console.print(f"{len(self.outcomes)} of {len(self._cells)}: {outcome.cell.name} {outcome.words}")

    def state(self) -> State:
        """Of all cells, for `LiveTable`."""
        queued = [job for job in self._running if job.running is not None and job.running.is_queued()]
        running = tuple(self._row(job) for job in self._running if job not in queued)
        cells = (*(job.cell for job in queued), *self._waiting)
        waiting = tuple(_row(cell, "waiting", self._durations.left(cell)) for cell in cells)
        left = [row.seconds_left for row in (*running, *waiting)]
        known = [seconds for seconds in left if seconds is not None]
        failed = tuple(_row(each.cell, each.words, None) for each in self.outcomes if each.failed_step)
        done = tuple(each.cell.name for each in self.outcomes if not each.failed_step)
        seconds = sum(known) / max(1, len(running)) if len(known) == len(left) else None
        return State(failed, running, waiting, done, seconds)

    def _row(self, job: _Job) -> Row:
        done, total = job.cell.progress
        if self._mirror is not None:
            now = time.monotonic()
            if now - job.asked >= SECONDS_BETWEEN_QUESTIONS and self._silent_since is None:
                job.asked = now
                with suppress(InputError):  # a store that does not answer now: only the table is older
                    job.mirrored = self._mirror.iterations(job.cell.name)
            done = max(done, job.mirrored)
        left = self._durations.left(job.cell)
        if left is None and done > job.begun:
            left = job.watch.seconds * (total - done) / (done - job.begun)
        if job.step is None or job.running is None:
            return Row(job.cell.name, "its worker was lost", done, total, left)
        last = "".join(_last_lines(job.log, 1))
        return Row(job.cell.name, job.step.what, done, total, left, "" if last.startswith(("$ ", "# ")) else last)

    def _end_running(self) -> None:
        """Where the loop was left early: ask what runs to save and end, and wait for it."""
        if not self._running:
            return
        console.print(f"stopping {', '.join(job.cell.name for job in self._running)}")
        running = [job.running for job in self._running if job.running is not None]
        for step in running:
            step.stop()
        for step in running:
            step.wait()


def _row(cell: Cell, state: str, left: float | None) -> Row:
    done, total = cell.progress
    return Row(cell.name, state, done, total, left)


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
    """The end of a log, which may be long, and is read once a second."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-count:]
