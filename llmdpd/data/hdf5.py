"""Reading HDF5 files of strangers: every reader of HDF5 opens files and takes arrays by these functions.

A file may name other files, which HDF5 would open by itself: an external link, external storage, the sources of a
virtual data set. None of them is followed, nor is a soft link, whose target may lie behind an external one.

HDF5 itself reads through `_Source`, which refuses what the library would take gigabytes for, or never get done with.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.content import EXPANSION, FREE
from llmdpd.data.hdf5_texts import array_bytes, attribute_bytes
from llmdpd.data.trajectories import check_finite
from llmdpd.errors import InputError
from llmdpd.utils.extras import extra
from llmdpd.utils.files import check_regular
from llmdpd.utils.system import lock_shared

with extra("data"):
    import h5py

_DEEPEST = 32
_BYTES_A_CHUNK = 256
_HEAP = b"GCOL\x01"  # a global heap, in which texts of any length are

Node: TypeAlias = "h5py.Group | h5py.Dataset"


class _Source(io.FileIO):
    """The bytes of an open file, as HDF5 asks for them; `room` is how many bytes of arrays may still be read of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        size = os.fstat(self.fileno()).st_size
        self.path, self.size, self.room, self.refused = path, size, FREE + EXPANSION * size, ""
        try:
            lock_shared(self.fileno())
        except BlockingIOError:
            raise  # as HDF5 does by itself: it is just being written
        except OSError:
            pass  # this file system has no locks

    def __repr__(self) -> str:
        return f"{id(self):x}"  # the name of the file to h5py

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if len(view) > self.size:
            self._refuse(f"{len(view):,} bytes to be read at once, of {self.size:,}")
        count = super().readinto(view)
        if view[: len(_HEAP)] == _HEAP and _never_ends(bytes(view)):
            self._refuse("a global heap whose objects have no end")
        return count

    def _refuse(self, what: str) -> NoReturn:
        self.refused = what
        raise OSError(what)


def _never_ends(heap: bytes) -> bool:
    """Whether HDF5 would walk for ever along the objects of a global heap, as far as it is in these bytes.

    They follow one another, each 16 bytes and its contents; what is free is one with the number 0, and all its size.
    """
    size = int.from_bytes(heap[8:16], "little")
    at = 16
    while at + 16 <= min(len(heap), size):
        number, length = int.from_bytes(heap[at : at + 2], "little"), int.from_bytes(heap[at + 8 : at + 16], "little")
        taken = length if number == 0 else 16 + (length + 7) // 8 * 8
        if not 0 < taken <= size - at:
            return True
        at += taken
    return False


_open: dict[str, _Source] = {}


def _source(node: Node) -> _Source:
    return _open[str(node.file.filename)]


@contextmanager
def open_hdf5(path: str | Path, expected: str) -> Iterator[h5py.File]:
    """Open a file for reading; what HDF5 cannot read inside the block becomes an InputError too.

    Args:
        path: a regular file, or a link to one.
        expected: what the file should be, for messages.

    Raises:
        InputError: no such file, no regular file, no HDF5, cut off or damaged.
    """
    path = Path(path)
    check_regular(path, expected)
    try:
        with _Source(path) as source:
            _open[repr(source)] = source
            try:
                with h5py.File(source, "r") as file:
                    if file.id.get_create_plist().get_sizes() != (8, 8):
                        raise OSError("addresses and sizes are not of 8 bytes")
                    yield file
                if source.refused:  # HDF5 may go on without what it did not get
                    raise OSError(source.refused)
            finally:
                del _open[repr(source)]
    except InputError:
        raise
    except Exception as error:  # h5py raises anything from KeyError to TypeError where a file is damaged
        raise _unreadable(path, error, expected) from error


def check_own_contents(path: Path) -> None:
    """Hold that all of a file is in the file itself and of a size that it can hold, for others to open it.

    Texts and lists of any length are read, those of attributes too, so that whoever reads them later finds them in
    order. Other objects are refused, except for references in attributes, and for any in those of arrays, which nobody
    reads.

    Raises:
        InputError: as `open_hdf5`; a link, external storage, a virtual data set, more bytes than such a file has.
    """

    def check(group: h5py.Group, depth: int) -> None:
        _read_attributes(group)
        if depth > _DEEPEST:
            raise _error(group, "", "groups nested too deep", f"{depth} groups", f"at most {_DEEPEST}")
        for name in names_in(group):
            node = member(group, name)
            if isinstance(node, h5py.Group):
                check(node, depth + 1)
            elif node is not None and node.shape is not None:
                array = _array(group, name, "an array")
                _read_attributes(array)
                if array.dtype.hasobject:
                    _count_objects(group, name, array)
                    array[()]

    with open_hdf5(path, "an HDF5 file") as file:
        check(file, 0)


