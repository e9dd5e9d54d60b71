"""A user's task file, `tasks.toml`: what stands in it, read and checked.

    [suite]
    observation = ["observation", "desired_goal"]   # keys of Dict observations, in this order
    success = "is_success"                         # a key of the infos, or { return = 3.0 }; without, the return counts
    max_steps = 50
    [suite.layout]                                  # what the numbers are: see `llmdpd.tasks.user.layout`
    points = { hand = [0, 1, 2], cube = [3, 4, 5] }
    [tasks.push]
    env = "gymnasium_robotics:FetchPush-v4"         # a Gymnasium id, or "module:factory"; left out: no environment
    data = "demos/push"                             # one data set, or a list of them
    text = "Task: …"                                # or text_file
    split = "seen"                                  # or "unseen": a demonstration is all that there is of it

Relative paths are relative to the file, whose folder is also where the module of "module:factory" is looked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llmdpd.errors import InputError, located, nearest_names
from llmdpd.tasks.layout import Layout
from llmdpd.tasks.user.layout import finite, read_layout, shown
from llmdpd.utils.extras import extra
from llmdpd.utils.files import check_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    with extra("cli"):
        import tomli as tomllib

Split = Literal["seen", "unseen"]

_MAX_FILE_BYTES = 1_000_000
_SUITE_KEYS = ("name", "observation", "action", "success", "terminates", "max_steps", "layout")
_TASK_KEYS = (
    *("env", "env_kwargs", "data", "data_task", "data_part", "text", "text_file", "split"),
    *("observation", "action", "success", "terminates", "max_steps"),
)
# Names of tasks become names of files and parts of data set ids.
_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)?")
_REGISTERED = re.compile(r"-v\d+$")
_MOST_STEPS = 1_000_000_000


@dataclass(frozen=True)
class Success:
    """When a step succeeds: at most one of the two; with neither, the return of an episode counts."""

    key: str | None = None
    """Key of the step's info that is true where it succeeds."""
    episode_return: float | None = None
    """The sum of an episode's rewards from which on it has succeeded."""

    def __bool__(self) -> bool:
        return self.key is not None or self.episode_return is not None


@dataclass(frozen=True)
class UserTask:
    """A task of a file; what it does not say itself is its suite's.

    Args:
        name: as in the file's table [tasks.NAME].
        env: a Gymnasium id or "module:factory"; None: there is no environment.
        env_kwargs: passed on where the environment is made.
        data: recorded data sets, absolute paths or named ones such as `minari:ID`.
        data_task: which task of the data, where they hold several.
        data_part: which part of the data, by the name that they give it; None: all.
        text: the text prompt, where the file has one.
        split: "seen", trained on; "unseen", held out.
        observation: keys of Dict observations in their order; none: all, as Gymnasium flattens them.
        action: key of the actions in the data, where their format may hold several; None: the customary one.
        success: when a step succeeds.
        terminates: whether episodes can end by themselves, for data whose flags may be that or time limits; None: the
            data say it.
        max_steps: steps of an episode at most; None: the environment's own limit.
    """

    name: str
    env: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    data_task: str | None = None
    data_part: str | None = None
    text: str | None = None
    split: Split = "seen"
    observation: tuple[str, ...] = ()
    action: str | None = None
    success: Success = Success()
    terminates: bool | None = None
    max_steps: int | None = None

    @property
    def factory(self) -> bool:
        """Whether `env` is "module:factory", and no id: no Python name ends as ids do, in "-v0"."""
        return self.env is not None and ":" in self.env and not _REGISTERED.search(self.env)


@dataclass(frozen=True)
class TaskFile:
    """A task file as it was read.

    Args:
        path: the file, absolute.
        content: its text.
        name: of the suite; by default the file's name without ending.
        tasks: by name, in the file's order.
        layout: of the observations and actions of all of them, where it is given.
        texts: what the text files hold that it names, by task.
    """

    path: Path
    content: str
    name: str
    tasks: Mapping[str, UserTask]
    layout: Layout | None = None
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """What relative paths are relative to, and where modules are looked for."""
        return self.path.parent

    @property
    def sha256(self) -> str:
        """SHA-256 of the file's text, and of those of the text files that it names."""
        texts = json.dumps(dict(self.texts), sort_keys=True) if self.texts else ""
        return hashlib.sha256((self.content + texts).encode()).hexdigest()

    def split(self, split: Split) -> tuple[str, ...]:
        """Names of the tasks that are "seen" or "unseen"."""
        return tuple(task.name for task in self.tasks.values() if task.split == split)


