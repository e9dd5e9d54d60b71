"""What a logger is."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.utils.files import atomic_write_json, read_json

_IDENTITIES = "loggers.json"
PROJECT = "llmdpd"
"""Under which runs are found where destinations have projects."""


class Logger:
    """Takes a run's metrics; a value of `llmdpd.training.loggers.LOGGERS`.

    Args:
        run: the run folder.
        resume_at: the iteration that the run goes on from; None where it starts anew.

    Attributes:
        continues: whether it holds what an earlier process has logged of this run.
        rewinds: whether it drops what came after `resume_at` by itself.

    Raises:
        InputError: the destination refuses.
        OSError: the disk does.
    """

    continues: bool
    rewinds = False

    def __init__(self, run: Path, resume_at: int | None) -> None:
        raise NotImplementedError

    @classmethod
    def require(cls) -> None:
        """Raise `InputError` unless all that it needs is on this machine."""

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take the values of an iteration, which may come in several parts. Raises `OSError` on a full disk."""
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        """Bring everything to its place; `failed`, where the run ends with an error."""
        raise NotImplementedError


def identity(run: Path, logger: str) -> tuple[str, bool]:
    """The name by which a destination knows the run, kept in the run folder; and whether an earlier process used it.

    Raises:
        InputError: the file that keeps it is damaged.
    """
    file = run / _IDENTITIES
    known = read_json(file) if file.is_file() else {}
    if not isinstance(known, dict) or not isinstance(known.get(logger, ""), str):
        found = repr(known)[:80]
        raise InputError("damaged", path=file, field=logger, found=found, expected="names of the run by logger")
    if logger in known:
        return known[logger], True
    name = secrets.token_hex(4)
    atomic_write_json(file, {**known, logger: name})
    return name, False


def configuration(run: Path) -> dict[str, Any]:
    """The run's configuration, as it is recorded; empty where there is none."""
    file = run / "config.json"
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    return known