def _read_attributes(node: Node) -> None:
    for number in range(h5py.h5a.get_num_attrs(node.id)):
        attribute = h5py.h5a.open(node.id, index=number)
        dtype = attribute.dtype
        read = h5py.check_ref_dtype(dtype) is None if isinstance(node, h5py.Group) else _itemsize(dtype) is not None
        if dtype.hasobject and read:
            read_attribute(node, attribute.name.decode("utf-8", "surrogateescape"))


def hdf5_bytes(fill: Callable[[h5py.File], None]) -> bytes:
    """An HDF5 file as bytes, made in memory: on a full disk HDF5 ends the process in its own clean-up.

    Args:
        fill: puts the contents into the open file.
    """
    with h5py.File("in memory", "w", driver="core", backing_store=False, track_order=True) as file:
        fill(file)
        file.flush()
        return bytes(file.id.get_file_image())


def member(group: h5py.Group, name: str) -> Node | None:
    """The group or data set `name` (one name, no path) of `group`, None where there is none.

    Raises InputError for a link that isn't a hard one, and for anything that is neither a group nor a data set.
    """
    try:
        link = group.get(name, getlink=True)
    except KeyError:
        return None
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        found = f"{type(link).__name__} to {getattr(link, 'filename', '')} {link.path}"
        raise _error(group, name, "a link is not followed", found, "the data in the file itself")
    node = group[name]
    if not isinstance(node, (h5py.Group, h5py.Dataset)):
        raise _error(group, name, "neither a group nor an array", type(node).__name__, "a group or an array")
    return node


def names_in(group: h5py.Group) -> list[str]:
    """Names of a group's members, sorted as text. Raises InputError for one that is no text, as damage leaves it."""
    names = list(group)
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise _error(group, "", "a name in the file is damaged", repr(wrong)[:80], "UTF-8 text")
    return sorted(names)


def subgroup(group: h5py.Group, name: str) -> h5py.Group | None:
    """The group `name` of `group`, None where there is none; raises InputError where it is something else."""
    node = member(group, name)
    if node is not None and not isinstance(node, h5py.Group):
        raise _error(group, name, "not a group", "an array", "a group")
    return node


def read_numbers(group: h5py.Group, name: str, *, ndim: int) -> NDArray[np.float32]:
    """The array `name` of `group`, of `ndim` dimensions (1 or 2), as float32.

    It is converted while it is read, so that a float64 file is never in memory as such. [N, 1] counts as [N].

    Raises:
        InputError: absent, kept in another file, never written, no real numbers, of another number of dimensions, NaN
            or Inf.
    """
    field = _array(group, name, "[N, width]" if ndim == 2 else "[N]")
    if field.dtype.kind not in "fiub" or field.shape is None:
        raise _error(group, name, "not an array of numbers", f"type {field.dtype}", "real numbers")
    column = ndim == 1 and field.ndim == 2 and field.shape[1] == 1
    if field.ndim != ndim and not column:
        found, expected = f"shape {list(field.shape)}", "[N, width]" if ndim == 2 else "[N] or [N, 1]"
        raise _error(group, name, "wrong number of dimensions", found, expected)
    values = np.asarray(field[()], np.float32) if field.dtype.kind == "b" else field.astype(np.float32)[()]
    check_finite(values, field_name(group, name), str(_source(group).path))
    return values.reshape(-1) if column else values


def read_names(group: h5py.Group, name: str) -> list[str]:
    """The array of texts `name` of `group`. Raises InputError as `read_numbers`."""
    field = _array(group, name, "[N], texts")
    if h5py.check_string_dtype(field.dtype) is None or field.shape is None or len(field.shape) != 1:
        found = f"{field.dtype} {list(field.shape or ())}"
        raise _error(group, name, "not a list of texts", found, "[N], texts")
    if field.dtype.hasobject:
        _count_objects(group, name, field)
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in field[()]]


