"""Messages between the processes of one machine: here between threads, each with the sockets of a process."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from llmdpd.errors import LostProcessError
from llmdpd.utils.local_exchange import LONGEST, LocalExchange, connected

T = TypeVar("T")
Patch = pytest.MonkeyPatch


class Processes:
    """So many threads that agree as processes do."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._meeting = threading.Barrier(count, timeout=60)
        self._said: list[Any] = [None] * count

    def all(self, work: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(self.count) as threads:
            return [future.result() for future in [threads.submit(work, rank) for rank in range(self.count)]]

    def connected(self, rank: int) -> LocalExchange | None:
        def gathered(value: Any) -> list[Any]:
            self._said[rank] = value
            self._meeting.wait()
            said = list(self._said)
            self._meeting.wait()
            return said

        return connected(rank, self.count, lambda value: gathered(value)[0], lambda here: all(gathered(here)))


@pytest.fixture(autouse=True)
def folder(monkeypatch: Patch) -> Any:
    """Where sockets' names are: short ones, as they must be, and none that stays."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="x") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert list(Path(name).iterdir()) == []


@pytest.mark.parametrize(("count", "awake"), [(2, 0.0), (3, 200e-6), (5, 10.0)])
def test_every_process_reads_every_message(
    count: int, awake: float, rng: np.random.Generator, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("llmdpd.utils.local_exchange._AWAKE", awake)
    processes = Processes(count)
    lengths = [1, 8, int(rng.integers(1, LONGEST)), LONGEST, 3]
    messages = [[rng.bytes(length) for _ in range(count)] for length in lengths]

    def work(rank: int) -> list[list[bytes]]:
        exchange = processes.connected(rank)
        assert exchange is not None
        found = [exchange.of(message[rank]) for message in messages]
        exchange.close()
        return found

    assert processes.all(work) == [messages] * count


def test_a_process_that_ends_is_noticed_by_all() -> None:
    processes = Processes(3)

    def work(rank: int) -> str:
        exchange = processes.connected(rank)
        assert exchange is not None
        exchange.of(b"x")
        if rank == 1:
            exchange.close()
            return ""
        with pytest.raises(LostProcessError) as caught:
            list(map(exchange.of, [b"y"] * 3))
        exchange.close()
        return str(caught.value)

    assert all(processes.all(work)[::2])


@pytest.mark.parametrize("fault", ["no folder", "a name that is too long", "no sockets", "one cannot connect"])
def test_where_one_has_no_sockets_none_uses_them(fault: str, monkeypatch: Patch, folder: Path) -> None:
    if fault == "no folder":
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    elif fault == "no sockets":
        monkeypatch.setattr("socket.socket", lambda family: (_ for _ in ()).throw(OSError("too many open files")))
    elif fault == "one cannot connect":
        monkeypatch.setattr("llmdpd.utils.local_exchange._PATIENCE", 0.2)
        monkeypatch.setattr("socket.socket.connect", lambda *arguments: (_ for _ in ()).throw(OSError("refused")))
    else:
        long = folder / ("n" * 120)
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
    processes = Processes(3)
    assert processes.all(processes.connected) == [None] * 3
    for left in folder.iterdir():
        left.rmdir()  # is empty


def test_sockets_without_room_are_not_used(monkeypatch: Patch) -> None:
    monkeypatch.setattr("llmdpd.utils.local_exchange._BUFFER", 1)
    monkeypatch.setattr("llmdpd.utils.local_exchange._PATIENCE", 0.2)
    processes = Processes(2)
    assert processes.all(processes.connected) == [None, None]
