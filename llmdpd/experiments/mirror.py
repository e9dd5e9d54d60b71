"""Run folders mirrored at a URL, for machines that share no disk.

    URL/NAME/manifest-00000007.json   the files of the run folder NAME, each with its SHA-256
    URL/NAME/files/SHA256             their contents
    URL/NAME/log                      what the run's last step has printed

A mirrored state is whole: its manifest is written last, and the one with the greatest number counts. It says whose it
is: of two processes that work on one run, as when a machine was taken for dead, the former one is refused. What a
manifest names stays until the next but one is there, for those who are reading it. Beside each local folder a record
says which manifest it is of. Imports little: it runs beside every step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmdpd.errors import InputError
from llmdpd.experiments.stores import open_store
from llmdpd.utils.files import (
    atomic_directory,
    atomic_write_json,
    file_sha256,
    parse_json,
    read_json,
    recover_directory,
)

_CHECKPOINT = re.compile(r"checkpoint/step-(\d+)/")
_MANIFEST = re.compile(r"manifest-(\d+)\.json")
_TRIES = 20


@dataclass(frozen=True)
class Manifest:
    """A mirrored state of a run folder: its number, whose it is, and the SHA-256 of each file by relative path."""

    number: int
    owner: str
    files: dict[str, str]


class _GoneError(Exception):
    """A mirrored file, of this name, is not there any more."""


class TakenOverError(InputError):
    """Another process has gone on with the run."""


class Mirror:
    """The mirrored run folders below a URL.

    Args:
        url: as `open_store` takes it.

    Raises:
        InputError: here as `open_store`; in all methods, what lies there is damaged; `UnreachableError`.
    """

    def __init__(self, url: str) -> None:
        self._store = open_store(url)
        self.url = self._store.url
        self._self = secrets.token_hex(8)

    def fetch(self, folder: Path) -> None:
        """Bring a run folder to its mirrored state, unless it is that already or has gone on from it on this machine.

        Raises:
            InputError: the folder holds something else than the run that is mirrored.
        """
        for _ in range(_TRIES):
            manifest = self._newest(folder.name)
            known = self._known(folder)
            if manifest is None or (known == manifest.number and (folder.is_dir() or not manifest.files)):
                return
            strange = _contents(folder) not in ({}, manifest.files) if known is None else known > manifest.number
            if strange:
                raise InputError(
                    "the run folder is not the one that is mirrored",
                    path=folder,
                    field="--mirror",
                    found=f"another state than that of {self._place(folder.name)}",
                    expected="a folder that came from there, or none",
                    hint="move the folder away, or choose another URL",
                )
            try:
                if folder.is_dir() or manifest.files:
                    self._download(manifest, folder)
            except _GoneError as error:  # a newer manifest may have replaced this one
                if self._newest(folder.name) == manifest:
                    raise self._damaged(folder.name, f"{error} is missing") from None
                continue
            self._note(folder, manifest.number)
            return
        raise self._damaged(folder.name, "it changes without end")

    def claim(self, folder: Path) -> None:
        """Fetch a run folder and take the run over: whoever worked on it before can push no more."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in [path for path in folder.parent.iterdir() if path.name.startswith(_copies(folder))]:
            shutil.rmtree(left, ignore_errors=True)  # by a kill
        self.fetch(folder)
        self._replace(folder, self._newest(folder.name))

    def push(self, folder: Path) -> None:
        """Mirror a run folder that was claimed, whatever is at work in it.

        Raises:
            TakenOverError: another process has claimed it since.
        """
        manifest = self._newest(folder.name)
        if manifest is None or manifest.owner != self._self:
            raise self._taken(folder.name)
        self._replace(folder, manifest)

    def iterations(self, name: str) -> int:
        """Iterations of the mirrored checkpoint of a run, 0 where there is none."""
        manifest = self._newest(name)
        found = map(_CHECKPOINT.match, manifest.files if manifest else ())
        return max((int(match[1]) for match in found if match), default=0)

    def write_log(self, name: str, text: str) -> None:
        """Keep what a run's step has printed."""
        self._store.write(f"{name}/log", text.encode())

    def read_log(self, name: str) -> str:
        """What the run's last step has printed, as far as it is known."""
        return (self._store.read(f"{name}/log") or b"").decode(errors="replace")

    def _newest(self, name: str) -> Manifest | None:
        for _ in range(_TRIES):
            numbers = self._numbers(name)
            if not numbers:
                return None
            text = self._store.read(_file(name, max(numbers)))
            if text is not None:  # or else replaced by a newer one just now
                return self._manifest(name, max(numbers), text)
        raise self._damaged(name, "its manifest is listed and cannot be read")

    def _manifest(self, name: str, number: int, text: bytes) -> Manifest:
        found = parse_json(text, self._place(_file(name, number)))
        files = found.get("files") if isinstance(found, dict) else None
        owner = found.get("owner") if isinstance(found, dict) else None
        good = (
            isinstance(owner, str)
            and isinstance(files, dict)
            and all(
                isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) and _is_below(path)
                for path, sha256 in files.items()
            )
        )
        if not good:
            raise self._damaged(name, "a manifest that is none")
        assert isinstance(owner, str)
        assert isinstance(files, dict)
        return Manifest(number, owner, files)

    def _numbers(self, name: str) -> list[int]:
        matches = map(_MANIFEST.fullmatch, self._store.names(name))
        return [int(match[1]) for match in matches if match]

    def _download(self, manifest: Manifest, folder: Path) -> None:
        """Put a folder in a mirrored state in place of the local one, whose files are taken where they are the same."""
        with atomic_directory(folder) as new:
            for name, sha256 in manifest.files.items():
                here, place = folder / name, new / name
                place.parent.mkdir(parents=True, exist_ok=True)
                if here.is_file() and file_sha256(here) == sha256:
                    shutil.copyfile(here, place)
                    continue
                data = self._store.read(_content(folder.name, sha256))
                if data is None:
                    raise _GoneError(name)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise self._damaged(folder.name, f"{name} is not what the manifest says")
                place.write_bytes(data)

    def _replace(self, folder: Path, old: Manifest | None) -> None:
        """Mirror the folder's present state under the next number; then drop what only those before `old` need."""
        name, number = folder.name, 1 if old is None else old.number + 1
        stored, files = set(old.files.values() if old else ()), {}
        with _copy(folder) as copy:
            for path, file in _files(copy):
                data = file.read_bytes()
                files[path] = hashlib.sha256(data).hexdigest()
                if files[path] not in stored:
                    self._store.write(_content(name, files[path]), data)
                    stored.add(files[path])
        new = {"owner": self._self, "files": files}
        self._store.write(_file(name, number), json.dumps(new, indent=1).encode())
        if self._newest(name) != Manifest(number, self._self, files):
            raise self._taken(name)
        self._note(folder, number)
        for former in (other for other in self._numbers(name) if other < number - 1):
            text = self._store.read(_file(name, former))
            needless = set() if text is None else set(self._manifest(name, former, text).files.values()) - stored
            for sha256 in sorted(needless):
                self._store.remove(_content(name, sha256))
            self._store.remove(_file(name, former))

    def _known(self, folder: Path) -> int | None:
        """The number of the mirrored state that the local folder is, or goes on from."""
        record = _record(folder)
        found = read_json(record) if record.is_file() else {}
        return found.get("number") if isinstance(found, dict) and found.get("url") == self.url else None

    def _note(self, folder: Path, number: int) -> None:
        atomic_write_json(_record(folder), {"url": self.url, "number": number})

    def _taken(self, name: str) -> TakenOverError:
        hint = "it goes on there; here nothing is to be done"
        return TakenOverError("another worker has taken this run over", path=self._place(name), hint=hint)

    def _damaged(self, name: str, found: str) -> InputError:
        hint = f"remove it there, and on each machine the run folder with .{name}.mirrored beside it: it begins anew"
        return InputError("a mirrored run is damaged", path=self._place(name), found=found, hint=hint)

    def _place(self, name: str) -> str:
        return f"{self.url.partition('?')[0].rstrip('/')}/{name}"


