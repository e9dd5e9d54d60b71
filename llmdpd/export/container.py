"""Files of exported policies and prompts: named tensors, checked as a whole.

Such a file is little-endian: `HEADER`, then an `ENTRY` for each tensor, then their numbers, each tensor at a multiple
of 64 bytes. A prompt has the fingerprint of its policy. Which tensors there are, csrc/export/read.cpp says.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from enum import IntEnum
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"LLMDPD\r\n"
VERSION = 2  # 1 has no tracks, and is read still
Arrays = Mapping[str, NDArray[Any]]

HEADER = struct.Struct("<8sIIQQII")
"""First bytes, version, kind, size of the file, fingerprint of the policy, CRC-32 of what follows, tensors."""
ENTRY = struct.Struct("<56sIIQ4I")
"""Name, ended by zeros; type, as in `_TYPES`; dimensions; offset in the file; shape."""
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int32): 2, np.dtype(np.float64): 3}
_ALIGNMENT = 64


class Kind(IntEnum):
    """What a file holds; as in csrc/export/file.h."""

    POLICY = 1
    PROMPT = 2


def fingerprint(arrays: Arrays) -> int:
    """64 bits that tell a policy's tensors from another's."""
    whole = sha256()
    for name, array in sorted(arrays.items()):
        whole.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
    return int.from_bytes(whole.digest()[:8], "little")


def packed(kind: Kind, arrays: Arrays, policy: int) -> bytes:
    """The file's bytes; `policy` is the fingerprint of the policy that it holds, or that its prompt belongs to."""
    entries, data = b"", b""
    start = _aligned(HEADER.size + len(arrays) * ENTRY.size)
    for name, array in arrays.items():
        shape = (*array.shape, *(0,) * (4 - array.ndim))
        offset = start + len(data)
        entries += ENTRY.pack(name.encode(), _TYPES[array.dtype], array.ndim, offset, *shape)
        content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        data += content.ljust(_aligned(len(content)), b"\0")
    body = entries.ljust(start - HEADER.size, b"\0") + data
    return with_header(kind, policy, len(arrays), body)


def with_header(kind: int, policy: int, tensors: int, body: bytes) -> bytes:
    """What follows the header, and the header before it."""
    return HEADER.pack(MAGIC, VERSION, kind, HEADER.size + len(body), policy, zlib.crc32(body), tensors) + body


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
