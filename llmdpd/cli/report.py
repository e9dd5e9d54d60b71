"""`python -m llmdpd.report RUN [RUN...]`: one self-contained HTML page about one run, or comparing several."""

from __future__ import annotations

from pathlib import Path

from llmdpd.cli.common import command
from llmdpd.reporting.page import build_report
from llmdpd.utils.command_line import parse
from llmdpd.utils.extras import extra

with extra("cli"):
    import tyro


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Write one self-contained HTML page about one run, or comparing several.

    Args:
        runs: Run folders, as python -m llmdpd.train writes them. Those that differ by the seed alone are averaged.
        out: The page's file. Default: report.html in the run's folder; for several runs comparison.html beside them.
    """
    return build_report(runs, out)


main = command(lambda words: print(parse(report, words, "python -m llmdpd.report")))
