"""Metrics of a run: metrics.jsonl, one record a line, and the loggers beside it."""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llmdpd.training.loggers import LOGGERS
from llmdpd.training.loggers.base import Logger
from llmdpd.training.loggers.marks import START, Mark, Place, last_place, places, read_marks, write_marks
from llmdpd.utils.checkpoint import refused_write
from llmdpd.utils.files import atomic_write_text, each_record

_WHEN = ("iteration", "wall_seconds")
_log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes records to `RUN/metrics.jsonl` and to loggers; a context manager.

    Each record is once in each of them, however often the run was stopped. What an interrupted run wrote after its
    checkpoint is dropped; a logger that cannot drop it is not given it again, as the resumed run writes the same. A
    logger that is new to the run, or was left out for a while, gets what it lacks. Only where a run is killed between
    the writing of a record to metrics.jsonl and to a logger, that one record may be missing there.

    Args:
        run: the run folder.
        resume_at: drop what an interrupted run wrote after this iteration; None starts anew.
        elapsed: training seconds before this process.
        loggers: names in `LOGGERS`.

    Raises:
        InputError: here and in `write`, where the disk is full or refuses; and as the loggers.
    """

    def __init__(
        self,
        run: Path,
        resume_at: int | None = None,
        elapsed: float = 0.0,
        loggers: Sequence[str] = ("tensorboard",),
    ) -> None:
        self._run, self._path = run, run / "metrics.jsonl"
        before, last = read_metrics(self._path), -1 if resume_at is None else resume_at
        kept = [record for record in before if record["iteration"] <= last]
        # A run that was stopped before its marks were done begins with them; they may be recorded already.
        self._repeated = {_key(record) for record in kept if record["iteration"] == last}
        self._place = last_place(kept)
        self._loggers: list[tuple[Logger, Place]] = []
        with self._refusals(), ExitStack() as opened:
            marks = _freeze(run, before)
            atomic_write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            opened.push(partial(_close, self._path, lambda failed: self._file.close()))
            for name in loggers:
                known = marks.get(name)
                # Of one that refuses, the run knows no name: it is new to the run at the next try.
                identity, at = (known.name, resume_at) if known else (secrets.token_hex(4), None)
                logger = LOGGERS[name](run, identity, at)
                opened.push(partial(_close, f"the logger {name}", logger.close))
                given = self._fill(logger, known.given if known and logger.continues else START, kept)
                self._loggers.append((logger, given))
                marks[name] = Mark(identity, given, current=True)
                write_marks(run, marks)
            self._opened = opened.pop_all()
        self._start = time.monotonic() - elapsed

    @property
    def seconds(self) -> float:
        """Training seconds so far, those before a resume included."""
        return time.monotonic() - self._start

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One record; `iteration` is the number of iterations done."""
        record = {"iteration": iteration, "wall_seconds": round(self.seconds, 3), **values}
        if _key(record) in self._repeated:
            return
        self._place = self._place.next(iteration)
        with self._refusals():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            for logger, given in self._loggers:
                if self._place > given:
                    logger.write(iteration, values)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _fill(self, logger: Logger, given: Place, kept: Sequence[Mapping[str, float]]) -> Place:
        """Give a logger the kept records that it lacks; returns the last one that it then has."""
        for place, record in zip(places(kept), kept, strict=True):
            if place > given:
                logger.write(place.iteration, _values(record))
        return self._place if logger.rewinds else max(given, self._place)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise refused_write("the metrics", self._path, self._run / "checkpoint", error) from error


class NoMetrics:
    """In place of a `MetricsWriter`, in a process that writes none."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self._start = time.monotonic() - elapsed

    @property
    def seconds(self) -> float:
        """As `MetricsWriter.seconds`."""
        return time.monotonic() - self._start

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Nothing."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing."""


def _freeze(run: Path, before: Sequence[Mapping[str, float]]) -> dict[str, Mark]:
    """The run's marks, after those of the last process's loggers were brought to the end of what it recorded.

    They are written before a record is dropped: what a logger was given is known from metrics.jsonl alone.
    """
    end = last_place(before)
    marks = {
        name: Mark(mark.name, max(mark.given, end) if mark.current else mark.given, current=False)
        for name, mark in read_marks(run).items()
    }
    if marks:
        write_marks(run, marks)
    return marks


def _close(what: object, close: Callable[[bool], None], kind: type[BaseException] | None, *_: object) -> None:
    """Close a file or a logger; where that fails, the run goes on without."""
    try:
        close(kind is not None)
    except Exception as error:
        # What a full disk refused, with which the run ends, is refused again here.
        if kind is None or not isinstance(error, OSError):
            _log.warning("%s could not be closed: %s: %s", what, type(error).__name__, error)


def _values(record: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name not in _WHEN}


def _key(record: Mapping[str, float]) -> tuple[object, ...]:
    """What tells a record from the others: its iteration and what it has values of."""
    return record["iteration"], *_values(record)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file. Lines that are none are left out: a kill cuts the last one off, damage any."""
    damaged: list[str] = []
    records = list(each_record(path, damaged.append)) if path.is_file() else []
    if damaged:
        _log.warning("%s: %d damaged lines are left out", path, len(damaged))
    return records


def first_not_finite(window: list[dict[str, float]], first_iteration: int) -> tuple[str, int, float] | None:
    """Name, iteration and value of the first metric in a window that is NaN or Inf."""
    numbered = enumerate(window, first_iteration)
    found = ((name, number, value) for number, metrics in numbered for name, value in metrics.items())
    return next((entry for entry in found if not math.isfinite(entry[2])), None)
