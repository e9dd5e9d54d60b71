"""The command `python -m llmdpd.collect`: make a data set of Meta-World's scripted experts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro
from rich.table import Table

from llmdpd.cli import run_command
from llmdpd.collection import CollectConfig, Collected, collect_metaworld, partial_folder
from llmdpd.progress import ProgressBar, console
from llmdpd.training.stopping import StopRequestedError, StopSignals

__all__ = ["CollectConfig", "Collected", "collect_metaworld", "main", "summary_table"]


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, 2 for a wrong input, 130 after Ctrl-C, 143 after SIGTERM."""
    return run_command(lambda: _collect(tyro.cli(CollectConfig, prog="python -m llmdpd.collect", args=arguments)))


def _collect(config: CollectConfig) -> None:
    with StopSignals() as stop, ProgressBar("collecting", "episodes") as bar:

        def progress(done: int, total: int, steps: int) -> None:
            bar.update(done, total, f"{steps:,} steps")
            stop.check()

        try:
            collected = collect_metaworld(config, progress)
        except StopRequestedError:
            console.print(f"finished episodes are kept in {partial_folder(config.out)}")
            console.print("run the same command again to go on")
            raise
    console.print(summary_table(collected))
    data = collected.dataset
    how = "was there already" if collected.reused else f"took {collected.seconds:.1f} s"
    console.print(f"{collected.out}: {data.num_episodes} episodes, {data.num_transitions:,} transitions; {how}")
    console.print(f"content {collected.content}")


if __name__ == "__main__":
    sys.exit(main())
