"""Files of exported policies with anything in them: an error code or an action, never a crash.

`.ci/sanitize` runs these with the library under sanitizers, which end the process at the first wrong access.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import CASES, Library, RefusedError, make_policy, prompt_of

from llmdpd.export.container import ENTRY, HEADER, with_header
from llmdpd.export.cpp import export_cpp

Rng = np.random.Generator
Entries = list[list[Any]]
FORMAT, MISMATCH, NUMBER = 3, 4, 6
NUMBERS = (0, 1, 2, 3, 5, 64, 4096, 2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def outcome(library: Library, policy: bytes, prompt: bytes, rng: Rng) -> int:
    """0 where the files are taken and an action comes of them, else the code of the refusal."""
    try:
        acting = library.policy(policy, prompt)
        width = library.c.llmdpd_observation_size(acting.handle)
        acting.act(rng.normal(size=(2, width)).astype(np.float32))
    except RefusedError as refused:
        return refused.code
    return 0


def opened(content: bytes) -> tuple[tuple[Any, ...], Entries, bytearray]:
    """Header, entries, and the whole of a file."""
    header = HEADER.unpack_from(content)
    entries = [list(ENTRY.unpack_from(content, HEADER.size + i * ENTRY.size)) for i in range(header[-1])]
    return header, entries, bytearray(content)


def closed(header: tuple[Any, ...], entries: Entries, content: bytearray) -> bytes:
    """The file with these entries, and a checksum that fits."""
    for i, entry in enumerate(entries[: header[-1]]):
        ENTRY.pack_into(content, HEADER.size + i * ENTRY.size, *entry)
    return with_header(header[2], header[4], len(entries), bytes(content[HEADER.size :]))


def _shape(entries: Entries, content: bytearray, rng: Rng) -> None:
    entry = entries[rng.integers(len(entries))]
    entry[4 + rng.integers(4)] = int(rng.choice(NUMBERS))


def _kind(entries: Entries, content: bytearray, rng: Rng) -> None:
    entry = entries[rng.integers(len(entries))]
    entry[1 + rng.integers(2)] = int(rng.integers(6))


def _place(entries: Entries, content: bytearray, rng: Rng) -> None:
    entry = entries[rng.integers(len(entries))]
    places = (*NUMBERS, 2**63, 2**64 - 64, len(content) - 64, len(content) // 64 * 64)
    entry[3] = places[rng.integers(len(places))]


def _name(entries: Entries, content: bytearray, rng: Rng) -> None:
    one, other = rng.integers(len(entries), size=2)
    entries[one][0] = [entries[other][0], b"x" * 56, b"", b"likeness"][rng.integers(4)]


def _swap(entries: Entries, content: bytearray, rng: Rng) -> None:
    one, other = rng.integers(len(entries), size=2)
    entries[one][1:], entries[other][1:] = entries[other][1:], entries[one][1:]


def _leave_out(entries: Entries, content: bytearray, rng: Rng) -> None:
    if len(entries) > 1:
        entries.pop(int(rng.integers(len(entries))))


def _number(entries: Entries, content: bytearray, rng: Rng) -> None:
    small = [entry for entry in entries if entry[1] == 2] or entries  # those that sizes and indices are in
    entry = small[rng.integers(len(small))]
    count = max(1, int(np.prod([n for n in entry[4 : 4 + entry[2]]])))
    at = entry[3] + 4 * int(rng.integers(count))
    value = int(rng.choice([*NUMBERS, 2**32 - 2, 7, 12]))
    content[at : at + 4] = struct.pack("<I", value)


def _float(entries: Entries, content: bytearray, rng: Rng) -> None:
    entry = entries[rng.integers(len(entries))]
    value = float(rng.choice([np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, 1e-44]))
    content[entry[3] : entry[3] + 4] = struct.pack("<f", value)


CHANGES = (_shape, _kind, _place, _name, _swap, _leave_out, _number, _float)


@pytest.fixture(params=["default", "chunk", "soft", "pooled"])
def files(request: pytest.FixtureRequest, rng: Rng, tmp_path: Path) -> tuple[bytes, bytes]:
    """A policy's file and a prompt's."""
    policy = make_policy(**CASES[request.param])
    export_cpp(policy, {"push": prompt_of(rng, policy)}, tmp_path / "out")
    folder = tmp_path / "out"
    return (folder / "policy.llmdpd").read_bytes(), (folder / "prompts" / "push.llmdpd").read_bytes()


def test_any_damage_is_found(files: tuple[bytes, bytes], library: Library, rng: Rng) -> None:
    assert outcome(library, *files, rng) == 0
    for which in (0, 1):
        for _ in range(60):
            whole = bytearray(files[which])
            place = int(rng.integers(len(whole)))
            whole[place] ^= int(rng.integers(1, 256))
            given = [*files[:which], bytes(whole), *files[which + 1 :]]
            assert outcome(library, *given, rng) == (MISMATCH if 24 <= place < 32 else FORMAT)
        for size in (0, 1, 39, 40, len(files[which]) - 1, int(rng.integers(len(files[which])))):
            given = [*files[:which], files[which][:size], *files[which + 1 :]]
            assert outcome(library, *given, rng) == FORMAT


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_is_crafted_to_fit_its_checksum_never_crashes(
    change: Callable[[Entries, bytearray, Rng], None], files: tuple[bytes, bytes], library: Library, rng: Rng
) -> None:
    codes = []
    for _ in range(150):
        given = list(files)
        which = int(rng.integers(2))
        header, entries, content = opened(files[which])
        for _ in range(int(rng.integers(1, 3))):
            change(entries, content, rng)
        given[which] = closed(header, entries, content)
        codes.append(outcome(library, *given, rng))
    assert set(codes) <= {0, FORMAT, NUMBER}
    assert FORMAT in codes


def test_noise_is_no_file(library: Library, rng: Rng) -> None:
    for _ in range(50):
        noise = rng.bytes(int(rng.integers(0, 4000)))
        assert outcome(library, noise, noise, rng) == FORMAT
        header = struct.pack("<8sIIQ", b"LLMDPD\r\n", 1, 1, len(noise) + 24)
        assert outcome(library, header + noise, noise, rng) == FORMAT
