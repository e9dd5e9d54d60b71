from __future__ import annotations

import dataclasses
import errno
import logging
import re
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from llmdpd.cli.common import results_table, run_command, take_option, training_summary
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.evaluation.results import ActingUse, PromptUse, TaskResult
from llmdpd.tasks import ML45_TEST, ML45_TRAIN
from llmdpd.training.loop import TrainingDivergedError
from llmdpd.training.stopping import StopRequestedError


@pytest.mark.parametrize(
    ("words", "value", "rest"),
    [
        ([], None, []),
        (["--a", "1"], None, ["--a", "1"]),
        (["--run-dir", "x", "--a", "1"], "x", ["--a", "1"]),
        (["--a", "1", "--run-dir=x=y"], "x=y", ["--a", "1"]),
        (["--run_dir", "x"], "x", []),
        (["--run_dir=x_y"], "x_y", []),
        (["--run-dir=", "z"], "", ["z"]),
        (["--run-dirs", "x"], None, ["--run-dirs", "x"]),
        (["--run-dir", "x", "--run-dir", "y"], "y", []),
    ],
)
def test_an_option_is_taken_out(words: list[str], value: str | None, rest: list[str]) -> None:
    assert take_option(words, "--run-dir") == (value, rest)


def test_an_option_without_value() -> None:
    with pytest.raises(InputError, match="without its value"):
        take_option(["--a", "--run-dir"], "--run-dir")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            InputError("wrong", field="x", found="[1] [/bold]"),
            2,
            "error: wrong\n  field:    x\n  found:    [1] [/bold]",
        ),
        (TrainingDivergedError("loss became nan"), 1, "error: loss became nan"),
        (OSError(errno.ENOSPC, "No space left on device", "some/file"), 2, "some/file"),
        (PermissionError(errno.EACCES, "Permission denied", "some/file"), 2, "Permission denied"),
    ],
)
def test_errors_are_told_without_traceback(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(_raising(error)) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(("error", "code"), [(StopRequestedError(15), 143), (StopRequestedError(2), 130)])
def test_a_stop_has_the_code_of_its_signal(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_raising(error)) == code
    assert "stopped by SIG" in capsys.readouterr().out


def test_ctrl_c_and_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_raising(KeyboardInterrupt())) == 130
    assert run_command(lambda: None) == 0
    assert "stopped by SIGINT" in capsys.readouterr().out


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(_raising(ZeroDivisionError()))
    with pytest.raises(FileNotFoundError):
        run_command(_raising(FileNotFoundError(errno.ENOENT, "no such file")))


def _raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_own_messages_show_and_those_of_libraries_do_not() -> None:
    run_command(lambda: None)
    assert logging.getLogger("llmdpd.tasks.simulation.processes").isEnabledFor(logging.INFO)
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)


def make_record(task: str, split: str = "unseen", checkpoint: str = "last", **changes: Any) -> TaskResult:
    values: dict[str, Any] = {
        "task": task,
        "split": split,
        "protocol": "ml45",
        "episodes": 500,
        "successes": 123,
        "max_steps": 500,
        "seed": 0,
        "prompts": PromptUse(True, True),
        "acting": ActingUse(samples=1, selection="soft", temperature=1.0, noise_scale=1.0, sampler="ddpm", steps=5),
        "trained_on": ("reach-v3",),
        "training_data": "x",
        "goal_visible": True,
        "checkpoint": checkpoint,
        "context": "pooled",
        "iterations": 1,
        "wall_seconds": 1.0,
    }
    return TaskResult(**(values | changes))


def shown(renderable: RenderableType) -> list[str]:
    text = StringIO()
    Console(file=text, width=80).print(renderable)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_the_results_fit_eighty_columns() -> None:
    lines = shown(results_table([make_record("button-press-topdown-wall-v3", checkpoint="best")]))
    assert "95 % interval" in lines[0]
    (line,) = (line for line in lines if "button" in line)
    assert line.split(maxsplit=5) == ["button-press-topdown-wall-v3", "unseen", "best", "500", "25%", "21% – 29%"]


def ml45_records(best: int) -> list[TaskResult]:
    """Of each checkpoint all seen tasks at 480 of 500 but two, all unseen at 250; `best` more each at the best one."""
    low = {ML45_TRAIN[3]: 448, ML45_TRAIN[30]: 10}
    return [
        make_record(task, split, checkpoint, successes=successes + more)
        for checkpoint, more in (("last", 0), ("best", best))
        for split, tasks in (("seen", ML45_TRAIN), ("unseen", ML45_TEST))
        for task in tasks
        for successes in [low.get(task, 480) if split == "seen" else 250]
    ]


@pytest.mark.parametrize("best", [0, 5])
def test_a_run_of_many_tasks_ends_with_what_is_asked_for(best: int) -> None:
    lines = shown(training_summary(ml45_records(best)))
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


def test_an_end_without_weak_or_without_unseen_tasks() -> None:
    seen = [make_record(task, "seen", successes=500) for task in ML45_TRAIN]
    lines = shown(training_summary(seen))
    assert lines[0] == "mean of 45 seen tasks: last 100.0%"
    assert "under" not in " ".join(lines)
    weak = [make_record(task, "seen", successes=0) for task in ML45_TRAIN]
    lines = shown(training_summary(weak))
    assert max(map(len, lines)) <= 80
    assert all(f"{task} 0%" in " ".join(lines) for task in ML45_TRAIN)


def test_a_run_of_few_tasks_ends_with_all_of_them() -> None:
    few = [make_record(task, "seen") for task in ML45_TRAIN[:7]] + [make_record(task) for task in ML45_TEST]
    assert shown(training_summary(few)) == shown(results_table(few))
    assert "The whole table, of 13 tasks" in " ".join(
        shown(training_summary([*few, make_record(ML45_TRAIN[7], "seen")]))
    )
    scores = [make_record(f"run-{n}", successes=None, returns_mean=1.0, returns_std=0.5) for n in range(20)]
    assert len(shown(training_summary(scores))) == 21


def fields_of(kind: type, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            names += fields_of(type(default), f"{prefix}{field.name}.")
        else:
            names.append(f"{prefix}{field.name}".replace("_", "-"))
    return names


def test_help_lists_every_field_with_its_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmdpd.cli.evaluate import EvaluateConfig
    from llmdpd.cli.evaluate import main as evaluate
    from llmdpd.cli.train import main as train

    monkeypatch.setenv("COLUMNS", "80")
    for main, kind in ((train, TrainConfig), (evaluate, EvaluateConfig)):
        with pytest.raises(SystemExit) as done:
            main(["--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        lines = [line.strip("│ ").strip() for line in text[text.index("-h, --help") :].splitlines()]
        for name in fields_of(kind):
            if (kind, name) == (TrainConfig, "preset"):
                assert "--preset NAME" in text
                continue
            if (kind, name) == (EvaluateConfig, "run"):
                assert "The run's folder" in text
                continue
            # A second name of an option stands before it.
            (at,) = (i for i, line in enumerate(lines) if re.search(rf"(^|, )--{name}(?=[ ,]|$)", line))
            # The text begins beside the option's name, or below it.
            described = lines[at] if "(default" in lines[at] else f"{lines[at]} {lines[at + 1]}"
            words = re.sub(rf"^.*?--{name}( \S+)?", "", described).split("(default")[0]
            assert len(words.strip()) > 10, name
        if kind is TrainConfig:
            for option in ("--preset NAME", "--run-dir DIR", "--resume RUN"):
                assert option in text