def _file(name: str, number: int) -> str:
    return f"{name}/manifest-{number:08d}.json"


def _content(name: str, sha256: str) -> str:
    return f"{name}/files/{sha256}"


def _record(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.mirrored")


def _copies(folder: Path) -> str:
    """How the names of its copies begin."""
    return f".{folder.name}.copy-"


def _is_below(path: Any) -> bool:
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts and "\\" not in path


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder, by relative path; not its lock, nor what is half written."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix(), path


def _contents(folder: Path) -> dict[str, str]:
    return {name: file_sha256(file) for name, file in _files(folder)}


def newest_checkpoint(run: Path) -> str | None:
    """The name of a run's newest checkpoint."""
    return max((path.name for path in run.glob("checkpoint/step-*")), default=None)


@contextmanager
def _copy(folder: Path) -> Iterator[Path]:
    """A copy of a run folder as it is at one moment, of links where there are such.

    What a run writes while it goes on is written under another name and renamed, so that links keep what was there;
    lines are added to metrics alone, of which those after the checkpoint are dropped where a run goes on. A policy, or
    a checkpoint, is a folder of several files: of one that is replaced meanwhile all is copied again.
    """
    with tempfile.TemporaryDirectory(prefix=_copies(folder), dir=folder.parent) as temporary:
        for number in range(_TRIES):
            copy, same = Path(temporary) / str(number), False
            with suppress(FileNotFoundError):  # replaced just now
                _put_back(folder)
                before = _identities(folder)
                for name, file in _files(folder):
                    place = copy / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _link(file, place)
                same = _identities(folder) == before
            if same:
                yield copy
                return
    raise InputError("the run folder changes too often to be mirrored", path=folder, hint="fewer checkpoints")


def _put_back(folder: Path) -> None:
    """Put back the folders that a kill between two renames has left under other names, which are not copied."""
    for old in folder.rglob(".*.old"):
        recover_directory(old.with_name(old.name[1:].rsplit(".", 2)[0]))


def _identities(folder: Path) -> list[tuple[str, int]]:
    """The files below a folder, and which of that name each is."""
    return [(name, file.stat().st_ino) for name, file in _files(folder)]


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(file, place)
