from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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


INTERRUPTED = """
import os, runpy, signal, sys
module, at = sys.argv[1], int(sys.argv[2])
begun, count = False, 0
def hook(event, arguments):
    global begun, count
    if event == "import":
        begun = begun or arguments[0].startswith("llmdpd.cli")
        count += begun
        if count == at:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
sys.argv = [module, *sys.argv[3:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def heard() -> Iterator[None]:
    """Processes that are started hear Ctrl-C, also where the tests run in a script's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("module", [*(f"llmdpd.{name}" for name in COMMANDS), "llmdpd"])
def test_ctrl_c_while_modules_are_imported_ends_a_command_without_a_traceback(
    module: str, rng: np.random.Generator
) -> None:
    command = ["tasks", "--help"] if module == "llmdpd" else ["--help"]
    for at in (1, int(rng.integers(2, 120))):
        argv = [sys.executable, "-c", INTERRUPTED, module, str(at), *command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout + done.stderr) == (130, "stopped by SIGINT\n"), at


@pytest.mark.usefixtures("heard")
def test_ctrl_c_of_a_terminal_during_imports() -> None:
    with subprocess.Popen([sys.executable, "-m", "llmdpd.train", "--help"], stderr=subprocess.PIPE, text=True) as train:
        maps = Path(f"/proc/{train.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert train.poll() is None
        train.send_signal(signal.SIGINT)
        assert train.communicate(timeout=60) == (None, "stopped by SIGINT\n")
    assert train.returncode == 130


def test_other_handlers_of_ctrl_c_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within other programs Ctrl-C is theirs, also while a command is imported; afterwards it is as it was."""
    seen: list[object] = []
    stand_in = SimpleNamespace(main=lambda words: 0)

    def note(name: str) -> object:
        seen.append(signal.getsignal(signal.SIGINT))
        return stand_in

    monkeypatch.setattr("importlib.import_module", note)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["train"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert main(["train"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        thread = threading.Thread(target=main, args=(["train"],))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[::2] == [signal.SIG_IGN, signal.default_int_handler]
    assert callable(seen[1])
    assert seen[1] is not signal.default_int_handler
