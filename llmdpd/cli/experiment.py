"""`python -m llmdpd.experiment NAME`: a table or figure of the paper, from its runs to a page of what came out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from llmdpd.cli.common import checked_words, run_command
from llmdpd.errors import InputError
from llmdpd.experiments.durations import Durations
from llmdpd.experiments.executors import Executor, LocalExecutor, Resources, make_executor
from llmdpd.experiments.grids import BUDGETS, GRIDS
from llmdpd.experiments.mirror import Mirror
from llmdpd.experiments.page import write_page
from llmdpd.experiments.plan import Plan, Settings, make_plan
from llmdpd.experiments.scheduler import Outcome, Scheduler
from llmdpd.reporting.page import measure
from llmdpd.runs.folder import folder_lock
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.command_line import parse
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import console, error_console

with extra("cli"):
    from rich.table import Table

_EXPERIMENTS = "\n".join(f"    {name:<16}{grid.title}" for name, grid in GRIDS.items())
_DESCRIPTION = f"""Run an experiment: train and evaluate what is missing, and make a page of it.

{_EXPERIMENTS}

Runs that are finished are not repeated, interrupted ones continue. Options of llmdpd.train for all of its runs, or for
the methods that have them, stand at the end, after --:  llmdpd.experiment table1 --seeds 1 -- --method.lr 1e-4
What the experiment itself decides, such as --seed and --preset, or a method that it compares, is refused there.

Budgets: {"; ".join(f"{name} ({budget})" for name, budget in BUDGETS.items())}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0, 1 where a run failed, 2 for bad input, 128 + signal when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    failed: list[Outcome] = []
    return run_command(lambda: _experiment(checked_words(words), failed)) or (1 if failed else 0)


def _experiment(words: list[str], failed: list[Outcome]) -> None:
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    settings = parse(Settings, own, "python -m llmdpd.experiment", description=_DESCRIPTION)
    plan = make_plan(dataclasses.replace(settings, options=tuple(options)))
    if settings.dry_run:
        _show_plan(plan)
        return
    hint = "wait for it, stop it (Ctrl-C: its runs save), or choose another --out"
    if plan.out.exists() and not plan.out.is_dir():
        raise InputError("the runs' folder is a file", path=plan.out, field="--out", expected="a folder")
    with folder_lock(plan.out, "in this folder", hint), StopSignals() as stop:
        failed += _run(plan, words, stop)


def _run(plan: Plan, words: Sequence[str], stop: StopSignals) -> list[Outcome]:
    """Run what is missing and write the page; the cells that failed."""
    mirror = None if plan.settings.mirror is None else Mirror(plan.settings.mirror)
    if mirror is not None:
        for cell in plan.runnable:
            mirror.fetch(cell.folder)
    # Every folder is looked at first: one that is not the cell's stops the command before hours of work.
    missing = [cell for cell in plan.runnable if cell.state != "done"]
    executor = _executor(plan)
    _show_skipped(plan)
    outcomes: list[Outcome] = []
    command = ("python", "-m", "llmdpd.experiment", *words)
    scheduler = Scheduler(missing, executor, plan.out / "logs", stop, _durations(plan), mirror)
    console.print(
        f"{len(missing)} of {len(plan.runnable)} runs to do, {scheduler.at_once} at once; logs in {plan.out / 'logs'}"
    )
    try:
        outcomes = scheduler.execute()
    finally:
        executor.close()
        console.print(f"page: {write_page(plan, scheduler.outcomes, command)}")
    failed = [outcome for outcome in outcomes if outcome.failed_step]
    for outcome in failed:
        error_console.print(f"{outcome.cell.name} {outcome.words}; the end of its log:", style="bold red")
        error_console.print(outcome.log_tail)
    return failed


def _executor(plan: Plan) -> Executor:
    settings = plan.settings
    return make_executor(settings.executor, Resources(settings.jobs, settings.threads, settings.device, settings.slurm))


def _durations(plan: Plan) -> Durations:
    return Durations(cell for group in plan.cells.values() for cell in group)


def _show_skipped(plan: Plan) -> None:
    for key in plan.chosen:
        if key in plan.skipped:
            console.print(f"skipped: {key}: {plan.skipped[key]}")


def _show_plan(plan: Plan) -> None:
    """The cells, their state, and about how long each takes where a finished run tells."""
    cells = [cell for key in plan.chosen for cell in plan.cells[key]]
    missing = [cell for cell in plan.runnable if cell.state != "done"]
    durations = _durations(plan)
    left = {cell.name: durations.left(cell) for cell in missing}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("run", "state", "about"):
        table.add_column(column, no_wrap=True, justify="right" if column == "about" else "left")
    for cell in cells:
        state = "skipped" if cell.method in plan.skipped else cell.state
        seconds = left.get(cell.name)
        about = measure("seconds", seconds) if seconds is not None else "not known" if cell.name in left else ""
        table.add_row(cell.name, state, about)
    console.print(table)
    _show_skipped(plan)
    # A cluster is not asked, only to look at a plan: it takes what it takes.
    settings = plan.settings
    local = settings.executor == LocalExecutor.name
    at_once = len(_executor(plan).shares(len(missing))) if local else settings.jobs or max(1, len(missing))
    total = measure("seconds", sum(seconds or 0.0 for seconds in left.values()) / at_once)
    unknown = " and those not known, of which no run has finished yet" if None in left.values() else ""
    console.print(f"{len(missing)} runs to do, {at_once} at once: about {total}{unknown}")
