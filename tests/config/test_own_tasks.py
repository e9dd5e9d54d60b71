"""A task file on the command line: its tasks, its preset, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdpd.config.parse import parse_train
from llmdpd.config.presets import PRESETS
from llmdpd.data import save_minari
from llmdpd.data.task_file import load_own_data, use_task_file
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.tasks.specs import find_suite, suite_of

Family = Callable[..., Path]
THREE = ("reach", "visit", "hover")


def test_a_file_decides_tasks_and_preset(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path = family(THREE)
    monkeypatch.chdir(path.parent)
    for words in (["--tasks-file", "tasks.toml"], ["--tasks.file=tasks.toml"], ["--tasks_file", str(path)]):
        config = parse_train(words)
        assert (config.preset, config.method) == ("tasks", PRESETS["tasks"].method)
        assert (config.tasks.protocol, config.tasks.file) == ("tasks", str(path))
        assert (config.tasks.seen, config.tasks.unseen) == (("reach", "visit"), ("hover",))
    other = parse_train(["--tasks-file", "tasks.toml", "--tasks.seen", "hover", "--tasks.unseen", "reach"])
    assert (other.tasks.seen, other.tasks.unseen) == (("hover",), ("reach",))
    words = ["--tasks-file", "tasks.toml", "--preset", "metaworld", "--method.clone", "executed"]
    with pytest.raises(InputError, match="can be tracked") as error:
        parse_train(words)
    assert error.value.field == "method.acting.track_after"
    named = parse_train([*words, "--method.acting.track-after", "0"])
    assert (named.preset, named.tasks) == ("metaworld", config.tasks)


def test_without_a_layout_observations_are_plain_numbers_and_a_line_says_so(
    family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    path = family(THREE, layout=False)
    for words in ([], ["--preset", "tasks"]):
        config: Any = parse_train(["--tasks-file", str(path), *words])
        assert config.preset == "tasks-plain"
        assert config.method.network.context.features == "normalised"
        assert not config.method.augmentation.active
        assert "A layout would help" in capsys.readouterr().err


def test_a_layout_that_does_not_say_how_to_turn_scenes_is_not_turned(
    family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    path = family(THREE)
    path.write_text(path.read_text().replace('up = "z"\n', ""))
    config: Any = parse_train(["--tasks-file", str(path)])
    augmentation = config.method.augmentation
    assert (augmentation.rotate, augmentation.mirror) == (0, 0) != augmentation.offset
    assert config.method.network.context.features == "relative"
    assert "layout.up" in capsys.readouterr().err


def test_every_method_learns_a_files_tasks(family: Family) -> None:
    for layout in (True, False):
        path = family(THREE, layout=layout)
        for method in METHODS:
            config = parse_train(["--tasks-file", str(path), "--method", method])
            assert (config.method.name, config.tasks.seen) == (method, ("reach", "visit"))


def test_limits_of_steps_are_each_tasks_own(family: Family) -> None:
    path = family(THREE, extra={"reach": "max_steps = 20"})
    assert parse_train(["--tasks-file", str(path)]).evaluation.max_steps is None
    with pytest.raises(InputError, match="1 to 20"):
        parse_train(["--tasks-file", str(path), "--evaluation.max-steps", "30"])


@pytest.mark.parametrize(
    ("words", "field", "message"),
    [
        (["--protocol", "ml45"], "--protocol", "two splits"),
        (["--tasks.file", "other.toml"], "--tasks-file", "two task files"),
        (["--tasks.seen", "reech"], "task", "nearest: reach"),
        (["--tasks.seen", "push"], "tasks", "one policy cannot serve"),
        (["--tasks.no-goal-visible"], "tasks.goal_visible", "cannot be hidden"),
    ],
)
def test_what_does_not_go_with_a_file(family: Family, words: list[str], field: str, message: str) -> None:
    path = family(THREE)
    with pytest.raises(InputError, match=message) as error:
        parse_train(["--tasks-file", str(path), *words])
    assert error.value.field == field


def test_the_preset_is_for_a_file() -> None:
    for name in ("tasks", "tasks-plain"):
        with pytest.raises(InputError, match="--tasks-file") as error:
            parse_train(["--preset", name])
        assert error.value.field == "--preset"


def test_a_file_without_a_seen_task(family: Family) -> None:
    with pytest.raises(InputError, match="no task to train on"):
        parse_train(["--tasks-file", str(family(("hover",)))])


def test_tasks_without_environment_are_not_rolled_out(family: Family) -> None:
    words = ["--tasks-file", str(family(THREE, env=False, suite=""))]
    assert parse_train(words).evaluation_mode == "offline"
    with pytest.raises(InputError, match="no environment"):
        parse_train([*words, "--evaluation.mode", "rollout"])


def test_tasks_of_other_bounds_are_not_one_policys(family: Family) -> None:
    path = family(("reach", "visit"))
    text = path.read_text().replace('task = "visit"', 'task = "visit", strength = 2.0')
    path.write_text(text)
    with pytest.raises(InputError, match="the same bounds"):
        parse_train(["--tasks-file", str(path)])
    assert suite_of("reach").tasks == ("reach", "visit")


def test_a_file_that_a_command_does_not_name_is_not_in_use(family: Family) -> None:
    path = family(("reach", "visit"), unseen=())
    config = parse_train(["--tasks-file", str(path)])
    assert config.tasks.seen == ("reach", "visit")
    assert find_suite("visit") is not None
    other = parse_train(["--tasks.seen", "reach", "--tasks.unseen"])
    assert (other.tasks.seen, find_suite("visit")) == (("reach-v3",), None)
    assert config.resolved() == config
    assert find_suite("visit") is not None
    assert other.resolved() == other
    assert find_suite("visit") is None


def test_a_misspelled_success_is_refused_before_the_run(family: Family) -> None:
    words = ["--tasks-file", str(family(("reach",), suite='success = "is_succes"'))]
    with pytest.raises(InputError, match="nearest: is_success"):
        parse_train(words)
    assert parse_train([*words, "--evaluation", "none"]).evaluation_mode == "none"


def test_given_data_are_for_tasks_that_have_none(family: Family, tmp_path: Path) -> None:
    path = family(("reach", "visit"), unseen=(), env=False, suite="")
    data = load_own_data(use_task_file(path), ["reach", "visit"])
    save_minari(data, tmp_path / "given", namespace="mine")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("data")))
    with pytest.raises(InputError, match="neither environment nor data"):
        parse_train(["--tasks-file", str(path)])
    config = parse_train(["--tasks-file", str(path), "--data", str(tmp_path / "given")])
    assert config.tasks.seen == ("reach", "visit")
    assert config.evaluation_mode == "offline"
