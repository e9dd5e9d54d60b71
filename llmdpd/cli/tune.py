"""`llmdpd tune --search OPTION=VALUES …`: search hyper-parameters on tasks that nothing is reported on."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from llmdpd.cli.common import checked_words, run_command
from llmdpd.experiments.executors import Resources, make_executor
from llmdpd.experiments.scheduler import Outcome
from llmdpd.experiments.tuning import TuneSettings, make_study, search
from llmdpd.runs.folder import folder_lock
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.command_line import parse
from llmdpd.utils.progress import error_console

_DESCRIPTION = """Search hyper-parameters by Optuna: each trial is a run, judged by tasks that it was not trained on and
that no result is reported on (of Meta-World the protocol design).

The same command goes on with a search that was stopped, and with more --trials after its end. Options of llmdpd train
for all trials stand at the end, after --:  llmdpd tune --search method.lr=log:1e-4:1e-2 -- --iterations 2000"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0, 1 where a run failed, 2 for bad input, 128 + signal when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    failed: list[Outcome] = []
    return run_command(lambda: _tune(checked_words(words), failed)) or (1 if failed else 0)


def _tune(words: list[str], failed: list[Outcome]) -> None:
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    settings = parse(TuneSettings, own, "llmdpd tune", description=_DESCRIPTION)
    study = make_study(dataclasses.replace(settings, options=tuple(options)))
    settings = study.settings
    hint = "wait for it, stop it (Ctrl-C: its runs save), or choose another --out"
    with folder_lock(settings.out, "in this folder", hint), StopSignals() as stop:
        resources = Resources(settings.jobs, settings.threads, settings.device, settings.slurm)
        executor = make_executor(settings.executor, resources)
        try:
            failed += search(study, executor, stop, ("llmdpd", "tune", *words))
        finally:
            executor.close()
    for outcome in failed:
        error_console.print(f"{outcome.cell.name} {outcome.words}; the end of its log:", style="bold red")
        error_console.print(outcome.log_tail)
