"""How long the texts and lists of an HDF5 file are, before HDF5 makes room for them.

A text or list of any length is kept as a reference of 16 bytes: its length, and where it is. HDF5 takes as much memory
as the reference says, 4 GiB items and more, before it looks at what is there, and any number of references may name one
text. Here the references are read from the file itself. Layouts: HDF5 File Format Specification, version 3, sections
III.G, IV.A and IV.B.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from llmdpd.utils.extras import extra
from llmdpd.utils.system import read_at

with extra("data"):
    import h5py

_REFERENCE = 16
_OBJECT = 112
"""Bytes of a text, or of a list, in Python beside its letters or numbers."""
_ATTRIBUTE, _CONTINUED, _ELSEWHERE = 0x0C, 0x10, 0x15
_UNDEFINED = 2**64 - 1
_MOST_BLOCKS, _LARGEST_BLOCK, _MOST_ROWS = 1 << 12, 1 << 16, 64


def array_bytes(field: h5py.Dataset, itemsize: int, descriptor: int) -> int:
    """Bytes that the texts or lists of an array take in memory.

    Args:
        field: an array of texts or lists of any length, whose contents are in the file.
        itemsize: bytes of a letter, or of a list's number.
        descriptor: of the open file.

    Raises:
        OSError: packed by other filters than gzip and shuffle, or kept where the references are not found.
    """
    count = field.size or 0
    if count == 0:
        return 0
    layout = field.id.get_create_plist()
    if layout.get_layout() == h5py.h5d.CHUNKED:
        chunks: list[h5py.h5d.StoreInfo] = []
        field.id.chunk_iter(chunks.append)
        whole = math.prod(-(-size // part) for size, part in zip(field.shape, field.chunks, strict=True))
        if len(chunks) != whole and layout.fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED:
            raise OSError("texts of which some were never written, and are a default of unknown length")
        limit = _REFERENCE * math.prod(field.chunks)
        items = sum(_items(_unpacked(layout, chunk, limit, descriptor)) for chunk in chunks)
    elif layout.get_layout() == h5py.h5d.CONTIGUOUS:
        items = _items(_read(descriptor, _REFERENCE * count, field.id.get_offset()))
    else:
        raise OSError("texts of any length inside an object's header")
    return _OBJECT * count + itemsize * items


def attribute_bytes(node: h5py.Group | h5py.Dataset, attribute: h5py.h5a.AttrID, itemsize: int, descriptor: int) -> int:
    """Bytes that the texts or lists of an attribute take in memory; see `array_bytes`.

    Raises:
        OSError: its references are not found, as those of an attribute that is larger than its object's heap takes.
    """
    count = math.prod(attribute.shape or (0,)) if attribute.shape != () else 1
    if count == 0:
        return 0
    base = node.file.userblock_size
    address = h5py.h5o.get_info(node.id).addr + base
    found = [
        _OBJECT * count + itemsize * _items(values[: _REFERENCE * count])
        for name, values in _attributes(descriptor, address, base, attribute.name)
        if name == attribute.name
    ]
    if not found:
        raise OSError("an attribute that is not where the object's others are")
    return sum(found)


def _unpacked(layout: h5py.h5p.PropDCID, chunk: h5py.h5d.StoreInfo, limit: int, descriptor: int) -> bytes:
    """The references in a chunk, without its filters."""
    content = _read(descriptor, chunk.size, chunk.byte_offset)
    for number in reversed(range(layout.get_nfilters())):
        code, _, values, name = layout.get_filter(number)
        if chunk.filter_mask >> number & 1:  # not applied to this chunk
            continue
        if code == h5py.h5z.FILTER_DEFLATE:
            unpacking = zlib.decompressobj()
            try:
                content = unpacking.decompress(content, limit)
                if not unpacking.eof and (unpacking.decompress(unpacking.unconsumed_tail, 1) or not unpacking.eof):
                    raise OSError("a chunk that expands to more than its texts")
            except zlib.error as error:
                raise OSError(f"a chunk that is damaged: {error}") from error
        elif code == h5py.h5z.FILTER_SHUFFLE:
            size = values[0] if values else 0
            if size == 0:
                raise OSError("a chunk that is shuffled by no size")
            planes = len(content) // size * size
            content = np.frombuffer(content[:planes], np.uint8).reshape(size, -1).T.tobytes() + content[planes:]
        else:
            raise OSError(f"texts of any length that are packed by a filter: {name.decode(errors='replace')}")
    if len(content) != limit:  # HDF5 would take what lies behind it in memory for references
        raise OSError(f"a chunk of {len(content):,} bytes, not {limit:,}")
    return content


def _read(descriptor: int, size: int, place: int) -> bytes:
    return read_at(descriptor, min(size, os.fstat(descriptor).st_size), place)


def _items(references: bytes) -> int:
    usable = len(references) // _REFERENCE * _REFERENCE
    return int(np.frombuffer(references[:usable], "<u4")[:: _REFERENCE // 4].sum(dtype=np.uint64))


def _attributes(descriptor: int, address: int, base: int, sought: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, value) of all attributes in the header of the object at this address; elsewhere, of those so named."""
    for kind, message in _messages(descriptor, address, base):
        if kind == _ATTRIBUTE:
            yield _attribute(message)
            continue
        at = 4 if message[1] & 1 else 2
        heap = int.from_bytes(message[at : at + 8], "little")
        for block in _heap_blocks(descriptor, heap, base) if heap != _UNDEFINED else ():
            # Where in it an attribute begins, an index says; any place that reads as this one counts.
            at = block.find(sought + b"\0")
            while at >= 0:
                for version, before in ((1, 8), (2, 8), (3, 9)):
                    if at >= before and block[at - before] == version:
                        yield _attribute(block[at - before :])
                at = block.find(sought + b"\0", at + 1)


