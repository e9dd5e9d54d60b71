"""The processes (ranks) of one run: which one this is, and what they do together.

`torchrun` starts them and numbers them by environment variables; without it there is one, for which everything here is
a plain call. They talk through gloo on the CPU and through NCCL between GPUs; on one machine, what every iteration asks
goes through Unix sockets and shared memory. Every process must make the same calls in the same order. The first one
alone writes to the run folder and prints.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from llmdpd.errors import ElsewhereError, InputError, LostProcessError, StopRequestedError
from llmdpd.utils.cores import usable_cores
from llmdpd.utils.device import usable_gpus
from llmdpd.utils.local_exchange import LONGEST, LocalExchange, connected
from llmdpd.utils.meeting import fresh_store
from llmdpd.utils.shared_memory import Array, SharedMemory

T = TypeVar("T")
# The others wait while the first one collects data, for hours. By gloo one that dies is noticed at once, as its
# connections close; by NCCL torchrun ends the others.
_TIMEOUT = timedelta(days=7)
_PATIENCE = timedelta(minutes=10)  # with processes that start


@dataclass(frozen=True)
class _Place:
    """Which of `count` processes this one is, and which of those on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


_place = _Place()
_exchange: LocalExchange | None = None  # with all others, where they are on this machine
_memory: SharedMemory | None = None  # of all, where they are on this machine
_memories: list[SharedMemory] = []  # and those of runs that were joined before: tensors stay in them


def rank() -> int:
    """The number of this process, from 0."""
    return _place.rank


def count() -> int:
    """The number of processes of the run."""
    return _place.count


