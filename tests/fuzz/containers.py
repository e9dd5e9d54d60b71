"""Damage behind a container's own checks: its parts are changed, its lengths and checksums made good again."""

from __future__ import annotations

import hashlib
import io
import json
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Random = np.random.Generator
Damage = Callable[[bytes, Random], bytes]


def damaged_inside(content: bytes, rng: Random, damage: Damage) -> bytes | None:
    """A container with damage to one of its parts, None where the content is none that is known.

    Args:
        damage: what is done to a part's bytes.
    """
    for beginning, change in _CONTAINERS:
        if content.startswith(beginning):
            return change(content, rng, damage)
    return _safetensors(content, rng, damage) if _header_end(content) else None


def _zip(content: bytes, rng: Random, damage: Damage) -> bytes:
    """One member changed, so that its CRC fits."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    chosen = list(parts)[rng.integers(len(parts))]
    parts[chosen] = _inside_or(parts[chosen], rng, damage)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return made.getvalue()


def _inside_or(part: bytes, rng: Random, damage: Damage) -> bytes:
    changed = damaged_inside(part, rng, damage) if rng.random() < 0.6 else None
    return damage(part, rng) if changed is None else changed


def _npy(content: bytes, rng: Random, damage: Damage) -> bytes:
    """The header's text changed, and its length with it."""
    width = 2 if content[6] == 1 else 4
    start = 8 + width
    end = start + int.from_bytes(content[8:start], "little")
    head = damage(content[start:end].rstrip(), rng)
    head = head.ljust(-(-(len(head) + start + 1) // 64) * 64 - start - 1) + b"\n"
    return content[:8] + (len(head) % 256**width).to_bytes(width, "little") + head + content[end:]


def _header_end(content: bytes) -> int:
    """Where the header of a safetensors file ends; 0 in other files."""
    end = 8 + int.from_bytes(content[:8], "little")
    return end if content[8:9] == b"{" and end <= len(content) else 0


def _safetensors(content: bytes, rng: Random, damage: Damage) -> bytes:
    """The header changed, or the numbers."""
    end = _header_end(content)
    if rng.random() < 0.3:
        return content[:end] + damage(content[end:], rng)
    head = damage(content[8:end], rng)
    return len(head).to_bytes(8, "little") + head + content[end:]


def _parquet(content: bytes, rng: Random, damage: Damage) -> bytes:
    """The footer changed, and its length with it."""
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    foot = damage(content[start:-8], rng)
    return content[:start] + foot + len(foot).to_bytes(4, "little") + content[-4:]


def _pickle(content: bytes, rng: Random, damage: Damage) -> bytes:
    """Operations left out, doubled or moved, or one changed; without frames, whose lengths would be wrong."""
    try:
        found = list(pickletools.genops(content))
    except ValueError:
        return damage(content, rng)
    ends = [*(at for _, _, at in found[1:]), len(content)]
    parts = [content[at:end] for (code, _, at), end in zip(found, ends, strict=True) if code.name != "FRAME"]
    for _ in range(int(rng.integers(1, 4))):
        at, other = rng.integers(len(parts)), rng.integers(len(parts))
        action = rng.integers(4)
        if action == 0 and len(parts) > 1:
            del parts[at]
        elif action == 1:
            parts.insert(at, parts[other])
        elif action == 2:
            parts[at] = parts[other]
        else:
            parts[at] = parts[at][:1] + damage(parts[at][1:], rng)
    return b"".join(parts)


def _hdf5(content: bytes, rng: Random, damage: Damage) -> bytes:
    """Bytes of a header changed, or its lengths' bytes put in; all headers' checksums fit. Its length stays."""
    changed, blocks = bytearray(content), list(_checked_blocks(content))
    if not blocks:
        return damage(content, rng)
    for _ in range(int(rng.integers(1, 4))):
        start, end = blocks[rng.integers(len(blocks))]
        at = int(rng.integers(start, end))
        what = damage(content[at : min(end, at + 16)], rng) if rng.random() < 0.5 else _extreme(rng)
        what = what[: end - at]
        changed[at : at + len(what)] = what
    for start, end in _checked_blocks(content):
        changed[end : end + 4] = lookup3(bytes(changed[start:end])).to_bytes(4, "little")
    return bytes(changed)


def _extreme(rng: Random) -> bytes:
    width = int(rng.choice([1, 2, 4, 8]))
    return ((1 << int(rng.integers(8 * width + 1))) - int(rng.integers(2))).to_bytes(width + 1, "little")[:width]


def _checked_blocks(content: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of what a checksum of four bytes follows: the superblock, objects' headers and their later blocks.

    HDF5 File Format Specification, version 3.
    """
    if content[8] in (2, 3):
        yield 0, 44
    at = content.find(b"OHDR")
    while at >= 0:
        flags = content[at + 5]
        start = at + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width, prefix = 1 << (flags & 3), 6 if flags & 4 else 4
        end = start + width + int.from_bytes(content[start : start + width], "little")
        blocks = [(at, start + width, end)]
        for first, message, last in blocks:  # it grows
            if last + 4 > len(content):
                continue
            yield first, last
            while message + prefix <= last:
                size = int.from_bytes(content[message + 1 : message + 3], "little")
                body = content[message + prefix : message + prefix + size]
                if content[message] == 0x10 and len(body) >= 16:
                    place, length = np.frombuffer(body[:16], "<u8").tolist()
                    blocks.append((place, place + 4, place + length - 4))
                message += prefix + size
        at = content.find(b"OHDR", at + 4)


_CONTAINERS: tuple[tuple[bytes, Callable[[bytes, Random, Damage], bytes]], ...] = (
    (b"PK\x03\x04", _zip),
    (b"\x93NUMPY", _npy),
    (b"PAR1", _parquet),
    (b"\x89HDF", _hdf5),
    *((b"\x80" + bytes([protocol]), _pickle) for protocol in range(2, 6)),
)


def lookup3(key: bytes) -> int:
    """Checksum of HDF5's metadata: Bob Jenkins's lookup3, `hashlittle` with an initial value of 0 (public domain)."""
    mask = 0xFFFFFFFF

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> (32 - by)) & mask

    a = b = c = (0xDEADBEEF + len(key)) & mask
    words = np.frombuffer(key + bytes(-len(key) % 12), "<u4").tolist()
    for at in range(0, len(words) - 3, 3):
        a, b, c = (a + words[at]) & mask, (b + words[at + 1]) & mask, (c + words[at + 2]) & mask
        for by in (4, 6, 8, 16, 19, 4):  # each step is the one before with the names moved on
            a = ((a - c) & mask) ^ rotated(c, by)
            c = (c + b) & mask
            a, b, c = b, c, a
    if words:
        a, b, c = ((x + y) & mask for x, y in zip((a, b, c), words[-3:], strict=True))
        for by in (14, 11, 25, 16, 4, 14, 24):
            c = ((c ^ b) - rotated(b, by)) & mask
            a, b, c = b, c, a
    return b if words else c


def repair_checkpoint(folder: Path, rng: Random) -> None:
    """Checksums of a checkpoint's files as they are now, three times of four."""
    for file in folder.rglob("state.json"):
        try:
            state = json.loads(file.read_bytes())
            if rng.random() < 0.75:
                state.pop("sha256_of_this")
                for name in state["sha256"]:
                    state["sha256"][name] = hashlib.sha256((file.parent / name).read_bytes()).hexdigest()
                plain = json.dumps({**state, "sha256": state["sha256"]}, sort_keys=True)
                state["sha256_of_this"] = hashlib.sha256(plain.encode()).hexdigest()
                file.write_text(json.dumps(state))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            return  # the state itself is what was damaged