def _attribute(message: bytes) -> tuple[bytes, bytes]:
    version, sizes = message[0], np.frombuffer(message[2:8], "<u2").tolist()
    at, pad = (9, 1) if version == 3 else (8, 8 if version == 1 else 1)
    name = message[at : at + sizes[0]].partition(b"\0")[0]
    return name, message[at + sum(-(-size // pad) * pad for size in sizes) :]


def _heap_blocks(descriptor: int, address: int, base: int) -> Iterator[bytes]:
    """All blocks of a fractal heap in which objects are; HDF5 finds none outside them, as the heap is held to be."""
    head = read_at(descriptor, 142, address + base)
    if head[:4] != b"FRHP" or len(head) < 142:
        raise OSError("attributes whose heap is damaged")
    # References of 8 bytes and no index of large objects, so that there are none; no filters.
    if head[5:9] != b"\x08\0\0\0" or head[22:30] != b"\xff" * 8:
        raise OSError("attributes that are packed, or larger than a block of their heap")
    width, first, largest, bits, _, root, rows = struct.unpack("<HQQHHQH", head[110:])
    if not (width > 0 and 0 < first <= largest <= _LARGEST_BLOCK):
        raise OSError("attributes in a heap of other blocks than HDF5 makes")
    blocks, seen = [(root, first, rows)], {_UNDEFINED}
    for place, size, rows in blocks:  # it grows
        if place in seen:
            continue
        seen.add(place)
        if len(seen) > _MOST_BLOCKS or rows > _MOST_ROWS:
            raise OSError("attributes in a heap that has no end")
        if rows == 0:
            yield _read(descriptor, size, base + place)
            continue
        listed = _read(descriptor, 8 * width * rows, base + place + 13 + (bits + 7) // 8)
        for number, child in enumerate(np.frombuffer(listed[: len(listed) // 8 * 8], "<u8").tolist()):
            of_row = first << max(0, number // width - 1)
            deeper = 0 if of_row <= largest else of_row.bit_length() - (first * width).bit_length() + 1
            if child not in seen:
                blocks.append((child, of_row, max(0, deeper)))


def _messages(descriptor: int, address: int, base: int) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the messages of an object's header that describe attributes, or say where they are."""
    head = read_at(descriptor, 64, address)
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
            elif kind in (_ATTRIBUTE, _ELSEWHERE) and len(message) > 9:
                yield kind, message
            at = end
