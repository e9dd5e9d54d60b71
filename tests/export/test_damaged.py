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
from exporting import CASES, Library, RefusedError, demonstration, make_policy, prompt_of

from llmdpd.export.container import ENTRY, HEADER, VERSION, with_header
from llmdpd.export.contents import Prompt
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
        for step in (0, 1000, 1001):  # the last two are the tracker's, where there is one
            acting.set_step(0, step)
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


@pytest.fixture(params=["default", "chunk", "soft", "pooled", "tracked"])
def files(request: pytest.FixtureRequest, rng: Rng, tmp_path: Path) -> tuple[bytes, bytes]:
    """A policy's file and a prompt's."""
    return exported_as(request.param, rng, tmp_path / "out")


def exported_as(case: str, rng: Rng, folder: Path) -> tuple[bytes, bytes]:
    policy = make_policy(**CASES[case])
    export_cpp(policy, {"push": prompt_of(rng, policy)}, folder)
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


# Of each tensor what one of its numbers becomes; the observation has 11 of them, the action 5.
WRONG_NUMBERS: dict[str, tuple[str, int, Any, str]] = {
    "scene.points": ("<i", 2, 11, "out of range: point"),
    "scene.gripper": ("<i", 1, -1, "a column that is not there: scene.gripper"),
    "scene.move": ("<i", 0, 5, "a column that is not there: scene.move"),
    "scene.grip": ("<i", 0, 2**31 - 1, "a column that is not there: scene.grip"),
    "scene.bounds": ("<f", 7, np.nan, "NaN or Inf in scene.bounds"),
    "scene.numbers": ("<d", 1, 0.0, "out of range: scene.numbers"),
    "track.ends": ("<i", 1, 0, "out of range: steps of a track"),
    "track.body": ("<f", 3, np.inf, "NaN or Inf in track.body"),
    "track.gain": ("<f", 1, -np.inf, "NaN or Inf in track.gain"),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_what_cannot_be_tracked_is_refused_by_name(name: str, library: Library, rng: Rng, tmp_path: Path) -> None:
    policy = make_policy(**CASES["tracked"])
    export_cpp(policy, {"two": Prompt(trajectory=[demonstration(rng, policy, n) for n in (7, 5)])}, tmp_path / "out")
    given = [(tmp_path / "out" / file).read_bytes() for file in ("policy.llmdpd", "prompts/two.llmdpd")]
    assert outcome(library, *given, rng) == 0
    which = int(name.startswith("track."))
    header, entries, content = opened(given[which])
    kind, place, value, words = WRONG_NUMBERS[name]
    start = next(entry[3] for entry in entries if entry[0].rstrip(b"\0") == name.encode())
    struct.pack_into(kind, content, start + place * struct.calcsize(kind), value)
    given[which] = closed(header, entries, content)
    with pytest.raises(RefusedError, match=words) as refused:
        library.policy(*given)
    assert refused.value.code == FORMAT


def test_files_of_the_first_version_are_read_and_those_of_a_later_one_refused(
    library: Library, rng: Rng, tmp_path: Path
) -> None:
    given = exported_as("default", rng, tmp_path / "out")
    for version, expected in ((0, FORMAT), (1, 0), (VERSION + 1, FORMAT)):
        old = (content[:8] + struct.pack("<I", version) + content[12:] for content in given)
        assert outcome(library, *old, rng) == expected


def test_tracks_without_what_they_are_read_by_are_refused(library: Library, rng: Rng, tmp_path: Path) -> None:
    policy, prompt = exported_as("tracked", rng, tmp_path / "out")
    header, entries, content = opened(policy)
    kept = [entry for entry in entries if not entry[0].startswith(b"scene.")]
    with pytest.raises(RefusedError, match="does not hand over") as refused:
        library.policy(closed(header, kept, content), prompt)
    assert refused.value.code == FORMAT


def test_noise_is_no_file(library: Library, rng: Rng) -> None:
    for _ in range(50):
        noise = rng.bytes(int(rng.integers(0, 4000)))
        assert outcome(library, noise, noise, rng) == FORMAT
        header = struct.pack("<8sIIQ", b"LLMDPD\r\n", 1, 1, len(noise) + 24)
        assert outcome(library, header + noise, noise, rng) == FORMAT
