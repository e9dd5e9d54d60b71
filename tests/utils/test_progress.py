"""Progress: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from llmdpd.utils import progress
from llmdpd.utils.progress import ProgressBar


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    stream = io.StringIO()
    with ProgressBar("working", "episodes", Console(file=stream, force_terminal=True, width=160)) as bar:
        bar.update(2, 10)
        bar.update(7, 10, "going well")
    text = stream.getvalue()
    for words in ("working", "7/10", "episodes/s", "left:", "going well"):
        assert words in text


@pytest.mark.parametrize("words", ["sweep[a]", "x[/tmp]", "[bold]", ":x:"])
@pytest.mark.parametrize("terminal", [True, False])
def test_words_in_brackets_are_no_markup(words: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    for output in (progress.console, progress.error_console):
        monkeypatch.setattr(output, "_file", stream)  # `file` would be set to this test's stdout again
        monkeypatch.setattr(output, "_force_terminal", terminal)
        monkeypatch.setattr(output, "_width", 160)
        with ProgressBar(f"into runs/{words}", "steps", output) as bar:
            bar.update(1, 1, f"of data/{words}")
        output.print(f"done: out/{words}")
        table = Table(f"of {words}", box=None)
        table.add_row(f"row {words}")
        output.print(table)
    text = stream.getvalue()
    for wanted in ("into runs/", "of data/", "done: out/", "of ", "row "):
        assert text.count(f"{wanted}{words}") >= 2, wanted


def test_a_log_gets_a_line_now_and_then_with_the_rate_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with ProgressBar("working", "it", Console(file=stream, width=120)) as bar:
        for done in range(40, 61):
            bar.update(done, 60, f"{done * 100} steps")
            now += 1.0
    # The 40 found on the disk don't count for the rate of one a second.
    assert stream.getvalue().splitlines() == [
        "working: 55 of 60, 1.0 it/s, 5 s left; 5500 steps",
        "working: 60 of 60; 6000 steps",
    ]


def test_a_log_hears_of_the_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with ProgressBar("working", "it", Console(file=stream, width=120)) as bar:
        bar.update(3, 3)
    assert stream.getvalue() == "working: 3 of 3\n"
