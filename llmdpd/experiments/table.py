"""The state of an experiment's cells while it runs: a table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from llmdpd.reporting.page import measure
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import SECONDS_BETWEEN_LINES, console

with extra("cli"):
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

_SECONDS_BETWEEN_TABLES = 1.0
_NOTE = 60
"""Letters of a note."""


@dataclass(frozen=True)
class Row:
    """A cell: its name, its state in words, iterations done and in all, about how many seconds are left (None: not
    known), and the last that it said."""

    name: str
    state: str
    done: int
    total: int
    seconds_left: float | None = None
    note: str = ""

    @property
    def progress(self) -> str:
        return f"{self.done} of {self.total}"

    @property
    def left(self) -> str:
        return f"about {measure('seconds', self.seconds_left)}" if self.seconds_left else ""


@dataclass(frozen=True)
class State:
    """All cells: what is told of those that have `failed`, are `running` and `waiting`, the names of those `done`."""

    failed: tuple[Row, ...]
    running: tuple[Row, ...]
    waiting: tuple[Row, ...]
    done: tuple[str, ...]
    seconds_left: float | None = None

    def __str__(self) -> str:
        counts = (f"{len(getattr(self, name))} {name}" for name in ("done", "failed", "running", "waiting"))
        if not self.seconds_left:
            return ", ".join(counts)
        return f"{', '.join(counts)}; about {measure('seconds', self.seconds_left)} left"


class LiveTable:
    """Shows `state()` again and again, as often as it is worth while; a context manager.

    Args:
        state: what to show; asked only when something is shown.
        output: where.
    """

    def __init__(self, state: Callable[[], State], output: Console = console) -> None:
        self._state, self._console = state, output
        self._live = Live(console=output, auto_refresh=False) if output.is_terminal else None
        self._every = _SECONDS_BETWEEN_TABLES if self._live else SECONDS_BETWEEN_LINES
        self._last = time.monotonic()

    def update(self) -> None:
        """Show how it is now, unless that was shown just before."""
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        self._show()

    def _show(self) -> None:
        state = self._state()
        if self._live is not None:
            self._live.update(_table(state), refresh=True)
        else:
            told = "".join(
                f"; {row.name} {row.state} {row.progress} {row.note[:_NOTE]}".rstrip() for row in state.running
            )
            self._console.print(f"cells: {state}{told}")

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._show()
        if self._live is not None:
            self._live.stop()


def _table(state: State) -> Table:
    """What failed and what runs first: a terminal that is too low for all cells leaves out the last ones."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, caption=str(state), caption_justify="left")
    for column in ("run", "state", "iterations", "left", ""):
        table.add_column(column, no_wrap=True, justify="right" if column in ("iterations", "left") else "left")
    for row in (*state.failed, *state.running, *state.waiting):
        table.add_row(row.name, row.state, row.progress, row.left, row.note[:_NOTE])
    for name in state.done:
        table.add_row(name, "done")
    return table
