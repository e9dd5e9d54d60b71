"""TensorBoard: event files in the run folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdpd.training.loggers.base import Logger
from llmdpd.utils.extras import check_installed, extra


class TensorBoard(Logger):
    """Scalars in TensorBoard's format, in RUN/tensorboard. See `Logger`.

    Written in this thread: SummaryWriter's own thread ends in a traceback on a full disk, and tells nobody else.
    """

    rewinds = True

    def __init__(self, run: Path, name: str, resume_at: int | None) -> None:
        with extra("report"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run / "tensorboard"
        self.continues = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        file = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / file).open("wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Readers drop what earlier files have from this step on.
        start = 0 if resume_at is None else resume_at + 1
        self._add(Event(wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START)))

    @classmethod
    def require(cls) -> None:
        check_installed("report", "tensorboard", field="training.logger")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        with extra("report"):
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=iteration, summary=Summary(value=scalars)))

    def close(self, failed: bool) -> None:
        self._records.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
