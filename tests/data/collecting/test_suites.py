"""Collecting with demonstrators, of a suite that no package has: nothing in collecting is Meta-World's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from llmdpd.cli.collect import main
from llmdpd.data import load_dataset
from llmdpd.data.collecting.scripted import CollectConfig, collect_scripted, folder_of, resolve_tasks
from llmdpd.errors import InputError
from llmdpd.tasks import SUITES

SUITE = '''
from functools import partial

import numpy as np

from llmdpd.tasks.base import TaskSpec, TaskSuite
from llmdpd.tasks.behaviours import KINDS, Behaviour
from llmdpd.tasks.demonstrators import demonstrate


class Line:
    """A place on a line that has to go to one end, within 8 steps."""

    def __init__(self, end):
        self.end = end

    def reset(self, seed):
        self.place, self.steps = np.random.default_rng(seed).uniform(-1, 1, 2).astype(np.float32), 0
        return self.place.copy()

    def step(self, action):
        self.steps += 1
        self.place[0] += np.clip(action[0], -1, 1)
        return self.place.copy(), 0.0, bool(self.end * self.place[0] > 2), self.steps == 8


class Demonstrator:
    def __init__(self, end):
        self.line = Line(end)

    def episode(self, request):
        behaviour = Behaviour(request.behaviour, np.random.default_rng(request.noise_seed), grip=1)
        expert = lambda observation: np.array([self.line.end * 0.5, 0.0], np.float32)
        return demonstrate(self.line, expert, behaviour, request)


class Lines(TaskSuite):
    name = "Lines"
    tasks = ("line-left", "line-right")
    groups = {"lines": tasks}
    behaviours = {"clean": KINDS["clean"][1], "gaussian": KINDS["gaussian"][1]}
    collector = "scripted"

    def knows(self, task):
        return task in self.tasks

    def spec(self, task):
        return TaskSpec(task, 2, 2, 8, self.name)

    def demonstrator(self, task, *, goal_visible):
        return Demonstrator(-1 if task == "line-left" else 1)


LINES = Lines()
'''
ENTRY = "[llmdpd.suites]\nlines = llmdpd_lines:LINES\n"


@pytest.fixture(autouse=True)
def lines(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the suite, which worker processes find as well."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "llmdpd_lines.py").write_text(SUITE)
    (folder / "llmdpd_lines-1.dist-info").mkdir()
    (folder / "llmdpd_lines-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llmdpd-lines\nVersion: 1\n"
    )
    (folder / "llmdpd_lines-1.dist-info" / "entry_points.txt").write_text(ENTRY)
    monkeypatch.syspath_prepend(str(folder))
    for cached in ("_points", "_loaded"):
        monkeypatch.setattr(SUITES, cached, dict(getattr(SUITES, cached)))
    SUITES.__dict__.pop("_points")
    sys.modules.pop("llmdpd_lines", None)
    monkeypatch.setattr(SUITES, "version", -1 - SUITES.version)


def test_a_suite_with_demonstrators_is_collected(tmp_path: Path, fresh_seed: int) -> None:
    config = CollectConfig(
        ("lines",), 3, "clean,gaussian", tmp_path / "out", fresh_seed, workers=2, post_success_steps=0
    )
    collected = collect_scripted(config)
    data = collected.dataset
    assert data.tasks == ("line-left", "line-right")
    assert data.texts == tuple(f"Lines {task}." for task in data.tasks)
    assert data.behaviours == ("clean", "gaussian", "clean") * 2
    clean = np.array(data.behaviours) == "clean"
    assert (data.successes[clean] == 1).all()
    assert data.lengths.max() <= 8
    assert [path.name for path in tmp_path.glob("out/*") if path.is_dir()] == ["lines"]
    assert collect_scripted(config).content == collected.content
    assert load_dataset(tmp_path / "out").num_episodes == 6


def test_the_command_takes_any_suites_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--tasks", "line-left", "--episodes", "2", "--noise", "clean", "--workers", "1"]) == 0
    assert "line-left" in capsys.readouterr().out
    assert load_dataset(tmp_path / "data" / "lines").num_episodes == 2
    assert folder_of(CollectConfig(("reach",))) == Path("data/metaworld")


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"noise": "clean,slow"}, "noise", "unknown behaviour"),
        ({"max_steps": 9}, "max_steps", "out of range"),
        ({"tasks": ("line-left", "reach")}, "tasks", "one policy cannot serve"),
        ({"tasks": ("hopper",)}, "tasks", "has no scripted experts"),
        ({"tasks": ("line-lft",)}, "task", "unknown task"),
    ],
)
def test_what_a_suite_does_not_have_is_refused(changes: dict[str, object], field: str, problem: str) -> None:
    settings = {"tasks": ("line-left",), "noise": "clean", **changes}
    with pytest.raises(InputError, match=problem) as caught:
        collect_scripted(CollectConfig(**settings))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_groups_are_the_suites_own() -> None:
    assert resolve_tasks(("lines",)) == ("line-left", "line-right")
