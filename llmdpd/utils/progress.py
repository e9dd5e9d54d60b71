"""Progress with rate and time left: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmdpd.utils.extras import extra

with extra("cli"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )


# What is printed holds paths and names of users, in which "[a]" is no markup and ":x:" no picture.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
error_console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True)
SECONDS_BETWEEN_LINES = 15.0


class ProgressBar:
    """Progress of one piece of work; a context manager.

    Rates count from the first call of `update`: work that a resumed run finds done is not counted.

    Args:
        name: what is being done.
        unit: of the work, as in "it" for it/s.
        output: where it is shown.
        check: called at each update; may raise to stop.
    """

    def __init__(
        self, name: str, unit: str, output: Console = console, check: Callable[[], None] = lambda: None
    ) -> None:
        self._name, self._unit, self._console, self._check = name, unit, output, check
        self._first: int | None = None
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if output.is_terminal:
            places = ("description", "fields[rate]", "fields[note]")
            name_of, rate, note = (TextColumn(f"{{task.{place}}}", markup=False) for place in places)
            done = (name_of, BarColumn(), MofNCompleteColumn(), rate)
            left = (TimeElapsedColumn(), "left:", TimeRemainingColumn(), note)
            self._bar = Progress(*done, *left, console=output)
            self._task = self._bar.add_task(name, total=None, rate="", note="")

    def update(self, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units are finished, with an optional note; with a total of 0 only `check`."""
        if not total:
            self._check()
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        speed = f"{rate:.1f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, rate=speed, note=note)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or done >= total:
            self._last_line = now
            parts = [f"{self._name}: {done} of {total}"]
            if rate > 0 and done < total:
                parts += [speed, f"{(total - done) / rate:.0f} s left"]
            self._console.print(", ".join(parts) + (f"; {note}" if note else ""))
        self._check()

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 2)