def read_attribute(node: Node, name: str) -> Any:
    """The attribute `name` as h5py gives it, None where it is absent.

    Raises InputError for objects that are neither texts nor lists.
    """
    if name not in node.attrs:
        return None
    attribute = h5py.h5a.open(node.id, name.encode("utf-8", "surrogateescape"))
    if attribute.dtype.hasobject:
        _take(node, name, attribute.dtype, lambda size, file: attribute_bytes(node, attribute, size, file))
    return node.attrs[name]


def text_attribute(node: Node, name: str) -> str:
    """The attribute `name` as text; "" where it is absent or is no text."""
    value = read_attribute(node, name)
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text if isinstance(text, str) else ""


def field_name(group: Node, name: str) -> str:
    """The path of `name` inside the file, for messages: "data/demo_0/actions"."""
    return f"{group.name or ''}/{name}".strip("/")


def _array(group: h5py.Group, name: str, expected: str) -> h5py.Dataset:
    """The array `name`, whose contents are in this file."""
    field = member(group, name)
    if field is None:
        raise _error(group, name, "a field is missing", "absent", expected)
    if not isinstance(field, h5py.Dataset):
        raise _error(group, name, "not an array", "a group", expected)
    if field.is_virtual or field.external:
        found = "a virtual data set" if field.is_virtual else f"storage in {field.external[0][0]}"
        raise _error(group, name, "an array is not in the file itself", found, "its contents in the file itself")
    source, count = _source(group), (field.size or 0) * field.dtype.itemsize
    # HDF5 makes room for a whole chunk, of however few of its numbers there are, and keeps a list of all.
    chunks = [-(-size // part) for size, part in zip(field.shape or (), field.chunks or (), strict=False)]
    chunk = math.prod(field.chunks or (0,)) * field.dtype.itemsize
    source.room -= count + (_BYTES_A_CHUNK * math.prod(chunks) if chunks else 0)
    if source.room < 0 or chunk > FREE + EXPANSION * source.size:
        found = f"{list(field.shape)} of {field.dtype}: {count:,} bytes, in chunks of {chunk:,}"
        limit = f"with the arrays before it at most {FREE:,} bytes and {EXPANSION} times the file's size"
        raise _error(group, name, "more numbers than such a file can hold", found, limit)
    # HDF5 gives zeros for an array whose contents were never written, as where a recorder was killed.
    if field.size and not field.id.get_storage_size():
        raise _error(group, name, "an array that was never written", f"no bytes for {list(field.shape)}", expected)
    return field


def _count_objects(group: h5py.Group, name: str, field: h5py.Dataset) -> None:
    _take(group, name, field.dtype, lambda size, file: array_bytes(field, size, file))


def _itemsize(dtype: Any) -> int | None:
    """Bytes of a letter of texts, or of a number of lists, of any length; None of other objects."""
    if h5py.check_string_dtype(dtype) is not None:
        return 1
    base = h5py.check_vlen_dtype(dtype)
    return None if base is None or np.dtype(base).hasobject else np.dtype(base).itemsize


def _take(node: Node, name: str, dtype: Any, count: Callable[[int, int], int]) -> None:
    """Take what texts or lists need off the room that there is. Raises InputError where it is too much, or neither."""
    source, limit = _source(node), "texts in the file itself, of no more bytes than such a file can hold"
    size = _itemsize(dtype)
    if size is None:
        raise _error(node, name, "objects that are neither texts nor lists of numbers", str(dtype), limit)
    try:
        source.room -= count(size, source.fileno())
    except OSError as error:
        path, field, problem = str(source.path), field_name(node, name), "texts of which the lengths are not known"
        hint = "h5repack -f NONE, or write it with libver='earliest'"
        raise InputError(problem, path=path, field=field, found=str(error), expected=limit, hint=hint) from error
    if source.room < 0:
        raise _error(node, name, "more text than such a file can hold", "a length that goes beyond", limit)


def _error(node: Node, name: str, problem: str, found: Any, expected: str) -> InputError:
    path, field = str(_source(node).path), field_name(node, name)
    return InputError(problem, path=path, field=field, found=found, expected=expected)


def _unreadable(path: Path, error: Exception, expected: str) -> InputError:
    size = path.stat().st_size
    problem, found = "the HDF5 file is cut off or damaged", f"{size} bytes; {type(error).__name__}: {error}"[:300]
    if size == 0:
        problem, found = "the file is empty", "0 bytes"
    elif not h5py.is_hdf5(path):
        with path.open("rb") as file:
            problem, found = "not an HDF5 file", f"starts with {file.read(8)!r}"
    return InputError(problem, path=path, found=found, expected=expected)
