"""A group of calls: who is measured, who gets a dash and why, ratios, shares, what is put out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import pytest
import torch
from common import Bench, Deadline, NotHere
from report import format_seconds, format_table, plot_report, print_report, write_report
from timing import QUICK, Budget, Call, Clock, Timing

from llmdpd.diffusion import BackendUnavailableError
from llmdpd.ops import native

CPU = torch.device("cpu")


def nothing() -> Call:
    return lambda: None


def failing(error: Exception, when_called: bool = False) -> Any:
    def call() -> None:
        raise error

    def make() -> Call:
        if when_called:
            return call
        raise error

    return make


@pytest.fixture
def set_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call named `eager` takes 4 s, `compile` 2 s, others 1 s."""

    def fake(calls: dict[str, Call], budget: Budget, clock: Clock, prepare: object) -> dict[str, Timing]:
        seconds = {"eager": 4.0, "compile": 2.0}
        return {name: Timing((seconds.get(name, 1.0),) * 5, 5) for name in calls}

    monkeypatch.setattr(common, "time_alternating", fake)
    monkeypatch.setattr(common.Limits, "measure", lambda self, windows=5: None)
    monkeypatch.setattr(
        common.Limits, "report", lambda self: {"fp32": {"flops_per_second": 100.0, "measured": [100.0], "how": "given"}}
    )


def test_ratios_speed_and_share(set_times: None) -> None:
    bench = Bench("some", CPU, QUICK, {})
    bench.group({"B": 3, "precision": "fp32"}, 50.0, dict.fromkeys(("eager", "compile", "ours"), nothing))
    bench.group({"B": 4, "precision": "fp32"}, 10.0, {"ours": nothing})
    rows = bench.report()["rows"]
    assert [row["against"] for row in rows[:3]] == [
        {"eager": 1.0, "compile": 0.5},
        {"eager": 2.0, "compile": 1.0},
        {"eager": 4.0, "compile": 2.0},
    ]
    assert [row["flops_per_second"] for row in rows] == [12.5, 25.0, 50.0, 10.0]
    assert [row["share"] for row in rows] == [0.125, 0.25, 0.5, 0.1]
    assert rows[3]["against"] == {}  # the peers of another case are not its peers
    assert [row["compile_seconds"] is not None for row in rows] == [False, True, False, False]


@pytest.mark.parametrize("when_called", [False, True])
@pytest.mark.parametrize("error", [BackendUnavailableError("no such thing here"), NotHere("no such thing here")])
def test_what_cannot_run_is_a_dash_with_its_reason(
    set_times: None, capsys: pytest.CaptureFixture[str], error: Exception, when_called: bool
) -> None:
    bench = Bench("some", CPU, QUICK, {})
    bench.group({"B": 3}, 50.0, {"eager": nothing, "cpp": failing(error, when_called)}, notes={"eager": "a note"})
    done = bench.report()
    row = done["rows"][1]
    assert (row["seconds"], row["share"], row["against"], row["failed"]) == (None, None, {}, False)
    print_report(done)
    said = capsys.readouterr().out
    assert "— cpp: no such thing here" in said
    assert "note, eager: a note" in said


def test_what_fails_is_named_and_takes_nobody_along(set_times: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench("some", CPU, QUICK, {})
    bench.group({"B": 3}, 50.0, {"cpp": failing(ZeroDivisionError("by 0")), "eager": nothing})
    arguments = type("Arguments", (), {"json": None, "plot": None})()
    assert common.finish(bench, arguments) == 1
    assert "FAILED cpp: ZeroDivisionError: by 0" in capsys.readouterr().out
    assert bench.rows[1]["seconds"] is not None


def test_a_busy_machine_is_named(
    set_times: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for share, warned in ((0.02, False), (0.4, True), (None, False)):
        monkeypatch.setattr(common.Others, "share", lambda self, value=share: value)
        bench = Bench("some", CPU, QUICK, {})
        bench.group({"B": 3}, 50.0, {"eager": nothing})
        print_report(bench.report())
        assert ("DON'T TRUST" in capsys.readouterr().out) == warned


def test_groups_that_would_not_end_in_time_are_left_out_and_named(
    set_times: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench("some", CPU, QUICK, {}, Deadline(30.0))
    bench.group({"B": 3}, 1.0, {"eager": nothing}, estimate=10.0)
    bench.group({"B": 4}, 1.0, {"eager": nothing}, estimate=60.0)
    done = bench.report()
    assert (len(done["rows"]), done["left_out"]) == (1, ["some: B 4"])
    print_report(done)
    assert "not started, the time was up: some: B 4" in capsys.readouterr().out


def test_report_is_json_with_device_versions_and_limits(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    bench = Bench("some", CPU, QUICK, {"threads": 1})
    bench.group({"B": 3, "precision": "fp32"}, 50.0, {"eager": nothing})
    write_report(tmp_path / "new" / "x.json", bench.report())
    read = json.loads((tmp_path / "new" / "x.json").read_text())
    assert {"format", "bench", "settings", "machine", "limits", "rows", "left_out"} == set(read)
    machine = read["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1
    assert machine["cpu"]
    assert {"version", "backends", "cpp"} <= set(machine["llmdpd"])
    assert read["limits"]["fp32"]["flops_per_second"] == max(read["limits"]["fp32"]["measured"]) > 0
    (row,) = read["rows"]
    assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"] <= row["seconds"]["p99"]
    assert row["share"] == pytest.approx(50.0 / row["seconds"]["median"] / read["limits"]["fp32"]["flops_per_second"])


def test_plot_is_a_picture_also_where_something_is_missing(set_times: None, tmp_path: Path) -> None:
    bench = Bench("some", CPU, QUICK, {})
    for B in (1, 10):
        makers = {"eager": nothing, "cpp": failing(NotHere("no"))}
        bench.group({"B": B, "precision": "fp32"}, 50.0, makers)
    bench.group({"B": 1, "precision": "bf16"}, 50.0, {"cpp": failing(NotHere("no"))})
    plot_report(tmp_path / "x.png", bench.report())
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_seconds_and_tables_are_readable() -> None:
    words = [format_seconds(s) for s in (1.2345, 0.0123, 0.00099996, 1.89e-5, 123.4)]
    assert words == ["1.23 s", "12.3 ms", "1000 µs", "18.9 µs", "123 s"]
    table = format_table(["name", "n"], [["a", "1"], ["bcd", "23"]]).splitlines()
    assert table == ["name   n", "----  --", "a      1", "bcd   23"]


def test_deadline_is_over_when_it_is_over() -> None:
    assert Deadline().allows(1e9)
    assert Deadline(10.0).allows(5.0)
    assert not Deadline(10.0).allows(20.0)
    assert Deadline(-1.0).left() < 0


def test_threads_go_to_whom_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn with its own; afterwards torch has those of the bench again."""
    torch.set_num_threads(2)
    seen: dict[str, set[tuple[int, int]]] = {"eager": set(), "ours": set()}

    def maker(name: str) -> Any:
        return lambda: lambda: seen[name].add((torch.get_num_threads(), native.threads()))

    try:
        bench = Bench("some", CPU, QUICK, {})
        makers = {name: maker(name) for name in seen}
        bench.group({"B": 3}, 50.0, makers, prepare=common.threads_for(makers, bench.threads))
        assert seen == {"eager": {(2, 2)}, "ours": {(1, 2)}}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
        native.set_threads(None)
