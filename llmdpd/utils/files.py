"""Atomic writes (temporary name, fsync, rename), locks among processes, JSON files and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from llmdpd.errors import InputError, abridged
from llmdpd.utils.system import is_alive, lock_folder, sync, try_lock

_LOCK_POLL_SECONDS = 0.2
_LONGEST_TEXT = 1 << 28  # bytes
_LONGEST_RECORD = 1 << 16  # bytes
_MOST_ITERATIONS = 1 << 53  # beyond it no float counts them
_log = logging.getLogger(__name__)


def _pid_space() -> str:
    """A short hash of where process ids mean the same processes: the machine, and in a container its PID namespace."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32((socket.gethostname() + namespace).encode()):08x}"


_PID_SPACE = _pid_space()
_TEMPORARY = re.compile(rf"\..+\.{_PID_SPACE}-(\d+)-[0-9a-f]{{8}}\.tmp")
_cleaned: set[Path] = set()


def _temporary(path: Path) -> Path:
    """A new name beside `path`, by which others see whose it is. Not `tempfile`'s, whose files are private."""
    _remove_left_over(path.parent)
    # Names of files have 255 bytes at most; the target's own may have them all.
    name = path.name.encode()[:200].decode(errors="ignore")
    return path.with_name(f".{name}.{_PID_SPACE}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_left_over(folder: Path) -> None:
    """Remove what processes of this machine that are gone left half written; once a folder, as long as this one lives.

    What another machine writes into a shared folder has another machine's name and is left alone, as is what this user
    may not see or remove.
    """
    place = folder.absolute()
    if place in _cleaned:
        return
    _cleaned.add(place)
    for left in _listed(folder):
        match = _TEMPORARY.fullmatch(left.name)
        if match is None or is_alive(int(match[1])):
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()


def _listed(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is none, may not be read, or is replaced by another process just now."""
    with suppress(OSError):
        return list(folder.iterdir())
    return []


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there becomes `path` if the block ends without an error.

    The old file stays whole until then, also on a full disk or a kill. What is no regular file (a pipe, /dev/stdout) is
    written to, not replaced; a link stays one, and its target is written.
    """
    path = Path(path)
    if path.is_char_device() or path.is_fifo() or path.is_socket() or path.is_block_device():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            with path.open("wb") as device:
                device.write((Path(folder) / path.name).read_bytes())
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_writer(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all; what JSON may hold and Unicode lacks as `\\ud800`."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN and Inf are refused (they are not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` if the block ends without an error.

    An existing `path` is replaced at the end by two renames; between them a kill leaves the old one as
    `.NAME.*.old`, which the next write or `recover_directory` restores. Readers of such a
    folder call `recover_directory` first.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError("a file is where a folder is to be written", path=path, found="a file", expected="a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        with _locked_folder(path.parent):
            if path.exists():
                os.replace(path, path.with_name(f".{path.name}.{secrets.token_hex(8)}.old"))
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_directory(path)  # restores the old folder if the second rename failed, otherwise removes it


def check_own_folder(path: str | Path, own: Callable[[str], bool], expected: str) -> None:
    """Raise `InputError` for a folder that holds what another wrote: in whole it would be replaced.

    Args:
        path: what is to be written; a new folder and an empty one pass.
        own: whether a name is one of those that an earlier write has made there.
        expected: what may stand there, for the error's words.
    """
    path = Path(path)
    recover_directory(path)
    others = sorted(entry.name for entry in path.iterdir() if not own(entry.name)) if path.is_dir() else []
    if others:
        found, hint = abridged(others, 5), "name another folder, or move these away"
        raise InputError("a folder of other files", path=path, found=found, expected=expected, hint=hint)


def recover_directory(path: str | Path) -> None:
    """Put back the folder that a kill in the middle of `atomic_directory` left under its temporary name.

    Safe while another process writes the folder.
    """
    path = Path(path)
    if not _left_over(path):
        return
    with _locked_folder(path.parent):
        for old in _left_over(path):
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(old, path)


def _left_over(path: Path) -> list[Path]:
    # One random part without a dot: `.run.best.x.old` is not `run`'s.
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.old")
    return sorted(old for old in _listed(path.parent) if pattern.fullmatch(old.name))


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from renaming in `folder`, so that none takes the moment between two renames for a kill."""
    # Windows and some network file systems have no locks for folders; harm is then very unlikely.
    handle = lock_folder(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def process_lock(path: str | Path, on_busy: Callable[[int | None], None]) -> Iterator[None]:
    """Hold `path` as a lock among processes while the block runs; a file with the holder's id, removed at the end.

    The kernel releases the lock when the process dies for any reason; a remaining file blocks nobody.

    Args:
        path: the lock file.
        on_busy: called repeatedly while another process holds the lock, with its id (None where it is not known); may
            raise to give up.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+", encoding="ascii") as file:
            if not _locked(file):
                on_busy(_holder(path))
                time.sleep(_LOCK_POLL_SECONDS)
            elif _is_open_at(file, path):  # or else the holder removed it between opening and locking
                file.truncate(0)
                print(os.getpid(), file=file, flush=True)
                try:
                    yield
                finally:
                    # Removed while it is held: a process that has already opened it sees that it is no longer there.
                    if _is_open_at(file, path):
                        with suppress(PermissionError):  # Windows removes no open file
                            path.unlink()
                return


def _locked(file: TextIO) -> bool:
    """Lock the open file, unless another process has; without locks where the file system has none."""
    try:
        try_lock(file.fileno())
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _log.warning(
            "%s: this file system has no locks; let no two processes write here at once", Path(file.name).parent
        )
    return True


def _is_open_at(file: TextIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _holder(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # it has just been let go, or is being written


def read_json(path: str | Path, *, finite: bool = True) -> Any:
    """Read a JSON file; a missing or broken one raises `InputError` naming it. See `parse_json`."""
    path = Path(path)
    return parse_json(read_text(path), path, finite=finite)


def parse_json(text: str | bytes, path: str | Path, field: str | None = None, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        path, field: where the text is from, for messages.
        finite: whether NaN and Infinity are refused, which are no JSON, though Python and others write them, and whole
            numbers beyond what a float holds.

    Raises:
        InputError: no JSON, nested too deep, a number of more digits than Python reads.
    """

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            found = word[:40]
            raise InputError("not a finite number", path=path, field=field, found=found, expected="a finite number")
        return value

    def whole_number(word: str) -> int:
        number(word)
        return int(word)

    try:
        if not finite:
            return json.loads(text)
        return json.loads(text, parse_constant=number, parse_float=number, parse_int=whole_number)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        found = f"{error}; {text[:40]!r} …"
        raise InputError("not JSON", path=path, field=field, found=found, expected="a JSON text") from None


def each_record(path: Path, on_damaged: Callable[[str], None]) -> Iterator[dict[str, float]]:
    """The records of a metrics file, which are whole lines of JSON objects with an iteration; others are reported."""
    for line in read_text(path, errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = parse_json(line, path, finite=False)
        except InputError:
            record = None
        iteration = record.get("iteration") if isinstance(record, dict) else None
        if type(iteration) is int and 0 <= iteration < _MOST_ITERATIONS:
            yield record
        else:
            on_damaged(line)


def last_iteration(path: Path) -> int:
    """The iteration of a metrics file's last record, of which its end alone is read; 0 where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_RECORD))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line end is not whole yet
    except FileNotFoundError:
        return 0
    found = re.search(rb'"iteration": (\d{1,16})[,}]', lines[-1]) if lines else None
    return int(found[1]) if found else 0


def check_regular(path: Path, expected: str | None = None) -> None:
    """Raise `InputError` unless there is a regular file: opening a FIFO waits for a writer, which may never come."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError("file not found", path=path, expected=expected) from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL; a folder that may not be read
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError("the file cannot be read", path=path, found=found, expected=expected) from None
    if not stat.S_ISREG(mode):
        raise InputError("not a regular file", path=path, expected=expected)


def read_text(path: Path, errors: Literal["strict", "replace"] = "strict") -> str:
    """Read a file as UTF-8; one that is missing, no regular file or no text raises `InputError` naming it."""
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > _LONGEST_TEXT:
            raise InputError("too long for a text", path=path, found=f"{size:,} bytes", expected=f"{_LONGEST_TEXT:,}")
        return path.read_text(encoding="utf-8", errors=errors)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("file not found", path=path) from None
    except UnicodeDecodeError as error:
        raise InputError("not a text file", path=path, found=str(error)) from None
    except OSError as error:
        raise InputError("the file cannot be read", path=path, found=error.strerror) from None


def file_sha256(path: str | Path, start: int = 0) -> str:
    """SHA-256 of a file of any size, from its byte `start` on, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
