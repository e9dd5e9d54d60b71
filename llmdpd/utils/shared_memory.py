"""Memory that the processes of one machine share, and tensors that lie in it.

What one process writes there all others read, once they have met: nothing is sent, and there is one copy for all.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
_log = logging.getLogger(__name__)
_NAME = 16  # random bytes, which no other memory has

ALIGNED = 16
"""Float32 numbers of a cache line, which two processes should not write to."""


class SharedMemory:
    """Float32 numbers that all processes of the machine share. Every process asks for the same, in the same order.

    Args:
        rank: this process.
        told: the first process's value, in every process.
        all_hold: whether something holds in every process; waits for all.
    """

    def __init__(self, rank: int, told: Callable[[str | None], str], all_hold: Callable[[bool], bool]) -> None:
        self._rank, self._told, self._all_hold = rank, told, all_hold
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # of tensors, by identity
        self._rows = np.empty(0, np.float32)
        self._refused = False

    def numbers(self, count: int) -> Array | None:
        """So many zeros; None in all processes where one of them can't have them."""
        if self._refused:
            return None
        name = self._told(None if self._rank else os.urandom(_NAME).hex())
        number = _made(4 * count, bytes.fromhex(name)) if self._rank == 0 else None
        try:
            # By the first process's own descriptor: a process that dies leaves no file behind, whenever it does.
            path = self._told(None if self._rank else "" if number is None else f"/proc/{os.getpid()}/fd/{number}")
            mapped = _mapped(path, 4 * count, bytes.fromhex(name)) if path else None
            self._refused = not self._all_hold(mapped is not None)
            if self._refused:
                if mapped is not None and self._rank == 0:
                    _log.info("every process keeps its own weights: another process can't reach shared memory")
                return None
        finally:
            if number is not None:
                os.close(number)
        assert mapped is not None, "it is everywhere"
        return np.frombuffer(mapped, np.float32, count)

    def rows(self, count: int) -> Array | None:
        """At least so many numbers, of any value; the next call may give the same ones."""
        if len(self._rows) < count:
            rows = self.numbers(count)
            if rows is None:
                return None
            self._rows = rows
        return self._rows

    def has(self, tensor: Tensor) -> bool:
        """Whether it lies here."""
        known, place = self._places.get(id(tensor), (None, 0))
        return known is not None and known() is tensor and place == tensor.data_ptr()

    def take(self, tensors: Sequence[Tensor], check_same: Callable[[str], None]) -> bool:
        """Let float32 tensors on the CPU, which have the same values everywhere, lie here from now on.

        They stay the same objects. False where there is no memory for them: then they stay where they are, too.

        Args:
            check_same: raises an error where processes have different digests.
        """
        missing = self._missing(tensors)
        if not missing:
            return True
        begins = np.cumsum([0, *(-(-tensor.numel() // ALIGNED) * ALIGNED for tensor in missing)]).tolist()
        numbers = self.numbers(begins[-1])
        if numbers is None:
            return False
        digest = hashlib.sha256()
        for tensor, begin in zip(missing, begins, strict=False):
            values, place = tensor.detach().contiguous(), numbers[begin : begin + tensor.numel()]
            digest.update(values.numpy().data)
            if self._rank == 0:
                place[:] = values.numpy().reshape(-1)
        check_same(digest.hexdigest())  # when all know, the first has written all
        for tensor, begin in zip(missing, begins, strict=False):
            place = numbers[begin : begin + tensor.numel()]
            tensor.data = torch.from_numpy(place).view(tensor.shape)
            self._places[id(tensor)] = weakref.ref(tensor), tensor.data_ptr()
        return True

    def _missing(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each of the tensors that do not lie here, once."""
        each = {id(tensor): tensor for tensor in tensors if tensor.numel()}
        return [tensor for tensor in each.values() if not self.has(tensor)]


def _made(size: int, name: bytes) -> int | None:
    """The descriptor of a file in memory of so many bytes and a name after them; None where there is no room for it."""
    try:
        number = os.memfd_create("llmdpd")
        try:
            # Memory that is not there would be found missing by a crash.
            os.posix_fallocate(number, 0, size + len(name))
            os.pwrite(number, name, size)
        except OSError:
            os.close(number)
            raise
    except (AttributeError, OSError) as error:
        _log.info("every process keeps its own weights: no %d bytes of shared memory (%s)", size, error)
        return None
    return number


def _mapped(path: str, size: int, name: bytes) -> mmap.mmap | None:
    """The memory of that file; None where it can't be had, or the path leads to another one: not to this process's."""
    try:
        number = os.open(path, os.O_RDWR)
        try:
            if os.pread(number, len(name) + 1, size) != name:
                raise OSError(f"{path} is another file in this process")
            return mmap.mmap(number, size + len(name))
        finally:
            os.close(number)
    except OSError as error:
        _log.info("every process keeps its own weights: memory can't be shared (%s)", error)
        return None
