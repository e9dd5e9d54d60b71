"""How long the texts of an HDF5 file are, before HDF5 makes room for them.

A text of any length is kept as a reference of 16 bytes: its length, and where it is. HDF5 takes as much memory as the
reference says, up to 4 GiB, before it looks at what is there, and any number of references may name one text. Here
the references are read from the file itself. Layouts: HDF5 File Format
Specification, version 3, sections IV.A and IV.B.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import h5py
import numpy as np

_REFERENCE = 16
_OBJECT = 100
"""Bytes of a text in Python beside its letters."""
_ATTRIBUTE, _CONTINUED = 0x0C, 0x10
_MOST_BLOCKS = 1 << 12


def array_texts(field: h5py.Dataset, descriptor: int) -> int:
    """Bytes that the texts of an array take in memory.

    Args:
        field: an array of texts of any length, whose contents are in the file.
        descriptor: of the open file.

    Raises:
        OSError: packed, partly never written, or kept where the references are not found.
    """
    count = field.size or 0
    layout = field.id.get_create_plist()
    if layout.get_nfilters():
        raise OSError("texts of any length that are packed by a filter")
    if layout.get_layout() == h5py.h5d.CHUNKED:
        places: list[tuple[int, int]] = []
        field.id.chunk_iter(lambda chunk: places.append((chunk.byte_offset, chunk.size)))
        if len(places) != math.prod(-(-size // part) for size, part in zip(field.shape, field.chunks, strict=True)):
            raise OSError("texts of which some were never written")
    elif layout.get_layout() == h5py.h5d.CONTIGUOUS:
        places = [(field.id.get_offset(), _REFERENCE * count)]
    else:
        raise OSError("texts of any length inside an object's header")
    return _OBJECT * count + sum(_lengths(_read(descriptor, size, place)) for place, size in places)


def attribute_texts(node: h5py.Group | h5py.Dataset, attribute: h5py.h5a.AttrID, descriptor: int) -> int:
    """Bytes that the texts of an attribute take in memory. Raises OSError where its references are not found."""
    count = math.prod(attribute.shape)
    base = node.file.userblock_size
    address = h5py.h5o.get_info(node.id).addr + base
    found = [
        _OBJECT * count + _lengths(values[: _REFERENCE * count])
        for name, values in _attributes(descriptor, address, base)
        if name == attribute.name
    ]
    if not found:  # those of an object with more than eight attributes, in files of later versions, are elsewhere
        raise OSError("attributes that are not in the object's header")
    return sum(found)


def _read(descriptor: int, size: int, place: int) -> bytes:
    return os.pread(descriptor, min(size, os.fstat(descriptor).st_size), place)


def _lengths(references: bytes) -> int:
    usable = len(references) // _REFERENCE * _REFERENCE
    return int(np.frombuffer(references[:usable], "<u4")[:: _REFERENCE // 4].sum(dtype=np.uint64))


def _attributes(descriptor: int, address: int, base: int) -> Iterator[tuple[bytes, bytes]]:
    """(name, value) of all attributes in the header of the object at this address."""
    for message in _messages(descriptor, address, base):
        version, sizes = message[0], np.frombuffer(message[2:8], "<u2").tolist()
        at, pad = (9, 1) if version == 3 else (8, 8 if version == 1 else 1)
        name = message[at : at + sizes[0]].partition(b"\0")[0]
        yield name, message[at + sum(-(-size // pad) * pad for size in sizes) :]


def _messages(descriptor: int, address: int, base: int) -> Iterator[bytes]:
    """The messages of an object's header that describe attributes."""
    head = os.pread(descriptor, 64, address)
    new = head[:4] == b"OHDR"
    if new:
        flags = head[5]
        start = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width, prefix = 1 << (flags & 3), 6 if flags & 4 else 4
        blocks = [(address + start + width, int.from_bytes(head[start : start + width], "little"))]
    else:
        prefix, blocks = 8, [(address + 16, int.from_bytes(head[8:12], "little"))]
    for place, length in blocks:  # it grows
        if len(blocks) > _MOST_BLOCKS:
            raise OSError("the header of an object has no end")
        block, at = _read(descriptor, length, place), 0
        while at + prefix <= len(block):
            kind, size = (block[at], block[at + 1 : at + 3]) if new else (block[at], block[at + 2 : at + 4])
            end = at + prefix + int.from_bytes(size, "little")
            message = block[at + prefix : end]
            if kind == _CONTINUED and len(message) >= 16:
                further, size_of_it = np.frombuffer(message[:16], "<u8").tolist()
                # A later block begins with a signature and ends with a checksum.
                blocks.append((base + further + 4, size_of_it - 8) if new else (base + further, size_of_it))
            elif kind == _ATTRIBUTE and len(message) > 9:
                yield message
            at = end
