"""Damage to the bytes of a file: blind, inside of what its text or JSON means, or behind a container's own checks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from containers import damaged_inside

Random = np.random.Generator

# Words that readers have stumbled over; a new one is a line here.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -0.0, 0.5, float("nan"), float("inf")),
    *(
        "",
        "\x00",
        "[red]x[/b]",
        "../../x",
        "a" * 300,
        "\ud800",
        "ä\u202e",
        "1" * 5000,
        [],
        {},
        [None],
        [[]],
        {"": None},
    ),
)
_TOKENS: tuple[bytes, ...] = (
    *(b"NaN", b"Infinity", b"-1e999", b"null", b"9" * 5000, b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"[" * 200_000),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n", b'"', b"[/]", b"%s", b"{}", b"\\"),
)


def mutate(content: bytes, rng: Random) -> bytes:
    """The content with damage, chosen by `rng`: JSON as values and containers inside half of the time, or blind."""
    if rng.random() < 0.5:
        changed = damaged_inside(content, rng, _damage)
        if changed is not None or (changed := _as_json(content, rng)) is not None:
            return changed
    return _blind(content, rng)


def _damage(content: bytes, rng: Random) -> bytes:
    changed = _as_json(content, rng) if rng.random() < 0.6 else None
    return _blind(content, rng) if changed is None else changed


def _blind(content: bytes, rng: Random) -> bytes:
    """One to four kinds of damage."""
    for _ in range(int(rng.integers(1, 5))):
        content = _BLIND[rng.integers(len(_BLIND))](content, rng)
    return content


def _place(content: bytes, rng: Random) -> int:
    """A position; half of the time among the first bytes, where formats have their headers."""
    last = len(content) if rng.random() < 0.5 else min(len(content), 512)
    return int(rng.integers(0, last + 1))


def _flip(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.choice([1, 1, 2, 8, 64]))):
        if changed:
            changed[_place(content, rng) % len(changed)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: _place(content, rng)]


def _remove(content: bytes, rng: Random) -> bytes:
    start = _place(content, rng)
    return content[:start] + content[start + int(rng.integers(1, 64)) :]


def _insert(content: bytes, rng: Random) -> bytes:
    start = _place(content, rng)
    what = rng.bytes(int(rng.integers(1, 32))) if rng.random() < 0.3 else _TOKENS[rng.integers(len(_TOKENS))]
    return content[:start] + what + content[start:]


def _number(content: bytes, rng: Random) -> bytes:
    """Sizes of binary formats: some bytes become an extreme integer."""
    width = int(rng.choice([1, 2, 4, 8]))
    value = int(rng.choice([0, 1, 2**7 - 1, 2**8 - 1])) if width == 1 else (1 << int(rng.integers(8 * width))) - 1
    start = _place(content, rng)
    return content[:start] + value.to_bytes(width, "little") + content[start + width :]


def _repeat(content: bytes, rng: Random) -> bytes:
    start, length = _place(content, rng), int(rng.integers(1, 256))
    return content[: start + length] + content[start : start + length] * int(rng.integers(1, 8)) + content[start:]


def _swap_digits(content: bytes, rng: Random) -> bytes:
    """A digit of a text becomes another word."""
    digits = [place for place, byte in enumerate(content[:4096]) if 48 <= byte < 58]
    if not digits:
        return _flip(content, rng)
    place = int(rng.choice(digits))
    return content[:place] + _TOKENS[rng.integers(5)] + content[place + 1 :]


_BLIND: tuple[Callable[[bytes, Random], bytes], ...] = (_flip, _cut, _remove, _insert, _number, _repeat, _swap_digits)


def _as_json(content: bytes, rng: Random) -> bytes | None:
    """The JSON document, or one line of JSON lines, with values changed; None where it is neither."""
    lines = content.splitlines()
    for first, last in ((0, len(lines)), (at := int(rng.integers(max(len(lines), 1))), at + 1)):
        try:
            value = json.loads(b"\n".join(lines[first:last]))
        except (ValueError, RecursionError):
            continue
        for _ in range(int(rng.integers(1, 3))):
            value = change_value(value, rng)
        text = json.dumps(value).encode()
        return b"\n".join([*lines[:first], text, *lines[last:]]) + b"\n"
    return None


def change_value(value: Any, rng: Random) -> Any:
    """A nested value with one place exchanged, left out, doubled, renamed or wrapped."""
    places = list(_places(value))
    if not places:
        return _value(rng)
    holder, key = places[rng.integers(len(places))]
    action = int(rng.integers(6))
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[str(_value(rng))] = holder.pop(key)
    elif action == 2 and isinstance(holder, list):
        holder.append(holder[key])
    elif action == 3:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
    else:
        holder[key] = _value(rng)
    return value


def _value(rng: Random) -> Any:
    return copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])  # what it is put into is changed further


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(entries):
        yield value, key
        yield from _places(part)
