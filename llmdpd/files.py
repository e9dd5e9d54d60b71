"""Writing to disk so that nothing is ever half written: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there becomes `path` if the block ends without an error.

    The old file stays whole until then, also on a full disk or a kill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a result is as readable as any file that the user makes.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
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
    `.NAME.*.old`, which the next write or `recover_directory` puts back. Where a folder must exist at every moment,
    write numbered ones instead (see `llmdpd.training.checkpoint`).
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError("a file is where a folder is to be written", path=path, found="a file", expected="a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        old = temporary.with_suffix(".old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_directory(path)  # where the second rename failed the old folder comes back, else it goes


def recover_directory(path: str | Path) -> None:
    """Put back the folder that a kill in the middle of `atomic_directory` left under its temporary name."""
    path = Path(path)
    # One random part without a dot: `.run.best.x.old` is not `run`'s.
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.old")
    for old in sorted(path.parent.iterdir() if path.parent.is_dir() else ()):
        if not pattern.fullmatch(old.name):
            continue
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


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
