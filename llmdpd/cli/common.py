"""What the commands share: reading options, results as a table, errors without a traceback."""

from __future__ import annotations

import dataclasses
import errno
import logging
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence

from llmdpd.errors import ElsewhereError, InputError, LostProcessError, StopRequestedError, TrainingDivergedError
from llmdpd.evaluation.results import TaskResult
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.tasks.user import use_no_file
from llmdpd.utils.encoding import accept_any_output
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import console, error_console

with extra("cli"):
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

_RIGHT = ("episodes", "success", "return", "action error")
# A table of two checkpoints of as many tasks fills a terminal's 24 lines.
_FEW_TASKS = 12
_MASTERED = 0.9
# What the system refuses without naming a file: room on a disk, rights, memory, processes and open files.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


def run_command(command: Callable[[], None]) -> int:
    """Run a command and return its exit code. What a user can mend is printed as a message, not as a traceback.

    A task file that the command took into use is not afterwards.
    """
    accept_any_output()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("llmdpd").setLevel(logging.INFO)
    try:
        command()
    except (InputError, TrainingDivergedError, WorkerError, LostProcessError) as error:
        error_console.print(f"error: {error}", style="bold red")
        return 2 if isinstance(error, InputError) else 1
    except ElsewhereError as error:
        return error.exit_code
    except OSError as error:
        if error.errno not in _REFUSALS and error.filename is None:
            raise
        hint = "allow more open files (ulimit -n)" if error.errno in _TOO_MANY else None
        refusal = InputError("the system refuses", path=error.filename, found=error.strerror, hint=hint)
        error_console.print(f"error: {refusal}", style="bold red")
        return 2
    except (ValueError, RuntimeError) as error:
        # What the system's own functions say of a name with a null character, and of the home of no user.
        if not any(words in str(error) for words in ("embedded null", "home directory")):
            raise
        error_console.print(f"error: no such place: {error}", style="bold red")
        return 2
    except MemoryError as error:
        error_console.print(f"error: out of memory {error}".rstrip(), style="bold red")
        return 1
    except StopRequestedError as stopped:
        console.print(f"stopped by {stopped}")
        return stopped.exit_code
    except KeyboardInterrupt:
        console.print("stopped by SIGINT")
        return 130
    finally:
        use_no_file()
    return 0


def command(run: Callable[[list[str]], None]) -> Callable[..., int]:
    """The `main` of a command: it takes the arguments (by default the process's) and returns the exit code.

    0, 1 for a diverged loss or an environment that broke, 2 for a wrong input, 130 after Ctrl-C, 143 after SIGTERM.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        return run_command(lambda: run(checked_words(words)))

    return main


def checked_words(words: list[str]) -> list[str]:
    """The words of a command line, unchanged.

    Raises:
        InputError: a word that cannot be a file's name or be written to a file: a null character, no UTF-8.
    """
    for word in words:
        if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
            found = word.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
            raise InputError("an argument that is no text", found=found, expected="UTF-8 without null characters")
    return words


def results_table(records: Sequence[TaskResult]) -> Table:
    """Success by task, split and checkpoint, with 95 % intervals; returns and scores without success, or beside it.

    Where nothing was rolled out, the error of actions on recorded episodes, as a share of their range.

    Rows stand under a heading for each kind of prompts where there are several.
    """
    figures = list(dict.fromkeys(name for record in records for name in _figures(record)))
    # Without lines the longest of Meta-World's names fits into 80 columns; a name cut short could be two tasks'.
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("task", "split", "policy", "episodes", *figures):
        table.add_column(name, no_wrap=True, justify="right" if name in _RIGHT else "left")
    by_kind: dict[str, list[tuple[str, TaskResult]]] = {}
    for policy, record in _by_policy(records):
        by_kind.setdefault(record.prompts.kind, []).append((policy, record))
    for kind, rows in by_kind.items():
        if len(by_kind) > 1:
            table.add_row(Text(f"prompts: {kind}", style="bold"))
        for policy, record in rows:
            table.add_row(record.task, record.split, policy, str(record.episodes), *map(_figures(record).get, figures))
    return table


def _by_policy(records: Sequence[TaskResult]) -> list[tuple[str, TaskResult]]:
    """Each record with its policy's name; where the best checkpoint is the last one, one stands for both."""
    last, best = (
        {(record.task, record.prompts): record for record in records if record.checkpoint == name}
        for name in ("last", "best")
    )
    same = {key for key in last.keys() & best.keys() if dataclasses.replace(best[key], checkpoint="last") == last[key]}
    named: list[tuple[str, TaskResult]] = []
    for record in records:
        twin = (record.task, record.prompts) in same
        if not twin or record.checkpoint == "last":
            named.append(("last = best" if twin else record.checkpoint, record))
    return named


def training_summary(records: Sequence[TaskResult]) -> RenderableType:
    """A run's results at its end: every task where they are few, else the most important figures.

    Of many tasks: the unseen ones with their intervals, the means over the tasks of either split, and the seen tasks
    below 90 % (last checkpoint), worst first. Locomotion has few tasks and stands whole.
    """
    tasks = {record.task for record in records}
    rates = [(record.success_rate, record) for record in records if record.success_rate is not None]
    if len(tasks) <= _FEW_TASKS or len(rates) < len(records):
        return results_table(records)
    unseen = [record for record in records if record.split == "unseen"]
    lines = [_mean_line(records, split) for split in ("unseen", "seen")]
    last = [(rate, record.task) for rate, record in rates if (record.split, record.checkpoint) == ("seen", "last")]
    low = [f"{task} {100 * rate:.3g}%" for rate, task in sorted(last) if rate < _MASTERED]
    if low:
        lines.append(f"seen tasks under {_MASTERED:.0%} (last): {', '.join(low)}")
    lines.append(f"The whole table, of {len(tasks)} tasks, is in the report and in results.json.")
    text = "\n".join(textwrap.fill(line, 80, break_on_hyphens=False) for line in lines if line)
    return Group(results_table(unseen), "", text) if unseen else text


def _mean_line(records: Sequence[TaskResult], split: str) -> str:
    """The mean success over a split's tasks by checkpoint, as a sentence; empty where it has no task."""
    rates: dict[str, list[float]] = {}
    for policy, record in _by_policy(records):
        if record.split == split:
            rates.setdefault(policy, []).append(record.success_rate or 0.0)
    if not rates:
        return ""
    means = [f"{name} {statistics.fmean(values):.1%}" for name, values in rates.items()]
    return f"mean of {len(next(iter(rates.values())))} {split} tasks: {', '.join(means)}"


def _figures(record: TaskResult) -> dict[str, str]:
    """A task's result by column: success and its interval, return and normalised score, or the error of actions."""
    figures: dict[str, str] = {}
    both = record.success_rate is not None and record.returns_mean is not None
    if record.success_rate is not None and record.ci95 is not None:
        low, high = record.ci95
        figures["success"] = f"{record.success_rate:.0%}"
        if not both:  # which would not fit beside each other
            figures["95 % interval"] = f"{low:.0%} – {high:.0%}"
    if record.returns_mean is not None:
        spread = "" if record.returns_std is None else f" ± {record.returns_std:.0f}"
        score = "" if record.normalised_score is None else f"{record.normalised_score:.1f}"
        figures |= {"return": f"{record.returns_mean:.0f}{spread}", "score" if both else "normalised score": score}
    if record.action_error is not None:
        loss = "" if record.diffusion_loss is None else f"{record.diffusion_loss:.4f}"
        figures |= {"action error": f"{record.action_error:.2%}", "diffusion loss": loss}
    return figures
