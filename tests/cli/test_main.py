from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llmdpd.__main__ import COMMANDS, main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_commands_are_listed_with_a_line_each(words: list[str], capsys: Capture) -> None:
    assert main(words) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert dict(lines) == COMMANDS


def test_the_list_needs_no_torch() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from llmdpd.__main__ import main; main([]); "
        "print({'torch', 'tyro', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_words_after_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stand_in = SimpleNamespace(main=lambda words: seen.append(words) or 7)
    monkeypatch.setattr("importlib.import_module", lambda module: {f"llmdpd.cli.{name}": stand_in}[module])
    assert main([name, "--help", "x"]) == 7
    assert seen == [["--help", "x"]]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_command_has_help_of_at_most_120_lines_that_describes_each_option(
    name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 120
    lines = [line.strip("│ ") for line in text[text.index("-h, --help") :].splitlines()]
    options = [number for number, line in enumerate(lines) if re.match(r"--[\w-]+([ ,]|$)", line)]
    assert options
    for number in options:
        # The text begins beside the option's name, or below it.
        words = " ".join(lines[number : number + 2]).split("(default")[0]
        assert len(re.sub(r"^--[^ ]*(, --[^ ]*)*( \S+)?", "", words).strip()) > 10, lines[number]


def test_an_unknown_command_gets_the_nearest(capsys: Capture) -> None:
    assert main(["evalute", "RUN"]) == 2
    assert capsys.readouterr().err.startswith("error: no such command: evalute; nearest: evaluate")
