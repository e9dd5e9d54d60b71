"""Metrics of a run: metrics.jsonl, one record a line, and TensorBoard scalars beside it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType

from llmdpd.files import atomic_write_text


class MetricsWriter:
    """Writes records to `RUN/metrics.jsonl` and TensorBoard; a context manager.

    Args:
        run: the run folder.
        resume_at: drop what an interrupted run wrote after this iteration; None starts anew.
        elapsed: training seconds before this process.
    """

    def __init__(self, run: Path, resume_at: int | None = None, elapsed: float = 0.0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        kept = [] if resume_at is None else [r for r in read_metrics(path) if r["iteration"] <= resume_at]
        atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=None if resume_at is None else resume_at + 1)
        self._start = time.monotonic() - elapsed

    @property
    def seconds(self) -> float:
        """Training seconds so far, those before a resume included."""
        return time.monotonic() - self._start

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One record; `iteration` is the number of iterations done."""
        record = {"iteration": iteration, "wall_seconds": round(self.seconds, 3), **values}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file; a last line that a kill cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def first_not_finite(window: list[dict[str, float]], first_iteration: int) -> tuple[str, int, float] | None:
    """Name, iteration and value of the first metric in a window that is NaN or Inf."""
    for offset, metrics in enumerate(window):
        for name, value in metrics.items():
            if not math.isfinite(value):
                return name, first_iteration + offset, value
    return None
