"""Metrics of a run: metrics.jsonl, one record a line, and TensorBoard scalars beside it."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmdpd.utils.checkpoint import refused_write
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_write_text, each_record

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes records to `RUN/metrics.jsonl` and TensorBoard; a context manager.

    Args:
        run: the run folder.
        resume_at: drop what an interrupted run wrote after this iteration; None starts anew.
        elapsed: training seconds before this process.

    Raises:
        InputError: here and in `write`, where the disk is full or refuses.
    """

    def __init__(self, run: Path, resume_at: int | None = None, elapsed: float = 0.0) -> None:
        self._run, self._path = run, run / "metrics.jsonl"
        kept = [] if resume_at is None else [r for r in read_metrics(self._path) if r["iteration"] <= resume_at]
        with self._refusals():
            atomic_write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._board = _Board(run / "tensorboard", None if resume_at is None else resume_at + 1)
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
            self._board.write(iteration, values)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._file, self._board):
            # Every record was flushed as it was written; what a full disk refused then is refused again here.
            with suppress(OSError):
                file.close()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise refused_write("the metrics", self._path, self._run / "checkpoint", error) from error


class _Board:
    """Scalars in TensorBoard's format.

    Written in this thread: SummaryWriter's own thread ends in a traceback on a full disk, and tells nobody else.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        with extra("report"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            session = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=session))

    def write(self, iteration: int, values: dict[str, float]) -> None:
        with extra("report"):
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=iteration, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._records.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


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
