"""Progress with rate and time left: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(soft_wrap=True, highlight=False)
_SECONDS_BETWEEN_LINES = 15.0


class ProgressBar:
    """Progress of one piece of work; a context manager.

    Args:
        name: what is being done.
        total: how much of it there is.
        unit: of the rate, as in "it" for it/s.
        done: how much was done before.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._first, self._start, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=done, rate="", note="")

    def update(self, done: int, note: str = "") -> None:
        """Say how much is done by now, and a word on how it goes."""
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.1f} {self._unit}/s", note=note)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or done == self._total:
            self._last_line = now
            left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 and done < self._total else "done"
            console.print(
                f"{self._name}: {done}/{self._total}, {rate:.1f} {self._unit}/s, {left}" + (f"; {note}" if note else "")
            )

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
