"""Commands of the package as forks of a process that has imported everything: each starts in milliseconds.

What a command starts itself (workers, an experiment's runs) are forks as well, with the process groups, signals, open
files and environment that they have as fresh processes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmdpd.__main__ as commands
from llmdpd.experiments.executors import local
from llmdpd.tasks.simulation import channel, worker
from llmdpd.utils import files

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK = 0.004
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_MOST_FILES = 256
# What commands import when they first need it.
_LATER = (
    *(f"llmdpd.cli.{name}" for name in commands.COMMANDS),
    *("torch._inductor", "torch._dynamo", "torch.utils.tensorboard", "torch.onnx", "transformers", "huggingface_hub"),
    *("metaworld", "mujoco", "minari", "h5py", "gymnasium", "jinja2", "matplotlib.pyplot", "stable_baselines3"),
    *("llmdpd.tasks.demonstrators", "llmdpd.tasks.metaworld.environment", "llmdpd.data.collecting.sac_trainer"),
    *("llmdpd.reporting.page", "llmdpd.experiments.page", "llmdpd.experiments.pictures"),
)


class Forked:
    """A fork of this process, and what the package uses of `subprocess.Popen`."""

    def __init__(
        self,
        body: Callable[[], int],
        *,
        keep: tuple[int, ...] = (),
        output: int | None = None,
        environment: dict[str, str] | None = None,
        session: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(body, keep, output, environment, session)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float = 1e9) -> int | None:
        """The exit code, a negative signal where one ended it; None where it is still there after so long."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(_LOOK)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(
    body: Callable[[], int],
    keep: tuple[int, ...],
    output: int | None,
    environment: dict[str, str] | None,
    session: bool,
) -> None:
    """The child's life; does not return."""
    code = 1
    try:
        if session:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2) if output is not None else ():
            os.dup2(output, stream)
        # An inherited lock would be held for as long as this process lives, an inherited socket never be at its end.
        for descriptor in range(3, _MOST_FILES):
            if descriptor not in keep:
                os.closerange(descriptor, descriptor + 1)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        files._cleaned.clear()
        code = body()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def _worker(command: list[str], stdin: int, pass_fds: list[int], env: dict[str, str]) -> Forked:
    """In place of `subprocess.Popen` for workers: their main function in a fork."""
    *_, descriptor, parent, _path = command
    assert pass_fds == [int(descriptor)]

    def body() -> int:
        _operations.own = False
        worker.main(int(descriptor), int(parent))
        return 0

    return Forked(body, keep=(int(descriptor),), environment=env)


def _step(argv: list[str], log: Any, cuda: int | None = None) -> Forked:
    """In place of the local executor's `start_process`: a command in a session of its own that ends with its parent."""
    parent = os.getpid()

    def body() -> int:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return 128 + signal.SIGTERM
        return commands.main([argv[2].removeprefix("llmdpd."), *argv[3:]])

    return Forked(body, output=log.fileno(), session=True)


class _Operations:
    """Counts, over all processes of a command, the operations on files below a folder; kills at one of them."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)
        self._place, self._at, self.own = "", 0, False
        sys.addaudithook(self._hook)

    def begin(self, place: Path, at: int) -> None:
        """In the command's own process; `clear` before."""
        self._place, self._at, self.own = f"{place}/", at, True

    def clear(self) -> None:
        self._shared[:] = bytes(8)

    @property
    def count(self) -> int:
        return int(struct.unpack("q", self._shared[:])[0])

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.own or not _changes(event, arguments) or self._place not in _named(arguments):
            return
        count = self.count + 1
        self._shared[:] = struct.pack("q", count)
        if count == self._at:
            os.killpg(0, signal.SIGKILL)


def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def _named(arguments: tuple[Any, ...]) -> str:
    return " ".join(os.fspath(word) for word in arguments if isinstance(word, (str, os.PathLike)))


_operations = _Operations()


class Command:
    """A command of the package, in a session of its own, with its output in a file.

    Args:
        words: as of a shell, without `llmdpd`.
        log: what it writes; appended to.
        place: folder in which operations on files are counted.
        kill_at: number of the operation before which the whole process group is killed; 0: none.
        environment: additional variables.
    """

    def __init__(self, words: list[str], log: Path, place: Path, kill_at: int, environment: dict[str, str]) -> None:
        self.log, self.start = log, time.monotonic()

        def body() -> int:
            _operations.begin(place, kill_at)
            return commands.main(words)

        _operations.clear()
        with log.open("ab") as file:
            file.write(f"$ {' '.join(words)}\n".encode())
            file.flush()
            self.process = Forked(body, output=file.fileno(), environment={**os.environ, **environment}, session=True)
        self.seen = {self.process.pid}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def operations(self) -> int:
        return _operations.count

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
        """Wait for its end, at most so long, or until the condition holds; the exit code where it has ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end and not until():
            self.look()
            time.sleep(_LOOK)
        return self.process.poll()

    def look(self) -> list[int]:
        """The processes below this one now, nearest first."""
        found = list(_below(self.process.pid))
        self.seen.update(found)
        return found

    def left(self) -> list[int]:
        """Its processes that are still there."""
        return [pid for pid in self.seen if _is_running(pid)]

    def kill_group(self) -> None:
        for pid in (self.process.pid, *self.look()):
            send(pid, signal.SIGKILL)
        self.process.wait()


def _below(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    yield from map(int, children)
    for child in children:
        yield from _below(int(child))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def leads_session(pid: int) -> bool:
    """Whether it is no worker, but a command."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return True


def send(pid: int, number: int) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def prepare() -> None:
    """From here on commands are forks; this process takes up those whose parent dies."""
    for name in _LATER:
        with contextlib.suppress(ImportError):  # stable-baselines3 is an extra
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has the thread alone that forked"
    channel.subprocess = SimpleNamespace(Popen=_worker, DEVNULL=-3)  # type: ignore[assignment]
    local.start_process = _step  # type: ignore[assignment]
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap() -> None:
    """Take note of the ends of processes whose parent died."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
