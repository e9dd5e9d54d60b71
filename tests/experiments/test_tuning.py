"""Searching hyper-parameters: what is searched, by which tasks it is judged, going on, and the page."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmdpd.config.parse import parse_train
from llmdpd.errors import InputError, StopRequestedError
from llmdpd.experiments import tuning
from llmdpd.experiments.cell import Cell
from llmdpd.experiments.executors import Resources, make_executor
from llmdpd.experiments.scheduler import Outcome
from llmdpd.experiments.search_space import Dimension, read_dimension
from llmdpd.experiments.tuning import Study, TuneSettings, make_study, search
from llmdpd.training.stopping import StopSignals

Family = Callable[..., Path]
Finish = Callable[..., None]
LR = "method.lr=log:1e-5:1e-1"


def test_dimensions_are_read() -> None:
    assert read_dimension("--method.lr=log:1e-4:1e-2") == Dimension("method.lr", "log", 1e-4, 1e-2)
    assert read_dimension("a=float:-1:0.5") == Dimension("a", "float", -1.0, 0.5)
    assert read_dimension("a=int:2:8:3") == Dimension("a", "int", 2, 8, 3)
    assert read_dimension("a=x,y") == Dimension("a", "choice", choices=("x", "y"))
    wrong = ("a", "a=", "=log:1:2", "a=x", "a=x,", "a=cube:1:2", "a=log:1", "a=log:0:2", "a=float:2:1", "a=int:1:2.5")
    assert read_dimension("a=int:240:1000:240").ends == (240, 960)
    for words in (*wrong, "a=int:1:5:0", "a=float:1:2:3", "a=log:one:2", "a=float:0:inf", "a=float:-inf:0"):
        with pytest.raises(InputError) as caught:
            read_dimension(words)
        assert (caught.value.field, caught.value.found) == ("--search", words)


def settings(folder: Path, *dimensions: str, **changes: Any) -> TuneSettings:
    return TuneSettings(dimensions or (LR,), out=folder / "tune", data_root=folder / "data", **changes)


def test_a_search_is_judged_by_tasks_that_are_not_reported(tmp_path: Path) -> None:
    study = make_study(settings(tmp_path))
    design = tuning.PROTOCOLS["design"]
    config = study.config({"method.lr": 1e-3})
    assert (config.tasks.seen, config.tasks.unseen, study.judges) == (design.seen, design.unseen, design.unseen)
    assert not set(design.seen + design.unseen) & set(tuning.PROTOCOLS["ml45"].unseen)
    assert config.method.lr == 1e-3
    study = make_study(settings(tmp_path, hold_out=("reach", "push-v3")))
    assert {*study.config({"method.lr": 1e-3}).tasks.unseen} == {"reach-v3", "push-v3"}
    for hold_out in (("box-close",), ("reach", "no-such-task"), tuning.PROTOCOLS["ml45"].seen):
        with pytest.raises(InputError, match="judge"):
            make_study(settings(tmp_path, hold_out=hold_out))
    with pytest.raises(InputError, match="judge"):
        make_study(settings(tmp_path, preset="d4rl-hopper"))


def test_own_tasks_are_searched_from_their_own_preset(family: Family, tmp_path: Path) -> None:
    """As they are trained: that of Meta-World clones an expert whom recorded data do not hold."""
    file = family(("reach", "visit", "hover"))
    study = make_study(settings(tmp_path, tasks_file=file, hold_out=("visit",)))
    assert study.judges == ("visit",)
    trained = parse_train(("--tasks-file", str(file)))
    assert (study.preset, study.cells(0, {"method.lr": 1e-3})[0].preset) == (trained.preset, trained.preset)
    assert study.config({"method.lr": 1e-3}).method.clone == trained.method.clone == "executed"
    plain = make_study(settings(tmp_path, tasks_file=file, hold_out=("visit",), preset="tasks-plain"))
    assert plain.config({"method.lr": 1e-3}).preset == "tasks-plain"


@pytest.mark.parametrize(
    ("dimensions", "options"),
    [
        (("method.no-such=log:1:2",), ()),
        (("method.lr=x,y",), ()),
        (("method.batch-size=int:0:480:240",), ()),
        (("seed=int:0:3",), ()),
        (("tasks.seen=reach,push",), ()),
        ((LR, LR), ()),
        ((LR,), ("--lr", "1e-3")),
        ((LR,), ("--seed", "1")),
        ((LR,), ("--protocol", "ml45")),
        ((LR,), ("--tasks", "reach")),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(
    tmp_path: Path, dimensions: Sequence[str], options: Sequence[str]
) -> None:
    with pytest.raises(InputError):
        make_study(settings(tmp_path, *dimensions, options=tuple(options)))
    assert not (tmp_path / "tune").exists()


class Runs:
    """In the scheduler's place: finishes cells with a success that falls with the distance of lr to 1e-3."""

    def __init__(self, finish: Finish, *, stop_after: int | None = None, fails: Sequence[int] = ()) -> None:
        self.finish, self.left, self.fails = finish, stop_after, fails
        self.cells: list[Cell] = []
        self.at_once: list[int] = []

    def __call__(self, cells: Sequence[Cell], *_: object) -> Runs:
        self.batch = list(cells)
        self.at_once.append(len(self.batch))
        return self

    def execute(self) -> list[Outcome]:
        outcomes = []
        for cell in self.batch:
            if self.left == 0:
                raise StopRequestedError(2)
            self.left = None if self.left is None else self.left - 1
            self.cells.append(cell)
            if int(cell.method.removeprefix("trial-")) in self.fails:
                outcomes.append(Outcome(cell, failed_step="train", log_tail="broken"))
                continue
            good = max(0, 40 - int(4 * abs(1000 * cell.config.method.lr - 1)))
            self.finish(cell, {**dict.fromkeys(cell.config.tasks.unseen, good), "reach-v3": 40})
            outcomes.append(Outcome(cell))
        return outcomes


