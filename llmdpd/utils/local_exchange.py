"""Short messages between the processes of one machine, each to all others, by Unix sockets.

Gloo hands each message to a thread of its own, which on a machine without a free core waits for one: a meeting took a
tenth of a training iteration. Here a process writes and reads by itself, and sleeps until what it waits for is there.
As with gloo, a process that ends is noticed at once, because its sockets close.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from llmdpd.errors import LostProcessError

_log = logging.getLogger(__name__)
_LEFT_OUT = "messages between the processes go through the network: %s"
_RANK_BYTES = 4
_PATIENCE = 60.0  # seconds, with processes that connect

_AWAKE = 200e-6  # seconds of looking for a message before sleeping: to be woken takes longer than most are awaited

LONGEST = 1 << 12
"""Bytes of a message. All write before they read, and may be one message ahead: two must be taken unread."""
_BUFFER = 16 * LONGEST  # bytes that are asked for; some systems have 8 KiB where nothing is said


class LocalExchange:
    """The sockets from this process to the others, in the order of the processes; None in its own place."""

    def __init__(self, sockets: Sequence[socket.socket | None]) -> None:
        self._sockets = sockets

    def of(self, message: bytes) -> list[bytes]:
        """Every process's message, in their order; all have the same length, at most `LONGEST`.

        Raises:
            LostProcessError: another process has ended.
        """
        assert len(message) <= LONGEST, len(message)
        try:
            for other in self._sockets:
                if other is not None:
                    other.sendall(message)
            return [message if other is None else _read(other, len(message)) for other in self._sockets]
        except OSError as error:
            raise LostProcessError(str(error) or repr(error)) from error

    def close(self) -> None:
        """Close the sockets."""
        for other in self._sockets:
            if other is not None:
                other.close()


def connected(
    rank: int, count: int, told: Callable[[str | None], str], all_hold: Callable[[bool], bool]
) -> LocalExchange | None:
    """The exchange of `count` processes, all on this machine; None in all of them where one can't have it.

    Args:
        rank: this process. told: the first process's value, in every process.
        all_hold: whether something holds in every process; waits for all.
    """
    name = told(_made() if rank == 0 else None)
    if not name:
        return None
    folder = Path(name)
    sockets: list[socket.socket | None] = [None] * count
    exchange = LocalExchange(sockets)
    with ExitStack() as meanwhile:
        if rank == 0:
            meanwhile.callback(shutil.rmtree, folder, ignore_errors=True)
        unused = meanwhile.enter_context(ExitStack())
        unused.callback(exchange.close)
        listener = _listening(folder / str(rank), count)
        if listener is not None:
            meanwhile.enter_context(listener)
        if all_hold(listener is not None) and all_hold(_connect(listener, folder, rank, sockets)):
            unused.pop_all()
            return exchange
    return None


def _made() -> str:
    """A folder for the sockets' names; "" where there are no such sockets, or no room for their names."""
    if not hasattr(socket, "AF_UNIX"):
        return ""
    try:
        return tempfile.mkdtemp(prefix="llmdpd-")
    except OSError as error:
        _log.info(_LEFT_OUT, error)
        return ""


def _listening(place: Path, count: int) -> socket.socket | None:
    with ExitStack() as unused:
        try:
            listener = unused.enter_context(socket.socket(socket.AF_UNIX))
            listener.settimeout(_PATIENCE)
            listener.bind(str(place))  # a long name is refused: sockets' names have about a hundred bytes
            listener.listen(count)
        except OSError as error:
            _log.info(_LEFT_OUT, error)
            return None
        unused.pop_all()
        return listener


def _connect(listener: socket.socket | None, folder: Path, rank: int, sockets: list[socket.socket | None]) -> bool:
    """Make the sockets: to those before by connecting to them, to those behind by waiting for them."""
    assert listener is not None
    try:
        for other in range(rank):
            sockets[other] = own = _prepared(socket.socket(socket.AF_UNIX))
            own.connect(str(folder / str(other)))
            own.sendall(rank.to_bytes(_RANK_BYTES, "little"))
        while None in sockets[rank + 1 :]:
            own = _prepared(listener.accept()[0])
            sockets[int.from_bytes(_read(own, _RANK_BYTES), "little")] = own
    except OSError as error:
        _log.info(_LEFT_OUT, error)
        return False
    for each in filter(None, sockets):
        each.settimeout(None)  # an evaluation takes as long as it takes
    return True


def _prepared(own: socket.socket) -> socket.socket:
    """The socket with room for messages that nobody has read. Raises OSError where the system gives none."""
    own.settimeout(_PATIENCE)
    for kind in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        own.setsockopt(socket.SOL_SOCKET, kind, _BUFFER)
        if (given := own.getsockopt(socket.SOL_SOCKET, kind)) < 4 * LONGEST:
            own.close()
            raise OSError(f"a socket's buffer has {given} bytes")
    return own


def _received(other: socket.socket, length: int) -> bytes:
    """At most so many bytes, at least one; none where the other one has closed."""
    end = time.perf_counter() + _AWAKE
    while time.perf_counter() < end:
        try:
            return other.recv(length, socket.MSG_DONTWAIT)
        except BlockingIOError:
            os.sched_yield()
    return other.recv(length)


def _read(other: socket.socket, length: int) -> bytes:
    """So many bytes. Raises ConnectionError where the other one has closed."""
    parts = bytearray()
    while len(parts) < length:
        part = _received(other, length - len(parts))
        if not part:
            raise ConnectionError("its connection is closed")
        parts += part
    return bytes(parts)
