"""What a file is by its content: readers go by its first bytes, whatever its name ends in."""

from __future__ import annotations

import math
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmdpd.errors import InputError
from llmdpd.utils.files import check_regular

Kind = Literal["hdf5", "npy", "npz", "pickle"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_PLACES = (0, 512, 1024, 2048)  # a block of the user's own may come first
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_FIRST = 4096
FREE, EXPANSION = 1 << 26, 200
"""What is read of a file takes at most so many bytes, and so many times its size: no measurements compress better."""
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


def check_expansion(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise `InputError` where the parts of a zip would take more memory than the file can hold of measurements."""
    size, limit = sum(part.file_size for part in archive.infolist()), FREE + EXPANSION * path.stat().st_size
    if size > limit:
        problem, found = "more numbers than such a file can hold", f"{size:,} bytes unpacked"
        raise InputError(problem, path=path, found=found, expected=f"at most {limit:,}")


def array_of(data: bytes | bytearray, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> NDArray[Any]:
    """An array of its bytes, whose number has been checked. Raises ValueError for text that is no Unicode.

    NumPy makes texts of such an array that Python later fails on, here or there.
    """
    flat = np.frombuffer(data, dtype) if dtype.itemsize else np.zeros(math.prod(shape), dtype)
    code_points = np.dtype(np.uint32).newbyteorder(dtype.byteorder)
    if dtype.kind == "U" and flat.nbytes and flat.view(code_points).max() > sys.maxunicode:
        raise ValueError("text that is no Unicode")
    return flat.reshape(shape, order="F" if fortran else "C")


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name, for files of this project's own: nothing is unpickled.

    Raises:
        InputError: no such file, no .npz, damaged, more numbers than such a file can hold.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            check_expansion(archive, path)
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        for name, array in arrays.items():  # a member that does not begin as an array comes as its bytes
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is no array")
        return arrays
    except InputError:
        raise
    except Exception as error:  # zipfile, its codecs and NumPy's parser of headers raise anything
        found = f"{type(error).__name__}: {error}"[:200]
        raise InputError("not an .npz file, or a damaged one", path=path, found=found) from None
