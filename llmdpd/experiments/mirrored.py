"""`python -m llmdpd.experiments.mirrored URL FOLDER LOG COMMAND…`: a step of a run whose folder is mirrored.

The folder is fetched, the command runs in it, and each new checkpoint is mirrored while it runs, all else at its end.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.experiments.mirror import Mirror, TakenOverError, newest_checkpoint
from llmdpd.experiments.stores import PATIENCE_SECONDS, SECONDS_BETWEEN_QUESTIONS, UnreachableError
from llmdpd.experiments.worker import start_process

_POLL_SECONDS = 0.5


def words(mirror: Mirror, folder: Path, log: Path, argv: list[str]) -> list[str]:
    """The command line of a step, `argv` from the interpreter on, whose run is mirrored."""
    module = "llmdpd.experiments.mirrored"
    return [argv[0], "-m", module, mirror.url, str(folder.absolute()), str(log.absolute()), *argv[1:]]


def take_log(mirror: Mirror, name: str, log: Path) -> None:
    """Append what a step has printed on another machine to its log on this one."""
    text = mirror.read_log(name)
    if text.split("\n", 1)[0] not in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with log.open("a", encoding="utf-8") as file:
            file.write(text)


def main(arguments: Sequence[str]) -> int:
    """The exit code of the command; 2 where the run could not be fetched or mirrored."""
    url, folder, log, *command = arguments
    try:
        return _run(Mirror(url), Path(folder), Path(log), command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(mirror: Mirror, folder: Path, log: Path, command: list[str]) -> int:
    mark = f"# mirrored: {secrets.token_hex(8)}"
    print(mark, flush=True)
    stopped: list[int] = []  # the signals: no lock is taken where one may have come in the middle of another
    _patiently(partial(mirror.claim, folder), stopped)
    checkpoint = newest_checkpoint(folder)
    process = start_process([sys.executable, *command], sys.stdout)

    def stop(number: int, _: Any) -> None:
        process.terminate()
        stopped.append(number)

    signal.signal(signal.SIGTERM, stop)
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        if newest_checkpoint(folder) != checkpoint:
            checkpoint = newest_checkpoint(folder)
            _push(mirror, folder, log, mark, process)
    _patiently(partial(mirror.push, folder), stopped)
    _patiently(lambda: mirror.write_log(folder.name, _printed(log, mark)), stopped)
    return process.returncode


def _patiently(work: Callable[[], None], stopped: Sequence[int]) -> None:
    """Do it again while the store does not answer, unless a stop was asked for: what the run has done is here alone."""
    begin = time.monotonic()
    while True:
        try:
            return work()
        except UnreachableError as error:
            if time.monotonic() - begin >= PATIENCE_SECONDS:
                raise
            print(f"the store is asked again: {error}", file=sys.stderr, flush=True)
            again = time.monotonic() + SECONDS_BETWEEN_QUESTIONS
            while time.monotonic() < again:
                if stopped:
                    raise
                time.sleep(_POLL_SECONDS)


def _push(mirror: Mirror, folder: Path, log: Path, mark: str, process: subprocess.Popen[str]) -> None:
    """Mirror a run that goes on, also where it could not be mirrored this time."""
    try:
        mirror.push(folder)
        mirror.write_log(folder.name, _printed(log, mark))
    except TakenOverError:
        process.terminate()
        process.wait()
        raise
    except InputError as error:
        print(f"not mirrored, until the next checkpoint: {error}", file=sys.stderr)


def _printed(log: Path, mark: str) -> str:
    """What was printed from the mark on."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return text[text.rindex(mark) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
