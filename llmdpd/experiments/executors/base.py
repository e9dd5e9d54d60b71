"""What an executor is: it says how much of the machines each cell may use, and starts a cell's steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Protocol

from llmdpd.errors import InputError
from llmdpd.experiments.cell import Share
from llmdpd.utils.bounds import Bounds

DEVICES = ("auto", "cpu", "cuda")
LOST: Final = "lost"
"""How a step ended whose worker or node died: it says nothing about the step, which goes on elsewhere."""


@dataclass(frozen=True)
class Resources:
    """What a user gives an experiment of the machines.

    jobs: cells at once; None: what the executor takes. threads: CPU threads of a cell; None: as the executor shares
    them out. device: `cpu`, `cuda`, or `auto` for the GPUs that there are. options: further words NAME=VALUE for the
    engine.
    """

    jobs: int | None = None
    threads: int | None = None
    device: str = "auto"
    options: tuple[str, ...] = ()

    def check(self, executor: str) -> None:
        """Raise `InputError` for numbers or a device that nothing can have."""
        Bounds(1).check(self.jobs, "--jobs")
        Bounds(1).check(self.threads, "--threads")
        if self.device not in DEVICES:
            raise InputError("no such device", field="--device", found=self.device, expected="auto, cpu or cuda")
        if self.options and executor != "slurm":
            found = " ".join(self.options)
            expected = "none: they are for --executor slurm"
            raise InputError("options of another executor", field="--slurm", found=found, expected=expected)


class Running(Protocol):
    """A step that was started, or waits in the engine's queue."""

    def poll(self) -> int | str | None:
        """None while it has not ended; then its exit code, or `LOST`."""

    def is_queued(self) -> bool:
        """Whether it waits in the engine's queue."""

    def stop(self) -> None:
        """Ask it to save and end, as SIGTERM does."""

    def wait(self) -> None:
        """Return when it has ended."""


class Executor(ABC):
    """Starts steps somewhere. Folders of runs, data and logs are seen from there under the same paths."""

    name: ClassVar[str]

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    @abstractmethod
    def shares(self, cells: int) -> list[Share]:
        """What each of the cells that are started at once may use.

        Raises:
            InputError: GPUs are asked for and there are none.
        """

    @abstractmethod
    def start(self, argv: list[str], share: Share, log: Path) -> Running:
        """Start a Python command, `argv` from the interpreter on, whose output is appended to `log`."""

    def close(self) -> None:  # noqa: B027 - most have nothing to leave
        """Leave the engine; what was started has ended."""

    def _queued(self, cells: int, threads: int) -> list[Share]:
        """Shares where the engine's own queue holds what does not fit: one for each cell."""
        count = min(self.resources.jobs or cells, max(1, cells))
        cuda = 0 if self.resources.device == "cuda" else None
        return [Share(self.resources.threads or threads, cuda)] * count


def no_gpu() -> InputError:
    """The error of an executor that finds no GPU where `cuda` is asked for."""
    return InputError("no GPU that torch can use", field="--device", found="0 GPUs", expected="cpu, or auto")


def failed(log: str | Path, error: Exception) -> int:
    """The exit code of a step that could not be started on its worker; why stands in the cell's log."""
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(f"{error}\n")
    return 1
