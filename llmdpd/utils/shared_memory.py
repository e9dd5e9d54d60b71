"""Sums of long rows of numbers over the processes of one machine, through memory that they share.

A row of a million numbers takes the loopback interface longer than a training iteration's encoders; here every process
reads the others' numbers where they wrote them.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_FOLDER = Path("/dev/shm")


class SharedSum:
    """Adds up rows of float32 numbers of `count` processes, in the order of the processes.

    There are two rows for each process, which take turns: who is still reading a sum's rows is not written over by the
    next one, since all wait for each other in between.

    Args:
        rank, count: this process, and how many there are.
        numbers: of a row.
        meet: waits until all processes are there.
        told: the first process's value, in every process.
    """

    def __init__(
        self, rank: int, count: int, numbers: int, meet: Callable[[], None], told: Callable[[str | None], str]
    ) -> None:
        self._rank, self._meet, self._turn = rank, meet, 0
        size = 2 * count * numbers * 4
        path = told(_made(size) if rank == 0 else None)
        self.there = bool(path)
        if not self.there:
            return
        storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
        self._rows = torch.tensor([], dtype=torch.float32).set_(storage).view(2, count, numbers)  # type: ignore[arg-type]
        self._sum = torch.empty(numbers)
        meet()
        if rank == 0:
            os.unlink(path)  # it stays as long as a process has it

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        """The sums over the processes of rows, one after the other [numbers]: the same bits in all, till the next."""
        rows = self._rows[self._turn]
        self._turn = 1 - self._turn
        torch.cat(list(parts), out=rows[self._rank])
        self._meet()
        torch.add(rows[0], rows[1], out=self._sum)
        for others in rows[2:]:
            self._sum += others
        return self._sum


def _made(size: int) -> str:
    """A file in memory of so many bytes; "" where there is no room for one."""
    try:
        number, path = tempfile.mkstemp(prefix="llmdpd-", dir=_FOLDER)
        try:
            os.posix_fallocate(number, 0, size)  # memory that is not there would be found missing by a crash
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(number)
    except OSError as error:
        _log.info("gradients are added up over the network: no %d bytes of shared memory (%s)", size, error)
        return ""
    return path
