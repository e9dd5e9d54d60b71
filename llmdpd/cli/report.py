"""`python -m llmdpd.report RUN [RUN...]`: one self-contained HTML page about one run, or comparing several."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from llmdpd.cli.common import run_command
from llmdpd.errors import InputError
from llmdpd.utils.files import atomic_write_text

# Films are the one part of a page that can be large; as text they take a third more.
FILM_BYTES = 6_000_000


def build_report(runs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the page of these run folders and return its path.

    One run: `out`, or report.html in its folder. Several: `out`, or comparison.html in the nearest folder that holds
    them all. Runs that differ by nothing but the seed are averaged. Raises `InputError` if no run is given, one is
    given twice, a folder or its results.json is missing, or results.json cannot be used; what else is missing is said
    in the page.
    """
    from llmdpd.reporting.page import render_page
    from llmdpd.reporting.run import read_run

    folders = [Path(run) for run in runs]
    if not folders:
        raise InputError("no run to report on", expected="one or more run folders")
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise InputError("the same run is given twice", path=folders[index])
    read = [read_run(folder, FILM_BYTES // len(folders)) for folder in folders]
    for run, folder in zip(read, folders, strict=True):
        if not run.records:
            raise InputError("the run has no results", path=folder / "results.json", field="records", found="[]")
    path = _default_path(resolved) if out is None else Path(out)
    if path.is_dir():
        raise InputError("the page cannot be written", path=path, found="a folder", expected="a file name")
    atomic_write_text(path, render_page(read))
    return path


def _default_path(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / "report.html"
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "comparison.html"


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Write one self-contained HTML page about one run, or comparing several.

    Args:
        runs: Run folders, as python -m llmdpd.train writes them. Those that differ by the seed alone are averaged.
        out: The page's file. Default: report.html in the run's folder; for several runs comparison.html beside them.
    """
    return build_report(runs, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, 2 for an input that cannot be used."""
    return run_command(lambda: print(tyro.cli(report, args=arguments, prog="python -m llmdpd.report")))


if __name__ == "__main__":
    sys.exit(main())
