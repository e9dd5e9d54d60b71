"""What a terminal, and what a log, is told of an experiment's cells."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from llmdpd.experiments import table
from llmdpd.experiments.table import LiveTable, Row, State

STATE = State(
    failed=(Row("bad[0]", "failed (train)", 3, 20),),
    running=(Row("good", "train", 5, 20, 75.0, "train: 5 of 20"),),
    waiting=(Row("later", "waiting", 0, 20, 100.0),),
    done=("first",),
    seconds_left=175.0,
)


def test_a_terminal_gets_all_cells_what_failed_first() -> None:
    stream = io.StringIO()
    with LiveTable(lambda: STATE, Console(file=stream, force_terminal=True, width=140, markup=False)):
        pass
    lines = [line.split() for line in stream.getvalue().splitlines()]
    order = [line[0] for line in lines if line and line[0] in ("bad[0]", "good", "later", "first")]
    assert list(dict.fromkeys(order)) == ["bad[0]", "good", "later", "first"]
    text = stream.getvalue()
    for words in ("failed (train)", "3 of 20", "about 1 min 15 s", "train: 5 of 20"):
        assert words in text
    assert "1 done, 1 failed, 1 running, 1 waiting; about 2 min 55 s left" in text


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(table, "time", SimpleNamespace(monotonic=lambda: now))
    stream = io.StringIO()
    with LiveTable(lambda: STATE, Console(file=stream, width=300)) as shown:
        for _ in range(20):
            shown.update()
            now += 1.0
    line = "cells: 1 done, 1 failed, 1 running, 1 waiting; about 2 min 55 s left; good train 5 of 20 train: 5 of 20"
    assert stream.getvalue().splitlines() == [line, line]
    ended = State(STATE.failed, (), (), ("first",), 0.0)
    assert str(ended) == "1 done, 1 failed, 0 running, 0 waiting"
