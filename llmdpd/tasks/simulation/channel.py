"""Starting a worker process with one end of a connection, and that end's other side in the worker.

What is here for Windows has been type-checked, and has not been run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if sys.platform == "win32":
    from multiprocessing.connection import Pipe
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection

__all__ = ["Connection", "connect_parent", "start_worker"]

# A worker that is stopped in the middle of a message must not hold its parent up in it.
_MESSAGE_SECONDS = 60
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_worker(
    boot: Sequence[str], words: Sequence[str], environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], Connection[Any, Any]]:
    """Start a process that Ctrl-C does not reach; it, and the connection to it.

    Args:
        boot: the command's beginning; two words follow, which `connect_parent` takes: the number of the process's end
            of the connection, and this process's id.
        words: the command's end.
        environment: of the process.
    """
    if sys.platform == "win32":
        ours, theirs = Pipe()
        with theirs:
            handle = theirs.fileno()
            os.set_handle_inheritable(handle, True)
            startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
            process = subprocess.Popen(
                [*boot, str(handle), str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                env=environment,
                startupinfo=startup,
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
            )
        return process, ours
    end, other = socket.socketpair()
    with end, other:
        for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", _MESSAGE_SECONDS, 0))
        # Ctrl-C reaches the whole group: the worker has it blocked from before it can ignore it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                [*boot, str(other.fileno()), str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env=environment,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return process, Connection(end.detach())


def connect_parent(number: int) -> Connection[Any, Any]:
    """In a worker: the connection to its parent, whose end has this number. From here on it ignores Ctrl-C."""
    # Ctrl-C reaches the whole process group; the parent decides what happens to its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker that is stopped goes on when its parent is killed, and sees that there is none.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    # For what the environments start themselves; the parent has blocked it.
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return Connection(number)
