"""`python -m llmdpd.evaluate RUN`: success of a run's policies, or of a baseline, with prompts of your choice."""

from __future__ import annotations

from llmdpd.cli.common import command, results_table
from llmdpd.errors import InputError
from llmdpd.runs.evaluate import evaluate
from llmdpd.runs.evaluate_options import RENAMED_OPTIONS, EvaluateConfig
from llmdpd.runs.folder import RunFolder
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.command_line import parse, renamed
from llmdpd.utils.progress import console


def _evaluate(words: list[str]) -> None:
    if any(word.partition("=")[0] == "--views" for word in words):
        hint = "version 0.1 was the last that had it"
        raise InputError("this option is gone", field="--views", found=" ".join(words), hint=hint)
    config = parse(EvaluateConfig, renamed(words, RENAMED_OPTIONS), "python -m llmdpd.evaluate")
    with StopSignals() as stop:
        records, out = evaluate(config, stop.check)
    report = None
    if config.run is not None and out == RunFolder(config.run).results:
        from llmdpd.reporting.page import build_report

        report = build_report([config.run])
    console.print(results_table(records))
    console.print(f"results: {out}")
    if report is not None:
        console.print(f"report: {report}")


main = command(_evaluate)
