"""`python tests/fuzz/soak.py`: commands that are killed, stopped or run on a full disk, again and again; a table.

Each run is disturbed, continued as a user would, and held against a run that was never disturbed. The choices follow
from --seed; when a moment comes, what the command is doing does not. The exit code is 1 where anything was found, 2
where full disks cannot be tried, since file systems cannot be mounted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import forks
import numpy as np
import soak_jobs
from forks import Command
from soak_jobs import Job

LIMIT = 90.0
"""Seconds after which a command that is not disturbed any more is stuck."""
_STEP, _EPISODE = 2.0, 5.0
"""Time limits of workers."""
_STAYS = 12.0
"""Seconds within which a killed command's processes must be gone."""
_BECOMES = 0.05
"""Seconds in which a fork has become what it stands for."""
_KILLS = 6
_ROOM = "size=16m,nr_inodes=4096"
_TABLE = ("disturbed", "runs", "equal", "different", "lost", "stuck", "signals", "tracebacks", "files", "processes")


@dataclass
class Straight:
    """A run that was not disturbed: its result, its files, and how much there is to disturb.

    bytes, inodes: of its file system, in use at its start and at most; of a file system of its own only.
    """

    result: object
    files: set[str]
    seconds: float
    operations: int
    bytes: tuple[int, int]
    inodes: tuple[int, int]


@dataclass
class Case:
    """One run, disturbed; `faults` are what the table counts, `notes` what they were."""

    job: Job
    straight: Straight
    rng: np.random.Generator
    place: Path
    log: Path
    disturbed: int = 0
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def start(self, *, kill_at: int = 0, first: bool = False) -> Command:
        words = (self.job.begin if first else self.job.go_on)(self.place)
        limits = {"LLMDPD_STEP_SECONDS": str(_STEP), "LLMDPD_EPISODE_SECONDS": str(_EPISODE)}
        self.commands.append(Command(words, self.log, self.place, kill_at, limits))
        return self.commands[-1]

    def fault(self, kind: str, note: str) -> None:
        self.faults[kind] += 1
        self.notes += [f"{kind}: {note}"] if note else []

    def ended(self, command: Command, *, expected: tuple[int, ...] = (0,)) -> bool:
        """Wait for the command's end; whether it is as expected."""
        code = command.wait(LIMIT)
        if code is None:
            self.fault("stuck", f"over {LIMIT:.0f} s")
            command.kill_group()
            return False
        if code < 0:
            self.fault("signals", signal.Signals(-code).name)
        elif code not in expected:
            self.fault("lost", f"exit code {code}")
        return code in expected

    def finish(self) -> None:
        """Continue to the end, and hold what is there against the straight run."""
        if self.ended(self.start()):
            self.compare()

    def compare(self) -> None:
        try:
            found = self.job.result(self.place)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        same = found == self.straight.result
        self.fault("equal" if same else "different", "" if same else ", ".join(_differing(found, self.straight.result)))
        if more := sorted(files_in(self.place) - self.straight.files):
            self.fault("files", ", ".join(more[:4]))

    @property
    def logs(self) -> list[Path]:
        """What the command wrote, and an experiment's runs."""
        return [self.log, *self.place.rglob("*.log")]

    def close(self) -> None:
        """What is left of processes, and what was written of tracebacks."""
        end = time.monotonic() + _STAYS
        while (left := [pid for command in self.commands for pid in command.left()]) and time.monotonic() < end:
            forks.reap()
            time.sleep(0.05)
        if left:
            self.fault("processes", ", ".join(map(_described, left)))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        forks.reap()
        for log in self.logs:
            text = log.read_text(errors="replace")
            if at := text.count("Traceback (most recent call last)"):
                self.fault("tracebacks", f"{at}: {text[text.rindex('Traceback') :][-1500:]}")


