"""Writing to disk so that nothing is ever half written: temporary name, fsync, rename."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A new name beside `path`. Not `tempfile`'s: that makes files private, and ours are as readable as any other."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there becomes `path` if the block ends without an error.

    The old file stays whole until then, also on a full disk or a kill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_writer(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN and Inf are refused (they are not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` if the block ends without an error.

    An existing `path` is replaced at the end by two renames; between them a kill leaves the old one as
    `.NAME.*.old`, which the next write or `recover_directory` puts back. So whoever reads such a folder calls
    `recover_directory` first.
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
            _fsync(file)
        _fsync(temporary)
        with _locked_folder(path.parent):
            if path.exists():
                os.replace(path, temporary.with_suffix(".old"))
            os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_directory(path)  # where the second rename failed the old folder comes back, else it goes


def recover_directory(path: str | Path) -> None:
    """Put back the folder that a kill in the middle of `atomic_directory` left under its temporary name.

    Safe beside a process that is just writing the folder.
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
    return sorted(old for old in path.parent.iterdir() if pattern.fullmatch(old.name)) if path.parent.is_dir() else []


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from renaming in `folder`, so that none takes the moment between two renames for a kill."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no locks for folders; there a whole lot must coincide to do harm.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one raises `InputError` naming it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("file not found", path=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError("not a JSON file", path=path, found=str(error)) from None
    except OSError as error:
        raise InputError("the file cannot be read", path=path, found=error.strerror) from None
