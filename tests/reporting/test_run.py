"""Reading the metrics of a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from llmdpd.reporting.run import read_run

RunMaker = Callable[..., Path]


def test_a_resumed_runs_repeated_iterations_count_once_and_last(make_run: RunMaker) -> None:
    run = make_run()
    entries = [(1, 5.0), (2, 4.0), (3, 3.0), (2, 2.5), (3, 2.0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i, "loss/a": v}) + "\n" for i, v in entries))
    assert read_run(run, 0).curves == {"loss/a": [(1, 5.0), (2, 2.5), (3, 2.0)]}


def test_a_torn_line_and_values_that_are_no_numbers_are_left_out(make_run: RunMaker) -> None:
    run = make_run()
    lines = [
        '{"iteration": 1, "wall_seconds": 3, "a": 1, "b": NaN, "c": true, "d": "x", "e": [1], "f": Infinity}',
        '{"iteration": null, "a": 7}',
        '{"a": 9}',
        "[]",
        '{"iteration": 2, "a": 2}',
        '{"iteration": 3, "a',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    read = read_run(run, 0)
    assert read.curves == {"a": [(1, 1.0), (2, 2.0)]}
    assert [problem for problem in read.problems if "4 line(s)" in problem]