def _differing(found: object, expected: object, name: str = "") -> Iterator[str]:
    """The innermost parts in which two results differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() | expected.keys():
            yield from _differing(found.get(key), expected.get(key), f"{name}/{key}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, parts in enumerate(zip(found, expected, strict=True)):
            yield from _differing(*parts, f"{name}/{number}")
    elif found != expected:
        yield f"{name}: {str(found)[:80]}, not {str(expected)[:80]}"


def files_in(place: Path) -> set[str]:
    """Files and folders below it, but for those named by when a process began, or where it stopped."""
    names = (str(path.relative_to(place)) for path in place.rglob("*"))
    return {name for name in names if not re.search(r"replay/steps-[\d-]+\.npz$|tensorboard/events\.", name)}


def _described(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"process {pid} in state {state[0]}"
    except OSError:
        return f"process {pid}"


def kill_command(case: Case) -> None:
    """SIGKILL, up to six times, to the whole group or to the command alone, at a moment or at a file operation."""
    for number in range(int(case.rng.integers(1, _KILLS + 1))):
        share = case.rng.uniform() / (1 + 0.5 * number)
        if case.rng.uniform() < 0.5:
            command = case.start(kill_at=1 + int(share * case.straight.operations), first=not number)
            code = command.wait(LIMIT)
        else:
            command = case.start(first=not number)
            code = command.wait(share * case.straight.seconds)
            if code is None:
                command.look()
                group = case.rng.uniform() < 0.6
                os.killpg(command.process.pid, signal.SIGKILL) if group else command.process.kill()
                code = command.process.wait()
        if code is None:
            case.fault("stuck", "while it was to be killed")
            command.kill_group()
            return
        if code == 1 and "experiment" in case.job.begin(case.place)[0]:
            case.disturbed += 1  # one of its runs was
            continue
        if code != -signal.SIGKILL:
            if code:
                case.fault("lost", f"exit code {code} before the kill")
                return
            break
        case.disturbed += 1
    case.finish()


def _a_worker(case: Case, command: Command, runs: bool) -> int | None:
    """A worker, or with `runs` a run of an experiment, at a moment of the command; None where it ended before."""
    command.wait(case.rng.uniform(0, 0.8) * case.straight.seconds)
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for pid in command.look() if runs or not forks.leads_session(pid)]
        return bool(found)

    if command.wait(LIMIT, until=there) is not None or not found:
        return None
    time.sleep(_BECOMES)
    return found[int(case.rng.integers(len(found)))]


def _signal_workers(case: Case, number: int) -> Command:
    command = case.start(first=True)
    # Three deaths in one episode are given up.
    for _ in range(int(case.rng.integers(1, 3))):
        worker = _a_worker(case, command, number == signal.SIGKILL)
        if worker is None or not forks.send(worker, number):
            break
        case.disturbed += 1
    return command


def kill_worker(case: Case) -> None:
    """SIGKILL to workers, or to an experiment's runs; the command makes up for workers."""
    _end_or_again(case, _signal_workers(case, signal.SIGKILL))


def stop_worker(case: Case) -> None:
    """SIGSTOP to workers: they are replaced after their time; or meanwhile SIGTERM, or SIGKILL, to the command."""
    command, way = _signal_workers(case, signal.SIGSTOP), case.rng.uniform()
    if not case.disturbed or way < 0.5:
        _end_or_again(case, command)
        return
    command.wait(case.rng.uniform() * _STEP)
    command.look()
    number = signal.SIGTERM if way < 0.8 else signal.SIGKILL
    case.disturbed += forks.send(command.process.pid, number)
    code = command.wait(LIMIT)
    if code == -signal.SIGKILL == -number or case.ended(command, expected=(0, 143)):
        case.finish()


def _end_or_again(case: Case, command: Command) -> None:
    experiment = case.job.begin(case.place)[0] == "experiment"
    if not case.ended(command, expected=(0, 1) if experiment else (0,)):
        return
    case.finish() if experiment else case.compare()


def stop_all(case: Case) -> None:
    """SIGSTOP to the command and its workers for longer than a worker may take, then SIGCONT, as by Ctrl-Z and fg."""
    command = case.start(first=True)
    if command.wait(case.rng.uniform() * case.straight.seconds) is None:
        case.disturbed += 1
        processes = [command.process.pid, *command.look()]
        for pid in processes:
            forks.send(pid, signal.SIGSTOP)
        time.sleep(_EPISODE + 0.5)
        for pid in reversed(processes):
            forks.send(pid, signal.SIGCONT)
    if case.ended(command):
        case.compare()


def fill_disk(case: Case) -> None:
    """The folder's file system is too small, in bytes or in files, or others fill it up at a moment; then it is not."""
    way, share, straight = case.rng.uniform(), case.rng.uniform(), case.straight
    if way < 0.65:
        # Of the sizes, less than a page more than is in use already cannot be set.
        option, unit, (low, high) = ("size", 4096, straight.bytes) if way < 0.45 else ("nr_inodes", 1, straight.inodes)
        _remount(case.place, f"{option}={low + unit * (1 + int(share * (high - low) / unit))}")
    command, ballast = case.start(first=True), case.place / "ballast"
    if way >= 0.65 and command.wait(share * straight.seconds) is None:
        with contextlib.suppress(OSError), ballast.open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
    if not case.ended(command, expected=(0, 1, 2)):
        return
    if command.process.returncode:
        case.disturbed += 1
        if "error: " not in "".join(log.read_text(errors="replace") for log in case.logs):
            case.fault("lost", f"no error is told, exit code {command.process.returncode}")
    ballast.unlink(missing_ok=True)
    _remount(case.place, _ROOM)
    case.finish()


KINDS: dict[str, dict[str, Callable[[Case], None]]] = {
    "kill": {"killed": kill_command, "a worker killed": kill_worker},
    "stop": {"a worker stopped": stop_worker, "stopped and continued": stop_all},
    "disk": {"a full disk": fill_disk},
}
"""By the name of --kind: what is done, as the table says it."""


@contextmanager
def _mounted(place: Path) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", _ROOM, "none", str(place)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@contextmanager
def _folder(place: Path, own_disk: bool) -> Iterator[None]:
    """An empty folder while the block runs, of a file system of its own or not."""
    if own_disk:
        with _mounted(place):
            yield
        return
    place.mkdir()
    yield
    shutil.rmtree(place)


