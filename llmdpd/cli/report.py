"""`python -m llmdpd.report RUN [RUN...]`: one self-contained HTML page about one run, or comparing several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from llmdpd.cli.common import run_command
from llmdpd.reporting.page import build_report
from llmdpd.utils.command_line import parse


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Write one self-contained HTML page about one run, or comparing several.

    Args:
        runs: Run folders, as python -m llmdpd.train writes them. Those that differ by the seed alone are averaged.
        out: The page's file. Default: report.html in the run's folder; for several runs comparison.html beside them.
    """
    return build_report(runs, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, 2 for an input that cannot be used."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: print(parse(report, words, "python -m llmdpd.report")))
