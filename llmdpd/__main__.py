"""`python -m llmdpd`: the commands, and `llmdpd COMMAND …` for each of them."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llmdpd.errors import InputError, nearest_names

COMMANDS = {
    "train": "train a policy, evaluate it and write a report",
    "evaluate": "evaluate a run's policies, or a non-learned baseline, with prompts of your choice",
    "report": "write an HTML page about a run, or comparing several",
    "experiment": "run a table or figure of the paper, and make a page of it",
    "tune": "search hyper-parameters on tasks that nothing is reported on",
    "collect": "make a data set, by scripted experts or from a run of SAC",
    "data": "convert data of any format to shards, which need no memory, or check them",
    "export": "write a run's policy for machines without this package",
    "tasks": "check a file with tasks of your own",
    "pretrain": "pre-train a small GPT-2 for the method lamo",
}
"""The commands and what each does: COMMAND is the function `main` of llmdpd.cli.COMMAND."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or list the commands; the exit code is 2 for an unknown one."""
    with _of_this_process(arguments):
        name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        return _run(name, rest) if name in COMMANDS else _list(name)


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command with these words, or the process's own; its exit code, 130 where Ctrl-C ended it."""
    with _of_this_process(arguments):
        return _run(name, arguments)


def _run(name: str, arguments: Sequence[str] | None) -> int:
    try:
        with _ended_by_ctrl_c():
            # Only now: a command imports torch, which takes seconds.
            command = importlib.import_module(f"llmdpd.cli.{name}").main
        code: int = command(arguments)
        return code
    except KeyboardInterrupt:  # before the command was ready for it
        return 128 + signal.SIGINT
    except InputError as error:  # a package that the command imports is not installed
        print(f"error: {error}", file=sys.stderr)
        return 2


def _list(name: str) -> int:
    from llmdpd.utils.encoding import accept_any_output

    accept_any_output()
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"    {command:<{width}}  {words}" for command, words in COMMANDS.items()]
        print("\n".join(["usage: llmdpd COMMAND …", "", *lines, "", "llmdpd COMMAND --help lists a command's options"]))
        return 0
    print(f"error: no such command: {name}; nearest: {nearest_names(name, COMMANDS)}", file=sys.stderr)
    return 2


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process at once: there is nothing to save.

    An exception instead would come out of half a module, where C code and `except` clauses make something else of it.
    """
    if not _is_usual():
        yield
        return

    def end(*_: object) -> None:
        os.write(2, b"stopped by SIGINT\n")
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _of_this_process(arguments: Sequence[str] | None) -> Iterator[None]:
    """Where the words are the process's, it ends after the block: Ctrl-C has nothing to stop in Python's own end."""
    try:
        yield
    finally:
        if arguments is None and _is_usual():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_usual() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt here; elsewhere it is someone else's, or another thread's."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


if __name__ == "__main__":
    sys.exit(main())