def can_mount(folder: Path) -> bool:
    """Whether file systems can be mounted here."""
    try:
        with _mounted(folder / "tried"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def run_straight(job: Job, place: Path, log: Path, own_disk: bool) -> Straight:
    """A run that is not disturbed; ends the process where it fails."""
    with _folder(place, own_disk):
        job.prepare(place)
        start = _used(place)
        most = [start]
        command = Command(job.begin(place), log, place, 0, {})
        code = command.wait(LIMIT, until=lambda: most.append(tuple(map(max, most.pop(), _used(place)))) or False)
        if code != 0:
            sys.exit(f"it fails without any disturbance, exit code {code}: {log.read_text()}")
        sizes = [(a, b) for a, b in zip(start, most[0], strict=True)]
        return Straight(job.result(place), files_in(place), command.seconds, command.operations, sizes[0], sizes[1])


def _used(place: Path) -> tuple[int, int]:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree


class Soak:
    """Cases of jobs and kinds in turn; what became of them.

    Args:
        folder: empty, for all files.
        seed: of all choices.
        only: beginning of the jobs' names.
    """

    def __init__(self, folder: Path, seed: int, only: str) -> None:
        self._folder, self._seed = folder, seed
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        data = folder / "data"
        soak_jobs.write_data(data)
        self._jobs = {name: job for name, job in soak_jobs.jobs(data).items() if name.startswith(only)}
        if "evaluate" in self._jobs:
            log = folder / "first.log"
            command = Command(soak_jobs.jobs(data)["train"].begin(data), log, data, 0, {})
            if command.wait(LIMIT) != 0:
                sys.exit(f"the run that is to be evaluated fails: {log.read_text()}")
        self._straight: dict[tuple[str, bool], Straight] = {}
        self.counts: dict[tuple[str, str], collections.Counter[str]] = {}
        self.faults = 0

    def run(self, kind: str, number: int, end: float | None = None) -> None:
        """A case of every job, and of everything of the kind that is done to it, until a time of the monotonic clock.

        `number` tells rounds apart.
        """
        for name, job in self._jobs.items():
            for what, disturb in KINDS[kind].items():
                if end is not None and time.monotonic() > end:
                    continue
                self._case(name, job, what, disturb, number, own_disk=kind == "disk")

    def _case(
        self, name: str, job: Job, what: str, disturb: Callable[[Case], None], number: int, own_disk: bool
    ) -> None:
        place, log = self._folder / "case", self._folder / "case.log"
        key = name, own_disk
        if key not in self._straight:
            self._straight[key] = run_straight(job, place, log, own_disk)
        log.write_bytes(b"")
        rng = np.random.default_rng([self._seed, zlib.crc32(f"{name} {what}".encode()), number])
        with _folder(place, own_disk):
            job.prepare(place)
            case = Case(job, self._straight[key], rng, place, log)
            disturb(case)
            case.close()
        counts = self.counts.setdefault((name, what), collections.Counter())
        counts += case.faults
        counts["disturbed"] += case.disturbed
        counts["runs"] += 1
        if case.faults.keys() != {"equal"}:
            self.faults += 1
            print(f"{name}, {what}, round {number}, seed {self._seed}:", *case.notes, sep="\n  ", flush=True)
            print(log.read_text(errors="replace")[-3000:], flush=True)

    def print_table(self) -> None:
        """Jobs and kinds in rows, Markdown."""
        print(f"| command | what | {' | '.join(_TABLE)} |")
        print(f"| --- | --- |{' ---: |' * len(_TABLE)}")
        for (name, what), counts in self.counts.items():
            print(f"| {name} | {what} | {' | '.join(str(counts[column]) for column in _TABLE)} |")
        total = sum(self.counts.values(), collections.Counter())
        print(f"| all | | {' | '.join(str(total[column]) for column in _TABLE)} |", flush=True)


def main() -> int:
    """Disturb, print the table; 0 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz/soak.py", description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="of each command, and of each thing done to it")
    parser.add_argument("--first", type=int, default=0, help="number of the first round, to repeat one")
    parser.add_argument("--minutes", type=float, help="instead: as many as fit in")
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--only", default="", help="commands whose names begin so")
    options = parser.parse_args()
    forks.prepare()
    # Not `TemporaryDirectory`, which the forks would remove at their exits.
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        return _soak(folder, options)
    finally:
        shutil.rmtree(folder)


def _soak(folder: Path, options: argparse.Namespace) -> int:
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    refused = "disk" in kinds and not can_mount(folder)
    if refused:
        print("full disks are not tried: file systems cannot be mounted here", file=sys.stderr)
        kinds.remove("disk")
    soak = Soak(folder, options.seed, options.only)
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    try:
        for number in itertools.count(options.first):
            for kind in kinds:
                soak.run(kind, number, end)
            if number + 1 == options.first + options.runs if end is None else time.monotonic() > end:
                break
    finally:
        soak.print_table()
    return 1 if soak.faults else 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
