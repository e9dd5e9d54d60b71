"""What the commands print: paths as they are, whatever characters they have, on terminals of any encoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmdpd.__main__ import main as llmdpd
from llmdpd.cli.collect import main as collect
from llmdpd.cli.evaluate import main as evaluate
from llmdpd.cli.report import main as report

Capture = pytest.CaptureFixture[str]
ODD = pytest.mark.parametrize("name", ["sweep[a]", "x[/tmp]", ":x:", "lr=[1e-3,3e-4]", "größe – 50 %"])


@ODD
def test_a_run_in_a_folder_of_any_name(
    name: str, tmp_path: Path, straight_run: Path, train: Callable[..., int], capsys: Capture
) -> None:
    run = tmp_path / name
    shutil.copytree(straight_run, run)
    assert train("--resume", run) == 0
    out = capsys.readouterr().out
    for line in (f"run folder: {run}", f"results: {run}/results.json", f"report: {run}/report.html"):
        assert line in out.splitlines()
    words = ["--checkpoint", "last", "--episodes", "1", "--workers", "1", "--threads", "1"]
    assert evaluate([str(run), *words, "--out", str(run / "other.json")]) == 0
    assert f"results: {run}/other.json" in capsys.readouterr().out
    assert report([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert train("--resume", run / "[nowhere]") == 2
    assert f"{run}/[nowhere]" in capsys.readouterr().err


@ODD
def test_a_collection_in_a_folder_of_any_name(name: str, tmp_path: Path, capsys: Capture) -> None:
    words = ["--tasks", "reach", "--episodes", "1", "--max-steps", "3", "--workers", "1"]
    assert collect(["--out", str(tmp_path / name), *words]) == 0
    assert f"{tmp_path / name}: 1 episodes" in capsys.readouterr().out
    assert collect(["--out", str(tmp_path / name), *words, "--seed", "1"]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


LONG = "a" * 300


@pytest.mark.parametrize(
    "line",
    [
        *("collect --tasks reach --episodes 1 --out .", "collect --tasks reach --episodes 1 --out .."),
        *("collect --tasks reach --episodes 1 --out /", "collect --tasks reach --episodes 1 --out FILE/x"),
        *("collect --policy sac --tasks hopper --out FILE/x", f"collect --tasks reach --episodes 1 --out {LONG}"),
        *("train --preset smoke --run-dir FILE/x", f"train --preset smoke --run-dir {LONG}"),
        *("evaluate FILE/x", f"evaluate {LONG}", "report FILE/x", f"report {LONG}", f"tasks check {LONG}"),
        *("experiment table1 --out FILE", "experiment table1 --out FILE/x", f"experiment table1 --out {LONG}"),
        *("pretrain --corpus FILE --out FILE/x", f"pretrain --corpus FILE --out {LONG}"),
        *("tasks check FILE/x", "tasks check .", "collect --tasks x[/b]", "collect --episodes x[/b]"),
        *("collect --out a\0b", "train --run-dir a\0b", "report a\0b", "experiment table1 --out a\0b"),
        *("evaluate a\udcffb", "tasks check a\0b", "pretrain --corpus a\0b --out x"),
    ],
)
def test_places_that_cannot_be(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("some text\n")
    assert llmdpd(line.split(" ")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err + said.out
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
