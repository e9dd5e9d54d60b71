"""What the commands share: presets before options, results as a table, errors without a traceback."""

from __future__ import annotations

import dataclasses
import errno
import logging
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.progress import console, error_console
from llmdpd.results import TaskResult
from llmdpd.training.stopping import StopRequestedError

_errors = Console(stderr=True, soft_wrap=True, highlight=False)
# What a disk or its owner refuses, whichever write or read it hits.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def take_option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE` (None where absent), and the other arguments.

    Raises:
        InputError: the option is the last word and has no value.
    """
    rest, value, words = [], None, iter(arguments)
    for word in words:
        # tyro takes --run_dir for --run-dir, so the options beside it do too.
        option = word.split("=", 1)[0].replace("_", "-")
        if option == name and "=" not in word:
            value = next(words, None)
            if value is None:
                raise InputError("an option without its value", field=name, expected=f"{name} VALUE")
        elif option == name:
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
    return value, rest


def run_command(command: Callable[[], None]) -> int:
    """Run a command; the exit code. What a user can mend is printed in plain words, not as a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("llmdpd").setLevel(logging.INFO)
    try:
        command()
    except (InputError, TrainingDivergedError) as error:
        error_console.print(f"error: {error}", style="bold red", markup=False)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        refusal = InputError("the disk refuses", path=error.filename, found=error.strerror)
        error_console.print(f"error: {refusal}", style="bold red", markup=False)
        return 2
    except StopRequestedError as stopped:
        console.print(f"stopped by {stopped}")
        return stopped.exit_code
    except KeyboardInterrupt:
        console.print("stopped by SIGINT")
        return 130
    return 0


def results_table(records: Sequence[TaskResult]) -> Table:
    """Success by task, split and checkpoint, with 95 % intervals."""
    # Without lines the longest of Meta-World's names fits into 80 columns; a name cut short could be two tasks'.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("task", "split", "policy", "episodes", "success", "95 % interval"):
        table.add_column(name, no_wrap=True, justify="right" if name in ("episodes", "success") else "left")
    # Where the best checkpoint is the last one, its rows say so instead of standing there twice.
    last = {record.task: record for record in records if record.checkpoint == "last"}
    twins = {r.task for r in records if r.checkpoint == "best" and r.task in last and _same(r, last[r.task])}
    for record in records:
        twin = record.task in twins
        if record.success_rate is None or record.ci95 is None or (twin and record.checkpoint == "best"):
            continue
        low, high = record.ci95
        table.add_row(
            record.task,
            record.split,
            "last = best" if twin else record.checkpoint,
            str(record.episodes),
            f"{record.success_rate:.0%}",
            f"{low:.0%} – {high:.0%}",
        )
    return table


def _same(best: TaskResult, last: TaskResult) -> bool:
    return dataclasses.replace(best, checkpoint="last") == last
