from __future__ import annotations

import dataclasses
import errno
import logging
import re
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from llmdpd.cli import results_table, run_command, take_option
from llmdpd.config import TrainConfig
from llmdpd.errors import InputError
from llmdpd.results import ActingUse, PromptUse, TaskResult
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
    assert logging.getLogger("llmdpd.envs.processes").isEnabledFor(logging.INFO)
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)


def test_the_results_fit_eighty_columns() -> None:
    record = TaskResult(
        task="button-press-topdown-wall-v3",
        split="unseen",
        protocol="ml45",
        episodes=500,
        successes=123,
        max_steps=500,
        seed=0,
        prompts=PromptUse(True, True),
        acting=ActingUse(samples=1, selection="soft", temperature=1.0, noise_scale=1.0, sampler="ddpm", steps=5),
        trained_on=("reach-v3",),
        training_data="x",
        goal_visible=True,
        checkpoint="best",
        context="pooled",
        iterations=1,
        wall_seconds=1.0,
    )
    text = StringIO()
    Console(file=text, width=80).print(results_table([record]))
    assert "95 % interval" in text.getvalue().splitlines()[0]
    (line,) = (line.rstrip() for line in text.getvalue().splitlines() if "button" in line)
    assert line.split(maxsplit=5) == ["button-press-topdown-wall-v3", "unseen", "best", "500", "25%", "21% – 29%"]


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
    from llmdpd.evaluate import EvaluateConfig
    from llmdpd.evaluate import main as evaluate
    from llmdpd.train import main as train

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
                assert "The run's folder." in text
                continue
            # A second name of an option stands before it.
            (at,) = (i for i, line in enumerate(lines) if re.search(rf"(^|, )--{name}(?=[ ,]|$)", line))
            described = lines[at] if "(default" in lines[at] else lines[at + 1]
            assert len(described.removeprefix(f"--{name}").split("(default")[0].strip()) > 10, name
        if kind is TrainConfig:
            for option in ("--preset NAME", "--run-dir DIR", "--resume RUN"):
                assert option in text
