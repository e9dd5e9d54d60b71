"""The command `python -m llmdpd.collect`: make a data set of Meta-World's scripted experts."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from llmdpd.collection import CollectConfig, Collected, OnEpisode, collect_metaworld, partial_folder
from llmdpd.errors import InputError

__all__ = ["CollectConfig", "Collected", "collect_metaworld", "main", "show_progress", "summary_table"]

PLAIN_SECONDS = 10.0
"""Where the output is no terminal, a line of progress this often."""


class _TerminatedError(BaseException):
    """SIGTERM, raised where Ctrl-C would raise KeyboardInterrupt: workers are stopped on the way out."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


@contextmanager
def show_progress(console: Console) -> Iterator[OnEpisode]:
    """Yield a callback for `collect_metaworld` that draws a bar with rate and time left, or prints plain lines."""
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    columns = (
        TextColumn("collecting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes, {task.fields[rate]:,.0f} steps/s,"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("collecting", total=None, rate=0.0)
        meter = _Meter()

        def update(finished: int, total: int, transitions: int) -> None:
            bar.update(task, completed=finished, total=total, rate=meter.update(finished, transitions))

        yield update


class _Meter:
    """Rates since the first call: what a resumed collection found on the disk does not count."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: tuple[int, int] | None = None
        self.episodes_per_second = 0.0

    def update(self, finished: int, transitions: int) -> float:
        """Note the state; returns transitions a second."""
        if self.first is None:
            self.start, self.first = time.monotonic(), (finished, transitions)
        seconds = max(time.monotonic() - self.start, 1e-9)
        self.episodes_per_second = (finished - self.first[0]) / seconds
        return (transitions - self.first[1]) / seconds


class _PlainLines:
    """Progress as a line now and then, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = _Meter()
        self._next = 0.0

    def __call__(self, finished: int, total: int, transitions: int) -> None:
        rate = self._meter.update(finished, transitions)
        if time.monotonic() < self._next and finished < total:
            return
        self._next = time.monotonic() + PLAIN_SECONDS
        line = f"collected {finished} of {total} episodes"
        if self._meter.episodes_per_second > 0:
            left = (total - finished) / self._meter.episodes_per_second
            line += f", {rate:,.0f} steps/s, {left:.0f} s left"
        self._console.print(line, highlight=False)


def summary_table(collected: Collected) -> Table:
    """Tasks in rows; successes by kind of noise ("won/episodes") in the last columns."""
    kinds = list(dict.fromkeys(kind for row in collected.summaries for kind in row.successes))
    table = Table(box=None, padding=(0, 2, 0, 0), caption="last columns: successes/episodes by kind of noise")
    table.add_column("task", no_wrap=True)
    for name in ("episodes", "steps", "length", *kinds):
        table.add_column(name, justify="right", no_wrap=True)
    for row in collected.summaries:
        counts = [row.successes.get(kind, (0, 0)) for kind in kinds]
        rates = [f"{won}/{of}" for won, of in counts]
        episodes = str(row.episodes) if row.kept == row.episodes else f"{row.kept} of {row.episodes}"
        length = f"{row.mean_length:.0f}"
        table.add_row(row.task, episodes, f"{row.transitions:,}", length, *rates)
    return table


def _run(config: CollectConfig, console: Console) -> int:
    with show_progress(console) as progress:
        collected = collect_metaworld(config, progress)
    console.print(summary_table(collected))
    data = collected.dataset
    how = "was there already" if collected.reused else f"took {collected.seconds:.1f} s"
    console.print(
        f"{collected.out}: {data.num_episodes} episodes, {data.num_transitions:,} transitions; {how}\n"
        f"content {collected.content}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for a wrong input, 130 after Ctrl-C, 143 after SIGTERM."""
    config = tyro.cli(CollectConfig, prog="python -m llmdpd.collect", args=arguments)
    console = Console()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(config, console)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _TerminatedError) as stop:
        partial = partial_folder(config.out)
        console.print(
            f"stopped; finished episodes are kept in {partial}\nrun the same command again to go on",
            highlight=False,
            soft_wrap=True,
        )
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
