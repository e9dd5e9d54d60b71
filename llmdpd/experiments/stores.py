"""Files by key, in a folder or in a bucket: what mirrored runs need of a store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from llmdpd.errors import InputError
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_write_bytes

SECONDS_BETWEEN_QUESTIONS = 10.0
"""To a store that others ask, too, or that does not answer."""
PATIENCE_SECONDS = 1800.0
"""With a store that does not answer."""


class UnreachableError(InputError):
    """A store cannot be reached, or refuses; a later try may succeed."""


class Store(Protocol):
    """Files by keys, which are paths with slashes. Each is written whole or not at all.

    Raises:
        UnreachableError: in all methods.
    """

    url: str

    def read(self, key: str) -> bytes | None:
        """A file's content; None where there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Write a file, also in place of another."""

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, not below; none where it is not there."""

    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""


class FolderStore:
    """A folder of this machine, or of a disk that several share; see `Store`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.url = self._folder.as_uri()

    def read(self, key: str) -> bytes | None:
        with _reached(self.url), suppress(FileNotFoundError):
            return (self._folder / key).read_bytes()
        return None

    def write(self, key: str, data: bytes) -> None:
        with _reached(self.url):
            atomic_write_bytes(self._folder / key, data)

    def names(self, folder: str) -> list[str]:
        with _reached(self.url), suppress(FileNotFoundError):
            return [path.name for path in (self._folder / folder).iterdir() if path.is_file()]
        return []

    def remove(self, key: str) -> None:
        with _reached(self.url):
            (self._folder / key).unlink(missing_ok=True)


class BucketStore:
    """A folder of a bucket that Apache Arrow can reach; see `Store`.

    A file appears there when it has been sent whole. Keys are taken from where the tools of its provider look for them,
    such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
    """

    def __init__(self, url: str) -> None:
        with extra("s3", "--mirror"):
            from pyarrow import fs
        self.url, self._fs = url, fs
        with _reached(url):
            self._bucket, self._start = fs.FileSystem.from_uri(url)

    def read(self, key: str) -> bytes | None:
        place = self._place(key)
        with _reached(self.url), suppress(FileNotFoundError), self._bucket.open_input_stream(place) as stream:
            return bytes(stream.read())
        return None

    def write(self, key: str, data: bytes) -> None:
        with _reached(self.url), self._bucket.open_output_stream(self._place(key)) as stream:
            stream.write(data)

    def names(self, folder: str) -> list[str]:
        place = self._fs.FileSelector(self._place(folder), allow_not_found=True)
        with _reached(self.url):
            return [each.base_name for each in self._bucket.get_file_info(place) if each.is_file]

    def remove(self, key: str) -> None:
        with _reached(self.url), suppress(FileNotFoundError):
            self._bucket.delete_file(self._place(key))

    def _place(self, key: str) -> str:
        return f"{self._start.rstrip('/')}/{key}"


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Errors of a store are told as such."""
    try:
        yield
    except (OSError, ValueError) as error:  # Arrow's own are among them
        found = " ".join(str(error).split())[:300]
        problem, expected = "mirrored runs cannot be reached", "a place that can be read and written"
        raise UnreachableError(problem, path=url, field="--mirror", found=found, expected=expected) from error


def open_store(url: str) -> Store:
    """The store that a URL names: file:///FOLDER, or a bucket, as s3://BUCKET/FOLDER and gs://BUCKET/FOLDER.

    What follows a `?` are Arrow's settings, such as region=REGION and endpoint_override=HOST:PORT.

    Raises:
        InputError: another kind of URL, or its package is not installed; `UnreachableError`.
    """
    if match := re.fullmatch(r"file://(/.+)", url):
        return FolderStore(Path(unquote(match[1])))
    if re.match(r"(s3|gs|gcs|abfss?)://[^/?@]+(/|$)", url):
        return BucketStore(url)
    expected = "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER"
    found = re.sub(r"//[^/]*@", "//…@", url)  # a password is not for logs
    raise InputError("no place for mirrored runs", field="--mirror", found=found, expected=expected)