def read_task_file(
    path: str | Path,
    is_named: Callable[[str], bool],
    content: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> TaskFile:
    """Read and check a task file. Nothing that it names is imported or opened, text files aside.

    Args:
        path: the file.
        is_named: whether a text names a data set by a scheme, such as `minari:ID`, and is no path.
        content: stands in for the text of a file that was changed or is gone.
        texts: stand in for the texts of the text files that it names, by task.

    Raises:
        InputError: naming file, table, key, what was found and what is expected: no such file, no TOML, an unknown
            key (the nearest are offered), a value of another type, a wrong layout, no task.
    """
    path = absolute(path)
    content = _read(path, "task file") if content is None else content
    with located(path):
        try:
            tables = tomllib.loads(content)
        # Numbers of too many digits are a plain ValueError.
        except (ValueError, RecursionError) as error:
            raise InputError("this is no TOML", found=str(error), expected="a task file such as tasks.toml") from None
        _check_keys(tables, ("suite", "tasks"), "")
        suite, tasks = _table(tables, "suite", ""), _table(tables, "tasks", "")
        _check_keys(suite, _SUITE_KEYS, "suite")
        with located(field="suite"):
            name = _optional(suite, "name", _text) or path.stem
            layout = read_layout(_table(suite, "layout", "")) if "layout" in suite else None
            shared = _shared(suite)
        if not tasks:
            raise InputError("the file has no tasks", field="tasks", found="none", expected="a table [tasks.NAME] each")
        held = _text_files({name: _table(tasks, name, "tasks") for name in tasks}, path.parent, texts)
        reader = partial(_task, folder=path.parent, shared=shared, is_named=is_named)
        read = {name: reader(name, _table(tasks, name, "tasks"), held.get(name)) for name in tasks}
        _check_names(read)
        _check_success(read)
        return TaskFile(path, content, name, read, layout, held)


def absolute(path: str | Path) -> Path:
    """A path from the file system's root, links as they are. Raises InputError for one that no system allows."""
    return _below(Path(), path)


def _below(folder: Path, path: str | Path) -> Path:
    """A path made absolute, in `folder` if it is relative; InputError for one that can't be."""
    try:
        whole = Path(os.path.abspath(folder / Path(path).expanduser()))
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            whole.lstat()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, ~ of an unknown user
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError("this cannot be a path", found=shown(str(path)), expected="a path", hint=reason) from None
    return whole


def _read(path: Path, what: str) -> str:
    check_regular(path, f"a {what}")
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"too large for a {what}", path=path, expected=f"at most {_MAX_FILE_BYTES} bytes")
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"the {what} cannot be read", path=path, found=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} is not text", path=path, found=str(error), expected="UTF-8 text") from None


def _shared(table: Mapping[str, Any]) -> dict[str, Any]:
    """What both a suite and a task may say: those of the fields of `UserTask` that are there."""
    readers: dict[str, Callable[[Any], Any]] = {
        **{"observation": _texts, "action": _text},
        **{"success": _success, "terminates": _switch, "max_steps": _count},
    }
    return {key: _optional(table, key, read) for key, read in readers.items() if key in table}


def _task(
    name: str,
    table: Mapping[str, Any],
    text: str | None,
    *,
    folder: Path,
    shared: Mapping[str, Any],
    is_named: Callable[[str], bool],
) -> UserTask:
    """A task as its table says; `text` is that of its text file."""
    where = f"tasks.{name}"
    if not _NAME.fullmatch(name):
        expected = "letters, digits, and _ . + - within, also one slash as in my-robot/pour"
        raise InputError("this name cannot be a task's", field="tasks", found=name, expected=expected)
    _check_keys(table, _TASK_KEYS, where)
    with located(field=where):
        data = _optional(table, "data", _texts) or ()
        split = _optional(table, "split", _text) or "seen"
        if split not in ("seen", "unseen"):
            raise InputError("no such split", field="split", found=split, expected='"seen" or "unseen"')
        env = _optional(table, "env", _text)
        if env is None and "env_kwargs" in table:
            raise InputError("env_kwargs without env", field="env_kwargs", found="no env", expected="env")
        return UserTask(
            **{"name": name, "env": env, "env_kwargs": dict(_table(table, "env_kwargs", "")), "split": split},
            data=tuple(each if is_named(each) else _data_path(each, folder) for each in data),
            data_task=_optional(table, "data_task", _text),
            data_part=_optional(table, "data_part", _text),
            text=_optional(table, "text", _text) if text is None else text,
            **{**shared, **_shared(table)},
        )