def run(study: Study, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(tuning, "Scheduler", runs)
    try:
        search(study, make_executor("local", Resources(1)), StopSignals(), ("llmdpd", "tune"))
    finally:
        page = json.loads((study.settings.out / "tune.json").read_text())
    return dict(page)


def test_trials_are_told_and_the_best_stands_first(
    tmp_path: Path, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    study = make_study(settings(tmp_path, trials=6, seeds=2, jobs=2))
    runs = Runs(finish, fails=(3,))
    page = run(study, runs, monkeypatch)
    assert runs.at_once == [4, 4, 4], "two trials of two seeds"
    assert [cell.config.seed for cell in runs.cells[:2]] == [0, 1]
    values = [trial["value"] for trial in page["trials"]]
    assert page["finished"] == 5
    assert values[-1] is None
    assert values[:-1] == sorted(values[:-1], reverse=True)
    best = page["trials"][0]
    expected = max(0, 40 - int(4 * abs(1000 * best["values"]["method.lr"] - 1))) / 40
    assert best["value"] == pytest.approx(expected), "seen tasks do not count"
    text = (tmp_path / "tune" / "tune.md").read_text()
    assert "5 finished trials of 6" in text
    assert "| 3 | fail |" in text


def test_a_stopped_search_goes_on_where_it_was(tmp_path: Path, finish: Finish, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    study = make_study(settings(tmp_path, trials=3))
    with pytest.raises(StopRequestedError):
        run(study, Runs(finish, stop_after=1), monkeypatch)
    assert "| 1 | stopped |" in (tmp_path / "tune" / "tune.md").read_text()
    before = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert sorted(trial["state"] for trial in before["trials"]) == ["complete", "running"]
    runs = Runs(finish)
    page = run(study, runs, monkeypatch)
    assert [cell.method for cell in runs.cells] == ["trial-0001", "trial-0002"]
    unfinished = next(trial for trial in before["trials"] if trial["state"] == "running")
    assert runs.cells[0].config.method.lr == unfinished["values"]["method.lr"]
    assert page["finished"] == 3
    more = dataclasses.replace(study, settings=dataclasses.replace(study.settings, trials=4))
    assert run(more, Runs(finish), monkeypatch)["finished"] == 4
    other = make_study(settings(tmp_path, "method.lr=log:1e-5:1e-2", trials=9))
    with pytest.raises(InputError, match="another search"):
        search(other, make_executor("local", Resources(1)), StopSignals(), ())


def test_a_search_whose_trials_all_failed_is_no_success(
    tmp_path: Path, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    study = make_study(settings(tmp_path, trials=2))
    assert run(study, Runs(finish, fails=(0, 1)), monkeypatch)["finished"] == 0
    with pytest.raises(InputError, match="every trial") as caught:
        run(study, Runs(finish), monkeypatch)
    assert "--trials" in str(caught.value)
    more = dataclasses.replace(study, settings=dataclasses.replace(study.settings, trials=3))
    assert run(more, Runs(finish), monkeypatch)["finished"] == 1


def test_a_missing_optuna_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"llmdpd\[tune\]"):
        search(make_study(settings(tmp_path)), make_executor("local", Resources(1)), StopSignals(), ())


def test_a_continued_search_tries_other_values(tmp_path: Path, finish: Finish, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    for trials in (3, 6):
        page = run(make_study(settings(tmp_path, trials=trials)), Runs(finish), monkeypatch)
    assert len({trial["values"]["method.lr"] for trial in page["trials"]}) == 6


def test_a_trial_without_all_its_values_is_left(
    tmp_path: Path, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves one between two of its values."""
    pytest.importorskip("optuna")
    study = make_study(settings(tmp_path, LR, "method.weight-decay=float:0:0.1", trials=1))
    asked = Dimension.suggest

    def killed(self: Dimension, trial: Any) -> Any:
        if self.kind == "float":
            raise KeyboardInterrupt
        return asked(self, trial)

    with monkeypatch.context() as patch:
        patch.setattr(Dimension, "suggest", killed)
        with pytest.raises(KeyboardInterrupt):
            run(study, Runs(finish), monkeypatch)
    page = run(study, Runs(finish), monkeypatch)
    assert sorted(trial["state"] for trial in page["trials"]) == ["complete", "pruned"]


def test_tasks_that_tell_no_success_cannot_judge(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no success is measured"):
        make_study(settings(tmp_path, options=("--evaluation", "none")))
