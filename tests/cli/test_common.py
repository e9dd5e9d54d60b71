from __future__ import annotations

import dataclasses
import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console, RenderableType

from llmdpd.cli.common import results_table, run_command, training_summary
from llmdpd.errors import InputError, StopRequestedError, TrainingDivergedError
from llmdpd.evaluation.results import TaskResult
from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.utils.command_line import option_lines, parse, renamed, take_option

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "value", "rest"),
    [
        ([], None, []),
        (["--a", "1"], None, ["--a", "1"]),
        (["--run-dir", "x", "--a", "1"], "x", ["--a", "1"]),
        (["--a", "1", "--run-dir=x=y"], "x=y", ["--a", "1"]),
        (["--run_dir", "x"], "x", []),
        (["--run_dir=x_y"], "x_y", []),
        (["--run-dirs", "x"], None, ["--run-dirs", "x"]),
        (["--run-dir", "x", "--run-dir", "y"], "y", []),
    ],
)
def test_an_option_is_taken_out(words: list[str], value: str | None, rest: list[str]) -> None:
    assert take_option(words, "--run-dir") == (value, rest)
    for bad in (["--run-dir"], ["--run-dir="], ["--run-dir", ""]):
        with pytest.raises(InputError, match="without its value"):
            take_option([*words, *bad], "--run-dir")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a test."""

    episodes: int = 3
    """How many."""
    kind: Literal["one", "two"] = "one"
    """Which."""
    add_noise: bool = True
    """Whether."""


@dataclasses.dataclass(frozen=True)
class Outer(Options):
    """Options with a part."""

    part: Options = dataclasses.field(default_factory=lambda: Options(9))
    """The part."""
    tasks: tuple[str, ...] = ("a-task-of-a-long-name", "another")
    """What is done."""


def test_help_has_a_line_for_each_option() -> None:
    lines = option_lines(Outer(), width=70, hidden=("kind", "part.add_noise"))
    assert [line.split(maxsplit=2) for line in lines] == [
        ["--episodes", "3", "How many."],
        ["--add-noise", "True", "Whether."],
        ["--tasks", "a-task-of-a-long-name…", "What is done."],
        ["--part.episodes", "9", "How many."],
        ["--part.kind", "one", "Which."],
    ]


def test_options_are_read() -> None:
    assert parse(Options, ["--episodes", "5", "--no-add-noise"], "prog") == Options(5, "one", False)
    assert parse(Options, ["--add_noise"], "prog", default=Options(7)) == Options(7)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--epsodes", "3"], ["no such option", "found:    --epsodes", "perhaps --episodes"]),
        (["--no_ad_noise=x"], ["found:    --no_ad_noise=x", "--no-add-noise"]),
        (["--zzz"], ["no such option", "found:    --zzz"]),
        (["--also", "3"], ["perhaps --also-this"]),
        (["--kind", "three"], ["invalid choice 'three' for argument '--kind'"]),
        (["--episodes", "many"], ["many", "--episodes"]),
        (["--episodes"], ["--episodes"]),
        (["word"], ["word"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_option_that_cannot_be_read_is_named_in_a_few_lines(
    encoding: str, words: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the terminal: in another than UTF-8 the box around the parser's message is of dashes.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(InputError) as caught:
        parse(Options, words, "prog", known=["--also-this"])
    text = str(caught.value)
    for part in (*parts, "prog --help lists the options"):
        assert part in text
    assert len(text.splitlines()) <= 4
    assert not set("│╭╰─") & set(text)
    assert "---" not in text


def test_old_spellings_are_taken_with_a_line_each(capsys: Capture) -> None:
    table = {"--films": "--videos", "--a.film-tasks": "--a.video-tasks", "--a.films": "--a.videos"}
    words = ["RUN", "--films", "--a.film_tasks=3", "--a.no-films", "films", "--no-films", "--other", "--a.films=x=y"]
    assert renamed(words, table) == [
        *("RUN", "--videos", "--a.video-tasks=3", "--a.no-videos", "films", "--no-videos", "--other", "--a.videos=x=y")
    ]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "--films is now --videos; the old spelling goes in the next version"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("wrong", field="x", found="[1] [/b]"), 2, "error: wrong\n  field:    x\n  found:    [1] [/b]"),
        (TrainingDivergedError("loss became nan"), 1, "error: loss became nan"),
        (OSError(errno.ENOSPC, "No space left on device", "some/file"), 2, "some/file"),
        (PermissionError(errno.EACCES, "Permission denied", "some/file"), 2, "Permission denied"),
    ],
)
def test_errors_are_printed_without_traceback(error: Exception, code: int, said: str, capsys: Capture) -> None:
    assert run_command(_raising(error)) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_a_stop_has_the_code_of_its_signal(capsys: Capture) -> None:
    for error, code in ((StopRequestedError(15), 143), (StopRequestedError(2), 130), (KeyboardInterrupt(), 130)):
        assert run_command(_raising(error)) == code
        assert "stopped by SIG" in capsys.readouterr().out


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    for error in (ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "no such file")):
        with pytest.raises(type(error)):
            run_command(_raising(error))


def _raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_own_messages_show_and_those_of_libraries_do_not() -> None:
    assert run_command(lambda: None) == 0
    assert logging.getLogger("llmdpd.tasks.simulation.processes").isEnabledFor(logging.INFO)
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)


def shown(renderable: RenderableType) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=80).print(renderable)
    return [line.rstrip() for line in text.getvalue().splitlines()]


@pytest.fixture
def record(make_result: Callable[..., TaskResult]) -> Callable[..., TaskResult]:
    return lambda task, split="unseen", checkpoint="last", **changes: make_result(
        **{"task": task, "split": split, "checkpoint": checkpoint, "episodes": 500, "successes": 123} | changes
    )


def test_the_results_fit_eighty_columns(record: Callable[..., TaskResult]) -> None:
    lines = shown(results_table([record("button-press-topdown-wall-v3", checkpoint="best")]))
    assert "95 % interval" in lines[0]
    (line,) = (line for line in lines if "button" in line)
    assert line.split(maxsplit=5) == ["button-press-topdown-wall-v3", "unseen", "best", "500", "25%", "21% – 29%"]


@pytest.mark.parametrize("best", [0, 5])
def test_a_run_of_many_tasks_ends_with_the_important_figures(record: Callable[..., TaskResult], best: int) -> None:
    low = {ML45_TRAIN[3]: 448, ML45_TRAIN[30]: 10}
    seen_and_unseen = [
        *((task, "seen", low.get(task, 480)) for task in ML45_TRAIN),
        *((task, "unseen", 250) for task in ML45_TEST),
    ]
    records = [
        record(task, split, checkpoint, successes=successes + more)
        for checkpoint, more in (("last", 0), ("best", best))
        for task, split, successes in seen_and_unseen
    ]
    lines = shown(training_summary(records))
    assert len(lines) < 24
    rows = [line for line in lines if line.split()[:1] and line.split()[0] in ML45_TEST]
    assert len(rows) == 5 * (2 if best else 1)
    assert lines[: len(rows) + 1] == [lines[0], *rows], "the unseen tasks come first"
    text = " ".join(lines)
    seen = (43 * 480 + 448 + 10) / 45 / 500
    if best:
        assert f"mean of 5 unseen tasks: last 50.0%, best {255 / 500:.1%}" in text
        assert f"mean of 45 seen tasks: last {seen:.1%}, best {seen + 5 / 500:.1%}" in text
    else:
        assert "mean of 5 unseen tasks: last = best 50.0%" in text
        assert f"mean of 45 seen tasks: last = best {seen:.1%}" in text
    assert f"seen tasks under 90% (last): {ML45_TRAIN[30]} 2%, {ML45_TRAIN[3]} 89.6%" in text
    assert not any(task in text for task in ML45_TRAIN[:3]), "the others are in the report"
    assert "of 50 tasks, is in the report and in results.json" in text


def test_an_end_without_weak_or_without_unseen_tasks(record: Callable[..., TaskResult]) -> None:
    seen = [record(task, "seen", successes=500) for task in ML45_TRAIN]
    lines = shown(training_summary(seen))
    assert lines[0] == "mean of 45 seen tasks: last 100.0%"
    assert "under" not in " ".join(lines)
    weak = [record(task, "seen", successes=0) for task in ML45_TRAIN]
    lines = shown(training_summary(weak))
    assert max(map(len, lines)) <= 80
    assert all(f"{task} 0%" in " ".join(lines) for task in ML45_TRAIN)


def test_a_run_of_few_tasks_ends_with_all_of_them(record: Callable[..., TaskResult]) -> None:
    few = [record(task, "seen") for task in ML45_TRAIN[:7]] + [record(task) for task in ML45_TEST]
    assert shown(training_summary(few)) == shown(results_table(few))
    assert "The whole table, of 13 tasks" in " ".join(shown(training_summary([*few, record(ML45_TRAIN[7], "seen")])))
    scores = [record(f"run-{n}", successes=None, returns_mean=1.0, returns_std=0.5) for n in range(20)]
    assert len(shown(training_summary(scores))) == 21


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda: os.stat("a\0b"), "null"),
        (lambda: Path("~no-user-of-this-name/x").expanduser(), "home directory"),
        (lambda: os.stat("x" * 300), "File name too long"),
        (lambda: os.stat("/dev/null/x"), "Not a directory"),
        (lambda: os.mkdir("/dev/null"), "File exists"),
        (lambda: exec("raise OSError(24, 'Too many open files')"), "ulimit -n"),
    ],
)
def test_a_place_that_cannot_be_is_one_message(fault: Callable[[], object], words: str, capsys: Capture) -> None:
    assert run_command(lambda: (fault(), None)[1]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a slip"), RuntimeError("a slip"), OSError("a slip")])
def test_what_is_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    def slip() -> None:
        raise error

    with pytest.raises(type(error), match="a slip"):
        run_command(slip)


def test_an_environment_that_broke_is_one_message(capsys: Capture) -> None:
    def broken() -> None:
        raise WorkerError("exception in worker 0")

    assert run_command(broken) == 1
    assert capsys.readouterr().err == "error: exception in worker 0\n"
