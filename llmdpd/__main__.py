"""`python -m llmdpd`: the commands, and `llmdpd COMMAND …` for each of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from llmdpd.errors import nearest_names
from llmdpd.utils.encoding import accept_any_output

COMMANDS = {
    "train": "train a policy, evaluate it and write a report",
    "evaluate": "evaluate a run's policies, or a non-learned baseline, with prompts of your choice",
    "report": "write an HTML page about a run, or comparing several",
    "experiment": "run a table or figure of the paper, and make a page of it",
    "collect": "make a data set, by scripted experts or from a run of SAC",
    "tasks": "check a file with tasks of your own",
    "pretrain": "pre-train a small GPT-2 for the method lamo",
}
"""The commands and what each does: COMMAND is the function `main` of llmdpd.cli.COMMAND."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or list the commands; the exit code is 2 for an unknown one."""
    accept_any_output()
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        # Only now: a command imports torch, which takes seconds.
        code: int = importlib.import_module(f"llmdpd.cli.{name}").main(rest)
        return code
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"    {command:<{width}}  {words}" for command, words in COMMANDS.items()]
        print("\n".join(["usage: llmdpd COMMAND …", "", *lines, "", "llmdpd COMMAND --help lists a command's options"]))
        return 0
    print(f"error: no such command: {name}; nearest: {nearest_names(name, COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
