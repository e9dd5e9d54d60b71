"""`python -m llmdpd.experiment NAME`: a table or figure of the paper, from its runs to a page of what came out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from llmdpd.cli.common import run_command
from llmdpd.errors import InputError
from llmdpd.experiments.duration import seconds_left
from llmdpd.experiments.grids import BUDGETS, GRIDS
from llmdpd.experiments.page import write_page
from llmdpd.experiments.plan import Plan, Settings, make_plan
from llmdpd.experiments.scheduler import Outcome, Scheduler, shares
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.command_line import parse
from llmdpd.utils.files import process_lock
from llmdpd.utils.progress import console, error_console

_EXPERIMENTS = "\n".join(f"    {name:<16}{grid.title}" for name, grid in GRIDS.items())
_DESCRIPTION = f"""Run an experiment: train and evaluate what is missing, and make a page of it.

{_EXPERIMENTS}

Runs that are finished are not repeated, interrupted ones continue. Options of llmdpd.train for all of its runs, or for
the methods that have them, stand at the end, after --:  llmdpd.experiment table1 --seeds 1 -- --method.lr 1e-4
What the experiment itself decides, such as --seed and --preset, or a method that it compares, is refused there.

Budgets: {"; ".join(f"{name} ({budget})" for name, budget in BUDGETS.items())}"""


@dataclass(frozen=True)
class ExperimentConfig:
    """What to run, and on how much of the machine."""

    experiment: Annotated[str, tyro.conf.Positional]
    """One of the experiments above."""
    protocol: str | None = None
    """Which tasks are trained on: paper (3 tasks), ml45 (45) or design (40 of those); of table2 d4rl. By default the
    experiment's first."""
    seeds: int = 3
    """Runs of each method, with the seeds 0, 1 …"""
    episodes: int | None = None
    """Evaluated episodes a task; by default the budget's, else the experiment's (500, of locomotion 100)."""
    seen_episodes: int | None = None
    """The same of a task that is trained on, of which ml45 has 45; by default as many."""
    budget: str = "full"
    """How much each run may take at most, by one of the names above."""
    out: Path | None = None
    """Folder of the runs and the page. Experiments share runs here. Default: experiments/PROTOCOL, or
    experiments/PROTOCOL-BUDGET."""
    data_root: Path = Path("data")
    """Folder of collected data, shared by all runs."""
    only: tuple[str, ...] = ()
    """Methods to run, by the names that their runs' folders begin with; by default all."""
    variants: bool = True
    """Evaluate with other prompts, and non-learned baselines, too, where the experiment has such; --no-variants: the
    runs alone."""
    jobs: int | None = None
    """Runs at once; by default one a GPU where there are any, else one a core."""
    device: str = "auto"
    """auto (GPUs where there are any), cpu or cuda."""
    dry_run: bool = False
    """Show the runs, their state and, where a run of their method has finished, about how long they take; run nothing.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0, 1 where a run failed, 2 for bad input, 128 + signal when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    failed: list[Outcome] = []
    return run_command(lambda: _experiment(words, failed)) or (1 if failed else 0)


def _experiment(words: list[str], failed: list[Outcome]) -> None:
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    config = parse(ExperimentConfig, own, "python -m llmdpd.experiment", description=_DESCRIPTION)
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(config).items() if name in names}
    plan = make_plan(Settings(**given, options=tuple(options)))
    if config.dry_run:
        _show_plan(plan, config)
        return
    with process_lock(plan.out / ".lock", lambda holder: _refuse(plan.out, holder)), StopSignals() as stop:
        failed += _run(plan, config, words, stop)


def _refuse(out: Path, holder: int | None) -> None:
    raise InputError(
        "another process is at work in this folder",
        path=out,
        found="a live process" if holder is None else f"process {holder}",
        hint="wait for it, stop it (Ctrl-C: its runs save), or choose another --out",
    )


def _run(plan: Plan, config: ExperimentConfig, words: Sequence[str], stop: StopSignals) -> list[Outcome]:
    """Run what is missing and write the page; the cells that failed."""
    # Every folder is looked at first: one that is not the cell's stops the command before hours of work.
    missing = [cell for cell in plan.runnable if cell.state != "done"]
    parts = shares(config.jobs, config.device, len(missing))
    _show_skipped(plan)
    console.print(
        f"{len(missing)} of {len(plan.runnable)} runs to do, {len(parts)} at once; logs in {plan.out / 'logs'}"
    )
    outcomes: list[Outcome] = []
    command = ("python", "-m", "llmdpd.experiment", *words)
    scheduler = Scheduler(missing, parts, plan.out / "logs", stop)
    try:
        outcomes = scheduler.execute()
    finally:
        console.print(f"page: {write_page(plan, scheduler.outcomes, command)}")
    failed = [outcome for outcome in outcomes if outcome.failed_step]
    for outcome in failed:
        error_console.print(f"{outcome.cell.name} {outcome.words}; the end of its log:", style="bold red", markup=False)
        error_console.print(outcome.log_tail, markup=False)
    return failed


def _show_skipped(plan: Plan) -> None:
    for key in plan.chosen:
        if key in plan.skipped:
            console.print(f"skipped: {key}: {plan.skipped[key]}", markup=False)


def _show_plan(plan: Plan, config: ExperimentConfig) -> None:
    """The cells, their state, and about how long each takes where a finished run tells."""
    cells = [cell for key in plan.chosen for cell in plan.cells[key]]
    missing = [cell for cell in plan.runnable if cell.state != "done"]
    parts = shares(config.jobs, config.device, len(missing))
    known = [cell for group in plan.cells.values() for cell in group]
    left = {cell.name: seconds_left(cell, known) for cell in missing}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("run", "state", "about"):
        table.add_column(column, no_wrap=True, justify="right" if column == "about" else "left")
    for cell in cells:
        state = "skipped" if cell.method in plan.skipped else cell.state
        seconds = left.get(cell.name)
        about = _duration(seconds) if seconds is not None else "not known" if cell.name in left else ""
        table.add_row(cell.name, state, about)
    console.print(table)
    _show_skipped(plan)
    total = sum(seconds or 0.0 for seconds in left.values()) / len(parts)
    unknown = " and those not known, of which no run has finished yet" if None in left.values() else ""
    console.print(f"{len(missing)} runs to do, {len(parts)} at once: about {_duration(total)}{unknown}")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
