"""`llmdpd tasks check`: what is understood of a file, in words and as a picture, and all that is wrong with it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import imageio.v3 as imageio
import numpy as np
import pytest

from llmdpd.cli.data import main as convert
from llmdpd.cli.tasks import main
from llmdpd.config.parse import parse_train
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.reporting.task_picture import save_task_picture
from llmdpd.tasks.layout import Layout, Point

Family = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
THREE = ("reach", "visit", "hover")


def check(*words: object) -> int:
    return main(["check", *map(str, words)])


def test_what_is_understood_is_said_and_drawn(family: Family, capsys: Capture) -> None:
    path = family(THREE, episodes=5, keyed=True)
    assert check(path) == 0
    shown = capsys.readouterr().out
    for name, split in zip(THREE, ("seen", "seen", "unseen"), strict=True):
        (row,) = [line.split() for line in shown.splitlines() if line.split()[:2] == [name, split]]
        assert row[2:6] == ["13", "4", "70", "5"]
        assert row[7:] == ["5", "file"]
    assert "reach (tabletop:make): Task: Move the hand to the goal." in shown
    assert "bounds of actions: -1 … 1, -1 … 1, -1 … 1, -1 … 1" in shown
    assert "never change: 3, 6, 9" in shown
    assert all(len(line) <= 110 for line in shown.splitlines() if "tests" not in line and "/" not in line)
    picture = imageio.imread(path.with_name("tasks.png"))
    assert picture.shape[0] > picture.shape[1] / 3
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_data_in_shards_say_the_same(family: Family, capsys: Capture) -> None:
    path = family(THREE, episodes=5, keyed=True)
    assert check(path) == 0
    said = capsys.readouterr().out
    text = path.read_text()
    for place in re.findall(r'data = "(.*?)"', text):
        out = path.parent / f"shards-{Path(place).parent.name}"
        keys = ["--observation", "observation", "desired_goal", "--success", "is_success"]
        assert convert(["convert", str(path.parent / place), str(out), *keys]) == 0
        text = text.replace(f'"{place}"', f'"{out.name}"')
    path.write_text(text)
    capsys.readouterr()
    assert check(path) == 0
    assert capsys.readouterr().out == said


def test_what_deserves_a_look(family: Family, capsys: Capture, tmp_path: Path) -> None:
    order = 'observation = ["desired_goal", "observation"]'
    path = family(THREE, layout=False, suite="", extra={"reach": f"max_steps = 3\n{order}"})
    text = path.read_text().replace('split = "seen"', 'split = "unseen"')
    path.write_text(text.replace("keyed = false", "keyed = true, strength = 0.25", 1))
    assert check(path, "--out", tmp_path / "picture.png") == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "no [suite.layout]" in shown
    assert 'success = "is_success" would read it' in shown
    assert "no task is seen" in shown
    assert "the environment starts where the data never are, in the numbers" in shown
    assert "are beyond the bounds" in shown
    assert "and the environment ends at 3" in shown
    assert (tmp_path / "picture.png").is_file()
    path.write_text(path.read_text().replace(order, ""))
    assert check(path) == 2
    said = capsys.readouterr()
    assert "a Dict observation is read whole, in Gymnasium's order: achieved_goal, desired_goal, " in said.out
    assert "16 numbers a step" in said.err


def test_a_success_that_is_none(family: Family, capsys: Capture) -> None:
    """A misspelled key, and one that is true from the first step on: both would be noticed after the training."""
    assert check(family(("reach",), episodes=3, suite='success = "is_succes"')) == 2
    assert "nearest: is_success" in capsys.readouterr().err
    path = family(("reach",), episodes=3)
    with h5py.File(next(path.parent.glob("demos/**/*.hdf5")), "r+") as file:
        for episode in file.values():
            episode["infos/is_success"][:] = True
    assert check(path) == 0
    assert "every recorded episode succeeds with its first step" in " ".join(capsys.readouterr().out.split())


def test_every_wrong_task_is_told_and_the_others_are_shown(family: Family, capsys: Capture) -> None:
    path = family(THREE)
    text = (
        path.read_text()
        .replace('text = "Task: Move the hand to the goal."', "")
        .replace("visit/expert", "absent/expert")
    )
    path.write_text(text)
    assert check(path) == 2
    said = capsys.readouterr()
    whole = " ".join((said.out + said.err).split())
    assert "tasks.reach.text" in whole
    assert "tasks.visit.data" in whole
    assert [line for line in said.out.splitlines() if line.startswith("hover")]
    path.write_text("[suite")
    assert check(path) == 2
    assert "no TOML" in capsys.readouterr().err


def test_an_environment_that_fails_hides_no_other_task(family: Family, capsys: Capture) -> None:
    path = family(THREE)
    (path.parent / "broken.py").write_text(
        "from tabletop import *\nclass Env(Tabletop):\n    def step(self, action):\n        raise OSError('no arm')\n"
        "def make():\n    return Env('reach')\n"
    )
    path.write_text(
        re.sub('env = "tabletop:make"\nenv_kwargs.*', 'env = "broken:make"\nmax_steps = 9', path.read_text(), count=1)
    )
    assert check(path) == 2
    said = capsys.readouterr()
    assert "OSError: no arm (broken.py, line 4)" in " ".join(said.err.split())
    assert all(any(line.split()[:3] == [name, "seen", "13"] for line in said.out.splitlines()) for name in ("visit",))


def test_what_training_would_refuse_is_refused(family: Family, capsys: Capture) -> None:
    """Faults that no task has alone, and those of its data that only training would hold against its environment."""
    path = family(("reach", "visit"), unseen=())
    own = path.read_text()
    shared = own.replace("demos/tabletop/visit", "demos/tabletop/reach")
    for content, words in (
        (shared, "two tasks have the same data"),
        (own.replace("[tasks.visit]", "[tasks.visit]\nmax_steps = 3"), "longer than its task's"),
        (own.replace('task = "visit"', 'task = "visit", strength = 2.0'), "the same bounds"),
    ):
        path.write_text(content)
        assert check(path) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert words in said
        with pytest.raises(InputError, match=words):
            load_tasks(None, parse_train(["--tasks-file", str(path)]).tasks.all, True)


def test_a_picture_of_others_is_left_alone(family: Family, capsys: Capture, tmp_path: Path) -> None:
    path = family(("reach",), episodes=3)
    picture = path.with_suffix(".png")
    picture.write_bytes(b"mine")
    assert check(path) == 0
    assert picture.read_bytes() == b"mine"
    assert f"no picture: {picture} is there" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    for words in (["--out", picture], []):
        assert check(path, *words) == 0
        assert f"picture: {picture}" in capsys.readouterr().out
        assert picture.stat().st_size > 1000
    assert check(path, "--out", "/proc/x.png") == 2
    assert "the picture cannot be written" in capsys.readouterr().err


def test_without_an_environment_bounds_are_the_datas(family: Family, capsys: Capture) -> None:
    assert check(family(THREE, env=False, suite="")) == 0
    shown = capsys.readouterr().out
    assert "none are known; the data range over" in shown
    assert "reach (no environment)" in shown


def test_it_is_a_module_and_a_command() -> None:
    for words in (["-m", "llmdpd.tasks"], ["-m", "llmdpd", "tasks"]):
        done = subprocess.run([sys.executable, *words, "check", "absent.toml"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "file not found" in done.stderr
        assert "a task file" in done.stderr


def test_points_on_a_plane_and_absent_ones_are_drawn(tmp_path: Path, fresh_seed: int) -> None:
    layout = Layout((Point("a", (0, 1)), Point("b", (2, 3))), scalars=(4,))
    episode = np.random.default_rng(fresh_seed).normal(size=(9, 5)).astype(np.float32)
    episode[:, 2:4] = 0
    for name, drawn in (("with", layout), ("without", None)):
        save_task_picture(tmp_path / f"{name}.png", {"one": episode}, drawn)
        assert imageio.imread(tmp_path / f"{name}.png").size
