"""Exceptions with a message for the user: input that cannot be used, training that diverged, a stop asked for."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Input that cannot be used: a file, a field, a name or a setting given by the user.

    The message is built from the parts, so that each one names the file, the field, what was found and what was
    expected; the parts stay readable as attributes. Commands print the message without a traceback and exit with 2.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | Path | None = None,
        field: str | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.path = None if path is None else str(path)
        self.field = field
        self.found = found
        self.expected = expected
        self.hint = hint
        lines = [problem]
        parts = {"file": self.path, "field": field, "found": found, "expected": expected, "hint": hint}
        lines += [f"  {name + ':':<10}{value}" for name, value in parts.items() if value is not None]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle their args; ours are keyword-only, and worker processes send these errors home.
        return _rebuild, (self.problem, self.path, self.field, self.found, self.expected, self.hint)


def _rebuild(
    problem: str, path: str | None, field: str | None, found: object, expected: object, hint: str | None
) -> InputError:
    return InputError(problem, path=path, field=field, found=found, expected=expected, hint=hint)


@contextmanager
def located(path: str | Path | None = None, field: str | None = None) -> Iterator[None]:
    """Complete the `InputError`s of a block, which knows neither the file nor the field that its value came from."""
    try:
        yield
    except InputError as error:
        whole = ".".join(part for part in (field, error.field) if part) or None
        raise InputError(
            error.problem,
            path=error.path or path,
            field=whole,
            found=error.found,
            expected=error.expected,
            hint=error.hint,
        ) from None


class TrainingDivergedError(RuntimeError):
    """A loss became NaN or Inf; the message says which, where, and what is left."""


class StopRequestedError(Exception):
    """The user or the system asked to stop; `signal_number` says how."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.signal_number


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or can't be reached; the message says what to do."""


class ElsewhereError(Exception):
    """Another process of the run failed, and says so itself; `exit_code` is what this one ends with, too."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process of the run failed (exit code {exit_code})")
        self.exit_code = exit_code


def abridged(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first names of a list, and how many more there are: "a, b and 3 more"."""
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Up to `count` known names closest to `name`, as text for an error's hint."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=count, cutoff=0.3)
    return ", ".join(close or choices[:count])
