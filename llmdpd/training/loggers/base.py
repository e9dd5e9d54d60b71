"""What a logger is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdpd.utils.files import read_json

PROJECT = "llmdpd"
"""Under which runs are found where destinations have projects."""


class Logger(ABC):
    """Takes a run's metrics; a value of `llmdpd.training.loggers.LOGGERS`.

    Args:
        run: the run folder.
        name: by which the destination shall know the run, the same after each resume.
        resume_at: the iteration that the run goes on from; None where it starts anew, or is new to the destination.

    Attributes:
        continues: whether what it was given of this run by earlier processes is still there.
        rewinds: whether it drops what came after `resume_at` by itself.

    Raises:
        InputError: the destination refuses.
        OSError: the disk does.
    """

    continues = True
    rewinds = False

    @abstractmethod
    def __init__(self, run: Path, name: str, resume_at: int | None) -> None: ...

    @classmethod  # noqa: B027 - most need nothing
    def require(cls) -> None:
        """Raise `InputError` unless all that it needs is on this machine."""

    @abstractmethod
    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take the values of an iteration, which may come in several parts. Raises `OSError` on a full disk."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Bring everything to its place; `failed`, where the run ends with an error."""


def configuration(run: Path) -> dict[str, Any]:
    """The run's configuration, as it is recorded; empty where there is none."""
    file = run / "config.json"
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    return known
