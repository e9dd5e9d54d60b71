"""RUN/loggers.json: by which name each logger knows the run, and up to which record it was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmdpd.errors import InputError
from llmdpd.utils.files import atomic_write_json, read_json

_FILE = "loggers.json"
_EXPECTED = "a name, the last record given (two whole numbers), whether it is current"


class Place(NamedTuple):
    """Where a record stands in a run: its iteration, and its number among those of the iteration."""

    iteration: int
    number: int

    def next(self, iteration: int) -> Place:
        """The place of the next record."""
        return Place(iteration, self.number + 1 if iteration == self.iteration else 0)


START = Place(-1, 0)
"""Before every record."""


class Mark(NamedTuple):
    """What a run knows of a logger.

    name: by which its destination knows the run.
    given: the last record that it was given when the process began.
    current: whether it is given what that process records, too.
    """

    name: str
    given: Place
    current: bool


def places(records: Iterable[Mapping[str, float]]) -> list[Place]:
    """The records' places."""
    found = [START]
    for record in records:
        found.append(found[-1].next(int(record["iteration"])))
    return found[1:]


def last_place(records: Iterable[Mapping[str, float]]) -> Place:
    """The last record's place; `START` where there is none."""
    return [START, *places(records)][-1]


def read_marks(run: Path) -> dict[str, Mark]:
    """The marks by logger; none where no logger has begun.

    Raises:
        InputError: the file is damaged.
    """
    file = run / _FILE
    known = read_json(file) if file.is_file() else {}
    if not isinstance(known, dict):
        raise InputError("damaged", path=file, found=repr(known)[:80], expected="an object, one mark a logger")
    return {logger: _mark(entry, file, logger) for logger, entry in known.items()}


def write_marks(run: Path, marks: Mapping[str, Mark]) -> None:
    """Raises `OSError` where the disk refuses."""
    atomic_write_json(run / _FILE, {logger: mark._asdict() for logger, mark in marks.items()})


def _mark(entry: Any, file: Path, logger: str) -> Mark:
    match entry:
        case {"name": str(name), "given": [int(iteration), int(number)], "current": bool(current)}:
            return Mark(name, Place(iteration, number), current)
    raise InputError("damaged", path=file, field=logger, found=repr(entry)[:80], expected=_EXPECTED)
