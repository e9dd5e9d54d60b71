"""A task file is read as it says, and whatever is wrong in it is named: file, table, key, found and expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmdpd.data import is_named
from llmdpd.errors import InputError
from llmdpd.tasks.layout import Point
from llmdpd.tasks.user.file import Success, read_task_file
from llmdpd.tasks.user.suite import UserSuite

WHOLE = """
[suite]
observation = ["observation", "desired_goal"]
success = "is_success"
max_steps = 50
[suite.layout]
points = { cube = [3, 4, 5], hand = [0, 1, 2], goal = [10, 11, 12] }
body = "hand"
goal = "goal"
gripper = [9]
scalars = [6]
previous = { hand = [20, 21, 22] }
action = { move = [0, 1, 2], gripper = [3] }
up = "z"
unit = 0.01
pivot = [0, 0.5, 0]
[tasks.push]
env = "FetchPush-v4"
env_kwargs = { reward_type = "dense" }
data = ["demos/push", "minari:fetch/push-v0"]
data_task = "FetchPush"
data_part = "train"
action = "actions_abs"
terminates = false
text = "Task: push it."
[tasks.pour]
data = "/logs/pour"
text_file = "texts/pour.txt"
split = "unseen"
max_steps = 200
success = { return = 3 }
"""


def write(folder: Path, content: str) -> Path:
    path = folder / "tasks.toml"
    path.write_text(content)
    return path


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "pour.txt").write_text("Task: pour it.")
    file = read_task_file(write(tmp_path, WHOLE), is_named)
    push, pour = file.tasks["push"], file.tasks["pour"]
    assert (file.name, file.split("seen"), file.split("unseen")) == ("tasks", ("push",), ("pour",))
    assert (push.env, push.env_kwargs, push.factory) == ("FetchPush-v4", {"reward_type": "dense"}, False)
    assert push.data == (str(tmp_path / "demos" / "push"), "minari:fetch/push-v0")
    assert (push.data_task, push.text, push.max_steps) == ("FetchPush", "Task: push it.", 50)
    assert (push.data_part, push.action) == ("train", "actions_abs")
    assert (pour.data_part, pour.action) == (None, None)
    own = UserSuite(file).reading("push")
    assert (own.part, own.action, own.observation) == ("train", "actions_abs", push.observation)
    assert (own.terminates, UserSuite(file).reading("pour").terminates) == (False, None)
    assert push.observation == pour.observation == ("observation", "desired_goal")
    assert (push.success, pour.success) == (Success("is_success"), Success(None, 3.0))
    assert (pour.env, pour.data, pour.text, pour.max_steps) == (None, ("/logs/pour",), "Task: pour it.", 200)
    layout = file.layout
    assert layout is not None
    assert layout.points == (
        Point("hand", (0, 1, 2), (20, 21, 22)),
        Point("cube", (3, 4, 5)),
        Point("goal", (10, 11, 12)),
    )
    assert (layout.goal, layout.gripper, layout.scalars, layout.move, layout.grip) == (
        *("goal", (9,), (6,), (0, 1, 2)),
        (3,),
    )
    assert (layout.up, layout.unit, layout.pivot) == (2, 0.01, (0.0, 0.5, 0.0))


def test_a_module_and_a_registered_id_of_a_module_are_told_apart(tmp_path: Path) -> None:
    content = '[tasks.a]\nenv = "robot:make"\n[tasks.b]\nenv = "robot:Push-v0"\n[tasks.c]\nenv = "Push-v0"'
    file = read_task_file(write(tmp_path, content), is_named)
    assert [task.factory for task in file.tasks.values()] == [True, False, False]


HUGE = "1" + "0" * 400
ONE = '[tasks.push]\nenv = "FetchPush-v4"\n'
WRONG = [
    ("[suite\n", None, "no TOML"),
    ("", "tasks", "no tasks"),
    ("[suit]\n" + ONE, "suit", "nearest: suite"),
    (ONE + "spilt = 'seen'", "tasks.push.spilt", "nearest: split"),
    ("[suite]\nmax_step = 3\n" + ONE, "suite.max_step", "nearest: max_steps"),
    (ONE + "split = 'held-out'", "tasks.push.split", '"seen" or "unseen"'),
    (ONE + "max_steps = 0", "tasks.push.max_steps", "1 or more"),
    (ONE + "max_steps = true", "tasks.push.max_steps", "1 or more"),
    (ONE + "terminates = 0", "tasks.push.terminates", "true or false"),
    (ONE + "success = true", "tasks.push.success", "the return counts"),
    (ONE + "success = { returns = 3 }", "tasks.push.success", "return = NUMBER"),
    (ONE + "success = { return = inf }", "tasks.push.success", "return = NUMBER"),
    (ONE + "data = []", "tasks.push.data", "one or more"),
    (ONE + "data = ['a', 'a']", "tasks.push.data", "named twice"),
    (ONE + "text = ' '", "tasks.push.text", "a text is expected"),
    (ONE + "text = 'a'\ntext_file = 'b'", "tasks.push.text_file", "one of them"),
    (ONE + "text_file = 'absent.txt'", "tasks.push.text_file", "not found"),
    (ONE + "env_kwargs = 3", "tasks.push.env_kwargs", "a table is expected"),
    ("[tasks.push]\ndata = 'a'\nenv_kwargs = { a = 1 }", "tasks.push.env_kwargs", "no env"),
    ("[tasks]\npush = 3", "tasks.push", "a table is expected"),
    ("[tasks.'a/b/c']\nenv = 'A-v0'", "tasks", "a/b/c"),
    ("[tasks.'a/']\nenv = 'A-v0'", "tasks", "one slash as in"),
    ("[tasks.'a/b']\nenv = 'A-v0'\n[tasks.a_b]\nenv = 'A-v0'", "tasks", "a/b and a_b"),
    (ONE + f"success = {{ return = {HUGE} }}", "tasks.push.success", "does not say when"),
    (ONE + "success = { return = 0 }", "tasks.push.success.return", "above 0"),
    (ONE + "success = { return = -3.5 }", "tasks.push.success.return", "every first step"),
    (ONE + f"max_steps = {HUGE}", "tasks.push.max_steps", "at most 1000000000"),
    (ONE + f"max_steps = 1{'0' * 9000}", None, "no TOML"),
    (ONE + f"max_steps = 0x1{'0' * 9000}", "tasks.push.max_steps", "too many digits"),
    (f"a = {'[' * 3000}{']' * 3000}\n" + ONE, None, "no TOML"),
    (ONE + "text_file = 'a\\u0000'".replace("'", '"'), "tasks.push.text_file", "cannot be a path"),
    (ONE + 'data = "a\\u0000"', "tasks.push.data", "cannot be a path"),
    (ONE + "data = '~nosuchuser/x'", "tasks.push.data", "cannot be a path"),
    (ONE + "text_file = '~nosuchuser/x'", "tasks.push.text_file", "cannot be a path"),
    (ONE + f"data = '{'x' * 5000}'", "tasks.push.data", "too long"),
    (ONE + "text_file = '.'", "tasks.push.text_file", "not a regular file"),
    (ONE + f"[suite.layout]\npoints = {{ a = [0, 1] }}\nunit = {HUGE}", "suite.layout.unit", "not a number"),
    (ONE + f"[suite.layout]\npoints = {{ a = [0, 1] }}\npivot = [0, {HUGE}]", "suite.layout.pivot", "not a number"),
    (ONE + "[tasks.b]\nenv = 'A-v0'\nsuccess = 'done'", "tasks.push.success", "none there, one in tasks.b"),
    ("[suite.layout]\n" + ONE, "suite.layout.points", "without points"),
    ("[suite.layout]\npoints = { a = [0, 1] }\nbody = 'b'\n" + ONE, "suite.layout.body", "nearest: a"),
    ("[suite.layout]\npoints = { a = [0, 1.5] }\n" + ONE, "suite.layout.points.a", "whole numbers"),
    ("[suite.layout]\npoints = { a = [0] }\n" + ONE, "suite.layout.points.a", "two or three indices"),
    ("[suite.layout]\npoints = { a = [0, 1], b = [1, 2] }\n" + ONE, "suite.layout.points.b", "as in points.a"),
    ("[suite.layout]\npoints = { a = [0, 1] }\nup = 'w'\n" + ONE, "suite.layout.up", "one of x, y, z"),
    ("[suite.layout]\npoints = { a = [0, 1] }\naction = { moves = [0] }\n" + ONE, "suite.layout.action.moves", "move"),
    ("[suite.layout]\npoints = { a = [0, 1] }\nprevious = { b = [2, 3] }\n" + ONE, "suite.layout.previous", "nearest"),
    ("[suite.layout]\npoints = { a = [0, 1] }\nunit = 0\n" + ONE, "suite.layout.unit", "above 0"),
    ("[suite.layout]\npoints = { a = [0, 1] }\npivot = ['x', 0]\n" + ONE, "suite.layout.pivot", "a finite number"),
    ("[suite.layout]\npoints = { a = [0, 1] }\npoint = 3\n" + ONE, "suite.layout.point", "nearest: points"),
]


@pytest.mark.parametrize(("content", "field", "words"), WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, field: str | None, words: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_task_file(path, is_named)
    assert error.value.field == field
    assert words in str(error.value)
    # A file that is named in it is the one at fault, but the field is the task file's.
    assert error.value.path in (str(path), str(tmp_path), str(tmp_path / "absent.txt"))


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_task_file(tmp_path / "tasks.toml", is_named)
    (tmp_path / "tasks.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_task_file(tmp_path / "tasks.toml", is_named)


def test_names_with_a_slash_and_tasks_of_which_there_is_nothing_yet(tmp_path: Path) -> None:
    file = read_task_file(write(tmp_path, "[tasks.'my-robot/pour']\n[tasks.push]\n"), is_named)
    assert list(file.tasks) == ["my-robot/pour", "push"]


def test_only_schemes_that_data_have_are_no_paths(tmp_path: Path) -> None:
    content = '[tasks.a]\ndata = ["minari:x/y-v0", "d4rl:z-v0", "minary:x", "C:x"]'
    data = read_task_file(write(tmp_path, content), is_named).tasks["a"].data
    assert data == ("minari:x/y-v0", "d4rl:z-v0", str(tmp_path / "minary:x"), str(tmp_path / "C:x"))


def test_texts_of_text_files_are_the_files_own_and_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "push.txt").write_text("Task: push.")
    path = write(tmp_path, ONE + "text_file = 'push.txt'")
    first = read_task_file(path, is_named)
    (tmp_path / "push.txt").write_text("Task: pull.")
    changed = read_task_file(path, is_named)
    assert first.content == changed.content
    assert first.sha256 != changed.sha256
    (tmp_path / "push.txt").unlink()
    again = read_task_file(path, is_named, first.content, first.texts)
    assert again == first
    assert again.tasks["push"].text == "Task: push."


@pytest.mark.parametrize("path", ["~nosuchuser/tasks.toml", "a\0b", "x" * 5000])
def test_a_path_that_cannot_be(path: str) -> None:
    with pytest.raises(InputError, match="cannot be a path"):
        read_task_file(path, is_named)
