"""What a file is by its content: readers go by its first bytes, whatever its name ends in."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Literal

Kind = Literal["hdf5", "npy", "npz", "pickle"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_PLACES = (0, 512, 1024, 2048)  # a block of the user's own may come first
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_FIRST = 4096
_FIELDS = re.compile(rb"observations|actions|rewards|terminals|terminations|dones|timeouts|truncations")


def kind_of(path: Path) -> Kind | None:
    """What the content of a file is; None for a folder, and for a file of any other content.

    A zip is NumPy's where it holds arrays. A pickle is data where a field's name stands among its first bytes; those of
    protocols 0 and 1 begin with nothing of their own, and are not recognised.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.read(_FIRST)
    if any(first[place : place + len(_HDF5)] == _HDF5 for place in _HDF5_PLACES):
        return "hdf5"
    if first.startswith(_NPY):
        return "npy"
    if first.startswith(_ZIP):
        return "npz" if _holds_arrays(path) else None
    if _PICKLE.match(first) and _FIELDS.search(first):
        return "pickle"
    return None


def is_kind(path: Path, kinds: tuple[Kind, ...], suffixes: tuple[str, ...]) -> bool:
    """Whether a file has one of these contents, or no known content and one of these suffixes.

    So a damaged or empty file meets the reader that its name asks for, which says what is wrong with it.
    """
    kind = kind_of(path)
    return kind in kinds if kind is not None else path.is_file() and path.suffix.lower() in suffixes


def _holds_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
