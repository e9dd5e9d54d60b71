"""Runs cases in a process of their own, under limits of memory and time, and says what became of each."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import resource
import select
import signal
import struct
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MEMORY = 2 << 30
"""Bytes that one case may take."""
SECONDS = 30.0
"""After them a case hangs."""
_BATCH = 1000

Case = Callable[[np.random.Generator], object]

_HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    prepare: (an empty folder) → the function that runs one case, all of whose choices its generator makes.
    clear: exceptions that are a clear answer to input that can't be used.
    """

    prepare: Callable[[Path], Case]
    clear: tuple[type[BaseException], ...]


@dataclass
class Outcome:
    """What became of the cases of one target: counts by kind, and of each fault the first case that shows it."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: dict[str, int] = field(default_factory=dict)


def generator(name: str, number: int) -> np.random.Generator:
    """Of a case: the same wherever and in whatever order it runs."""
    return np.random.default_rng([zlib.crc32(name.encode()), number])


def run_cases(name: str, target: Target, numbers: Sequence[int]) -> Outcome:
    """Run these cases of a target, each the same whenever it has the same number."""
    outcome, left = Outcome(), list(numbers)
    while left:
        done = 0
        for kind, detail in _in_process(name, target, left[:_BATCH]):
            outcome.counts[kind] += 1
            if kind not in ("read", "refused"):
                outcome.faults.setdefault(f"{kind}: {detail}", left[done])
            done += 1
        left = left[done:]
    return outcome


def _in_process(name: str, target: Target, numbers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """The results of cases in order; after one that kills or hangs the process, no more."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _child(name, target, numbers, Path(folder), send)
        os.close(send)
        try:
            for _ in numbers:
                got = _next_result(receive)
                yield got if got is not None else ("died", _death(child))
                if got is None or got[0] in ("hangs", "memory", "not prepared"):
                    return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
            os.close(receive)


def _next_result(receive: int) -> tuple[str, str] | None:
    """One result; None where the process has ended."""
    # Preparing the files is within the first case's time.
    ready, _, _ = select.select([receive], [], [], 2 * SECONDS)
    if not ready:
        return "hangs", f"over {SECONDS:.0f} s"
    head = os.read(receive, 4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    body = b""
    while len(body) < size:
        body += os.read(receive, size - len(body))
    kind, detail = pickle.loads(body)
    return kind, detail


def _death(child: int) -> str:
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def _child(name: str, target: Target, numbers: Sequence[int], folder: Path, send: int) -> None:
    """Prepare, and run the cases; never returns."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.environ |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        place = folder / "files"
        place.mkdir()
        case = target.prepare(place)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        # Twice as much, so that a reader that answers a refused allocation is seen to have taken too much all the same.
        limit = pages * resource.getpagesize() + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = _peak()
        for number in numbers:
            result = _judged(case, target, generator(name, number))
            if _peak() - before > MEMORY:
                result = "memory", f"{(_peak() - before) / 2**30:.1f} GB"
            _tell(send, result)
            if result[0] == "memory":
                break  # the peak stays; the rest is run in a new process
        code = 0
    except BaseException:
        _tell(send, ("not prepared", traceback.format_exc()))
    finally:
        os._exit(code)


def _tell(send: int, result: tuple[str, str]) -> None:
    body = pickle.dumps(result)
    os.write(send, struct.pack("<I", len(body)) + body)


def _peak() -> int:
    """The most memory, in bytes, that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _judged(case: Case, target: Target, rng: np.random.Generator) -> tuple[str, str]:
    start = time.monotonic()
    kind, detail = "read", ""
    try:
        case(rng)
    except target.clear:
        kind = "refused"
    except MemoryError as error:
        kind, detail = "memory", _place_of(error)
    except BaseException as error:
        # torch has no class of its own for it.
        kind = "memory" if "allocate memory" in str(error) else "unclear"
        detail = _place_of(error)
    if time.monotonic() - start > SECONDS:
        kind, detail = "slow", f"over {SECONDS:.0f} s"
    return kind, detail


def _place_of(error: BaseException) -> str:
    """The error's class, where in the project it came through, and the beginning of its text."""
    # Of the package: these files may lie below a folder of its name.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/llmdpd/" in f.filename.replace(_HERE, "")]
    at = f"{frames[-1].filename.rsplit('/llmdpd/', 1)[1]}:{frames[-1].lineno}" if frames else "outside"
    return f"{type(error).__name__} at {at}"