def _text_files(
    tables: Mapping[str, Mapping[str, Any]], folder: Path, known: Mapping[str, str] | None
) -> dict[str, str]:
    """What the text files hold that tasks name, by task; those that are `known` are not opened."""
    found = {}
    for name, table in tables.items():
        with located(field=f"tasks.{name}"):
            file = _optional(table, "text_file", _text)
            if file is not None and "text" in table:
                raise InputError("two texts", field="text_file", found="text and text_file", expected="one of them")
            if file is not None:
                with located(field="text_file"):
                    found[name] = (
                        known[name] if known and name in known else _text(_read(_below(folder, file), "text file"))
                    )
    return found


def _data_path(text: str, folder: Path) -> str:
    with located(field="data"):
        return str(_below(folder, text))


def _check_names(tasks: Mapping[str, UserTask]) -> None:
    """Raise `InputError` for names that come to the same where they are names of files and parts of data set ids."""
    known: dict[str, str] = {}
    for name in tasks:
        other = known.setdefault(re.sub(r"[^-A-Za-z0-9_]", "_", name), name)
        if other != name:
            found, expected = f"{other} and {name}", "names that differ in more than . + / _"
            raise InputError("two names that would be one as a file's", field="tasks", found=found, expected=expected)


def _check_success(tasks: Mapping[str, UserTask]) -> None:
    """Raise `InputError` where some tasks succeed or fail and of others the return counts: they cannot be averaged."""
    kinds = {bool(task.success): name for name, task in tasks.items()}
    if len(kinds) > 1:
        raise InputError(
            "some tasks succeed or fail, and of others the return counts",
            field=f"tasks.{kinds[False]}.success",
            found=f"none there, one in tasks.{kinds[True]}",
            expected="a success for all of the tasks, or for none",
        )


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise InputError(
                "unknown key in the task file",
                field=f"{where}.{key}" if where else key,
                expected=f"one of {', '.join(known)}",
                hint=f"nearest: {nearest_names(key, known)}",
            )


def _table(table: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = table.get(key, {})
    if not isinstance(found, Mapping):
        name = f"{where}.{key}" if where else key
        raise InputError("a table is expected here", field=name, found=shown(found), expected=f"[{name}], with keys")
    return found


def _optional(table: Mapping[str, Any], key: str, read: Callable[[Any], Any]) -> Any:
    with located(field=key):
        return read(table[key]) if key in table else None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError("a text is expected here", found=shown(value), expected='"…"')
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """A text, or a list of them."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError("an empty list", found="[]", expected="one or more texts")
    texts = tuple(_text(each) for each in values)
    if len(set(texts)) < len(texts):
        raise InputError("named twice", found=next(each for each in texts if texts.count(each) > 1), expected="once")
    return texts


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_STEPS:
        expected = f"1 or more, at most {_MOST_STEPS}"
        raise InputError("a number of steps is expected here", found=shown(value), expected=expected)
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError("yes or no is expected here", found=shown(value), expected="true or false")
    return value


def _success(value: Any) -> Success:
    if isinstance(value, str) and value.strip():
        return Success(key=value)
    if isinstance(value, Mapping) and list(value) == ["return"] and (threshold := finite(value["return"])) is not None:
        if threshold > 0:
            return Success(episode_return=threshold)
        raise InputError(
            "every first step would succeed",
            field="return",
            found=shown(value["return"]),
            expected="a number above 0",
            hint="an episode succeeds at the step where the sum of its rewards reaches the number; it begins at 0",
        )
    expected = 'a key of the infos, as "is_success", or { return = NUMBER }; left out, the return counts'
    raise InputError("this does not say when a task succeeds", found=shown(value), expected=expected)