def cores() -> int:
    """The CPU cores that fall to this process."""
    return max(1, usable_cores() // _place.local_count)


def may_restart() -> bool:
    """Whether `torchrun` starts the processes again where one of them fails (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def joined() -> Iterator[None]:
    """While the block runs, the processes that `torchrun` started are one run; without it, this one is alone.

    All but the first are silent, errors and warnings of their own aside.

    Raises:
        LostProcessError: the others can't be reached.
    """
    global _place, _exchange, _memory
    from llmdpd.utils.progress import console  # of an extra, which acting does without

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    place = _Place(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))
    if place.count == 1:
        yield
        return
    gpus = usable_gpus()
    if gpus:
        with suppress(RuntimeError):  # one that does not work: `auto` finds that out, and the CPU does not need it
            torch.cuda.set_device(place.local_rank % gpus)
    with _talking():
        _connect(gpus)
    level, quiet = logging.getLogger("llmdpd").level, console.quiet
    if place.rank:
        console.quiet = True
        logging.getLogger("llmdpd").setLevel(logging.WARNING)
    try:
        _place = place
        if place.local_count == place.count:
            _exchange = connected(place.rank, place.count, told, _all_hold)
            _memory = SharedMemory(place.rank, told, _all_hold)
            _memories.append(_memory)
        yield
        together(lambda: None)  # none leaves while another one still talks
        dist.destroy_process_group()
    finally:
        _place = _Place()
        if _exchange is not None:
            _exchange.close()
        _exchange = _memory = None
        console.quiet = quiet
        logging.getLogger("llmdpd").setLevel(level)


def _connect(gpus: int) -> None:
    try:
        shared, own, count = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    except ValueError as error:  # some job systems set RANK and WORLD_SIZE, and nothing else
        hint = "start it by torchrun, or unset RANK and WORLD_SIZE"
        problem = "one of several processes does not know where the first is"
        raise InputError(problem, field="MASTER_ADDR, MASTER_PORT", found=str(error), hint=hint) from None
    # An optimiser imports it at its first use, and it keeps a process group that is there by then (torch 2.13): the
    # group's threads would work on while the interpreter ends, which aborts the process.
    importlib.import_module("torch._dynamo")
    backend = "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo"
    store = fresh_store(shared, own, count, _PATIENCE)
    dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=_TIMEOUT)


def check_device(device: torch.device) -> None:
    """Hold that every process on this machine has a device of its own.

    Raises:
        InputError: it does not.
    """
    if _place.count == 1 or device.type == "cpu":
        return
    if device.index is not None:
        found, expected = str(device), "cuda: each process takes the GPU of its number"
        raise InputError("several processes cannot share a GPU", field="device", found=found, expected=expected)
    if _place.local_count > (gpus := usable_gpus()):
        found, expected = f"{_place.local_count} processes and {gpus} GPUs", "a GPU for each process of a machine"
        raise InputError(
            "several processes cannot share a GPU", field="--nproc-per-node", found=found, expected=expected
        )


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that fall to this process: every `count`-th, from its own number on."""
    return items[_place.rank :: _place.count]


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """The items again of which each process had its `own_share`, in their order."""
    longest = max(map(len, parts))
    return [part[place] for place in range(longest) for part in parts if place < len(part)]


def together(work: Callable[[], T]) -> list[T]:
    """Do `work` in every process → what it returned in each, which must be JSON, in the order of their numbers.

    Raises:
        Exception: what this process's own work raised.
        ElsewhereError: that of another one failed.
        StopRequestedError: a stop was asked for in any of them.
        LostProcessError: one of them has ended.
    """
    if _place.count == 1:
        return [work()]
    error: Exception | None = None
    outcome: dict[str, Any] = {}
    try:
        outcome["result"] = work()
    except LostProcessError:
        raise
    except StopRequestedError as stopped:
        outcome["stop"] = stopped.signal_number
    except Exception as caught:
        error, outcome["exit_code"] = caught, 2 if isinstance(caught, InputError) else 1
    told = [json.loads(part) for part in _gathered(json.dumps(outcome).encode())]
    if error is not None:
        raise error
    for other in told:
        if "exit_code" in other:
            raise ElsewhereError(other["exit_code"])
    for other in told:
        if "stop" in other:
            raise StopRequestedError(other["stop"])
    return [other["result"] for other in told]


def first(work: Callable[[], T]) -> T | None:
    """Do `work` in the first process alone, while the others wait; what it returned there, None in the others.

    Raises: as `together`.
    """
    found: list[T] = []

    def here() -> None:
        if _place.rank == 0:
            found.append(work())

    together(here)
    return found[0] if found else None


def after_first(work: Callable[[], T]) -> T:
    """Do `work` in the first process, then in the others, which find what it left on the disk.

    Raises: as `together`.
    """
    found: list[T] = []

    def here(turn: bool) -> None:
        if turn:
            found.append(work())

    together(lambda: here(_place.rank == 0))
    if _place.count > 1:
        together(lambda: here(_place.rank > 0))
    return found[0]


def told(value: T | None) -> T:
    """The first process's value, which must be JSON, in every process."""
    return together(lambda: value)[0]  # type: ignore[return-value]


def greatest(number: int) -> int:
    """The greatest of the processes' numbers."""
    if _place.count == 1:
        return number
    if _exchange is not None:
        return max(struct.unpack("q", message)[0] for message in _exchanged(struct.pack("q", number)))
    given = torch.tensor([number])
    with _talking():
        dist.all_reduce(given, dist.ReduceOp.MAX)
    return int(given)


def check_same(what: str, digest: str) -> None:
    """Hold that all processes have the same.

    Raises:
        InputError: in all of them, where one has another digest.
    """
    digests = together(lambda: digest)
    if len(set(digests)) > 1:
        other = next(number for number, found in enumerate(digests) if found != digests[0])
        raise InputError(
            f"the processes of the run do not have the same {what}",
            found=f"{digests[other][:16]} in process {other}, {digests[0][:16]} in process 0",
            expected="the same in all",
            hint="start them on machines of one kind, with the same versions and the same files",
        )


def mean(values: Tensor) -> Tensor:
    """The mean over the processes of float numbers; where there is one, they themselves."""
    if _place.count == 1:
        return values
    total = values.clone()
    add_up(total)
    return total / _place.count


def add_up(values: Tensor) -> None:
    """Replace float numbers by their sums over the processes, in place: the same bits in all, and each time."""
    if _place.count == 1:
        return
    plain = values.is_cpu and values.is_contiguous() and values.dtype in (torch.float32, torch.float64)
    if _exchange is not None and plain and values.nbytes <= LONGEST:
        given = values.detach()
        parts = [np.frombuffer(message, given.numpy().dtype) for message in _exchanged(given.numpy().tobytes())]
        given.copy_(torch.from_numpy(sum(parts[1:], parts[0])).view(given.shape))
        return
    with _talking():
        dist.all_reduce(values)


def total(number: float) -> float:
    """The sum of the processes' numbers, in their order: the same bits in all."""
    if _exchange is not None:
        return sum(struct.unpack("d", message)[0] for message in _exchanged(struct.pack("d", number)))
    given = torch.tensor([number], dtype=torch.float64)
    add_up(given)
    return float(given)


def meet() -> None:
    """Wait until all processes are here: what they wrote to shared memory before can be read."""
    if _place.count == 1:
        return
    if _exchange is not None:
        _exchanged(b" ")
        return
    with _talking():
        dist.barrier()


def share_memory(what: str, tensors: Sequence[Tensor]) -> bool:
    """Let float32 tensors on the CPU, which all processes have alike, be the same memory in all of them.

    They stay the same objects. Whether they are: False in all processes where they are not all on one machine, or have
    no memory for it. Who writes to them then, writes to those of all: each process a part, between two meetings.

    Raises:
        InputError: in all processes, where one has other values.
    """
    return _memory is not None and _memory.take(tensors, lambda digest: check_same(what, digest))


def shares_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is the same memory in all processes (`share_memory`)."""
    return _memory is not None and any(map(_memory.has, tensors))


def shared_memory_once(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them was made so, in this run of the processes or in one that they have left since."""
    return bool(_memories) and any(memory.has(tensor) for tensor in tensors for memory in _memories)


def shares_all_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether all of them are."""
    return _memory is not None and all(map(_memory.has, tensors))


def shared_rows(numbers: int) -> Array | None:
    """At least so many float32 numbers for what processes of one machine hand each other between two meetings.

    The next call may give the same ones. None in all processes where they can't share memory.
    """
    return None if _memory is None else _memory.rows(numbers)


def _all_hold(here: bool) -> bool:
    return all(together(lambda: here))


def _exchanged(message: bytes) -> list[bytes]:
    """Every process's message of this length, where all are on one machine."""
    assert _exchange is not None
    with _talking():
        return _exchange.of(message)


def _gathered(payload: bytes) -> list[bytes]:
    """Every process's payload."""
    own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_place.count)]
    with _talking():
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = int(max(sizes))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"process {_place.rank} has lost another process of the run: {(str(error) or repr(error)).splitlines()[0]}"
            "\n  The last checkpoint is whole: start the processes again with --resume RUN, or all of them by torchrun"
            "\n  with --max-restarts and --run-dir."
        ) from error
