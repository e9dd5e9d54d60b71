"""Names of tasks in data: which are one task's, and which known one a name stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks import base_name
from llmdpd.tasks.specs import find_suite


def same_task(name: str, other: str) -> bool:
    """Whether two names are one task's: they differ by the version alone, or one suite knows both as the same."""
    if base_name(name) == base_name(other):
        return True
    suite = find_suite(other)
    return suite is not None and suite.knows(name) and suite.data_key(name) == suite.data_key(other)


def resolve_task(name: str, known: Sequence[str], path: str | Path | None) -> str:
    """`name` if known, otherwise the one known task that is the same ('push', 'push-v2' for 'push-v3').

    Raises InputError with the nearest names where there is none, or more than one.
    """
    same = [task for task in known if same_task(task, name)]
    if name in known:
        return name
    if len(same) != 1:
        raise unknown_task(name, known, path)
    return same[0]


def unknown_task(name: str, known: Sequence[str], path: str | Path | None) -> InputError:
    """The error for a task that the data at `path` do not hold."""
    problem, expected = "the data set has no such task", f"one of {len(known)} tasks"
    hint = f"nearest names: {nearest_names(name, known)}"
    return InputError(problem, path=path, field="task", found=repr(name), expected=expected, hint=hint)
