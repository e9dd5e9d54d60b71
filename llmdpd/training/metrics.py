"""Metrics of a run: metrics.jsonl, one record a line, and the loggers beside it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmdpd.training.loggers import LOGGERS
from llmdpd.training.loggers.base import Logger
from llmdpd.utils.checkpoint import refused_write
from llmdpd.utils.files import atomic_write_text, each_record

_WHEN = ("iteration", "wall_seconds")
_log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes records to `RUN/metrics.jsonl` and to loggers; a context manager.

    Each record is once in each of them, however often the run was stopped: what an interrupted run wrote after its
    checkpoint is dropped, or where a logger cannot drop it not written to it again. The resumed run writes the same.

    Args:
        run: the run folder.
        resume_at: drop what an interrupted run wrote after this iteration; None starts anew.
        elapsed: training seconds before this process.
        loggers: names in `LOGGERS`. One that is new to the run gets what was recorded before, too.

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
        dropped = {_key(record) for record in before if record["iteration"] > last}
        self._loggers: list[tuple[Logger, set[tuple[object, ...]]]] = []
        with self._refusals():
            atomic_write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            for name in loggers:
                logger = LOGGERS[name](run, resume_at)
                self._loggers.append((logger, dropped if logger.continues and not logger.rewinds else set()))
                for record in () if logger.continues else kept:
                    logger.write(int(record["iteration"]), _values(record))
        self._start = time.monotonic() - elapsed

    @property
    def seconds(self) -> float:
        """Training seconds so far, those before a resume included."""
        return time.monotonic() - self._start

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One record; `iteration` is the number of iterations done."""
        record = {"iteration": iteration, "wall_seconds": round(self.seconds, 3), **values}
        with self._refusals():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            for logger, known in self._loggers:
                if _key(record) not in known:
                    logger.write(iteration, values)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        # Every record was flushed as it was written; what a full disk refused then is refused again here.
        with suppress(OSError):
            self._file.close()
        for logger, _ in self._loggers:
            with suppress(OSError):
                logger.close(failed=kind is not None)

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
