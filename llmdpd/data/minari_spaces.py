"""The spaces of a Minari data set as its metadata have them, and their values as flat vectors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.assemble import as_float32, check_rows
from llmdpd.data.flags import nested
from llmdpd.data.notes import say_once
from llmdpd.errors import InputError
from llmdpd.utils.files import parse_json

_log = logging.getLogger(__name__)
Leaf = tuple[str, ...]
"""Where one vector of a space stands: its keys from the outside in; none of a space that is one vector itself."""


def space_leaves(text: object, keys: Sequence[str], field: str, path: Path) -> list[Leaf]:
    """The vectors that make up a space, in order: those under `keys`, or all, in the order of Gymnasium's `flatten`.

    Args:
        text: the space as JSON, as Minari writes it.
        keys: "a", or "a/b" of nested spaces; none: all. A space without keys is taken whole.
        field: the space's name in the metadata at `path`, for messages.

    Raises:
        InputError: no space is written there: Minari would make an environment to learn it, which imports and runs what
            the file names. A key that is not there, of actions also where there are none; a part that is no Box of one
            dimension.
    """
    if not isinstance(text, str):
        raise InputError("the space is not in the metadata", path=path, field=field, expected="a serialised space")
    try:
        space = parse_json(text, path, field, finite=False)
        leaves = _leaves(space, ())
    except (InputError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError("damaged metadata", path=path, field=field, found=text[:80]) from None
    if keys and space["type"] != "Dict":
        _without_keys(keys, space, field, path)
    elif keys:
        leaves = {leaf: kind for key in keys for leaf, kind in _under(key, leaves, field, path).items()}
    for leaf, kind in leaves.items():
        if kind is not None:
            hint = "flatten the data set's observations and actions first"
            if leaf:
                hint = f"choose others: this is under the key {'/'.join(leaf)}"
            problem, expected = "this space can't be used", "a Box of one dimension, or a Dict of such"
            raise InputError(problem, path=path, field=field, found=kind, expected=expected, hint=hint)
    return list(leaves)


def _without_keys(keys: Sequence[str], space: Any, field: str, path: Path) -> None:
    """Say that keys of observations have no meaning here; raise `InputError` for one of actions."""
    if field == "action_space" and list(keys) != ["actions"]:
        found, expected = f"{', '.join(keys)}; the space is a {space['type']}", "`action` left out"
        raise InputError("the space has no such key", path=path, field=field, found=found, expected=expected)
    if field != "action_space":
        words = "%s: the space is a %s: observation = %s has no meaning, it is read whole"
        say_once(_log, words, path, space["type"], list(keys))


def _leaves(space: Any, place: Leaf) -> dict[Leaf, str | None]:
    """Leaf → None where it is a vector, otherwise what it is."""
    kind, shape = space["type"], space.get("shape")
    if kind == "Dict" and space.get("subspaces"):
        parts = [_leaves(inner, (*place, key)) for key, inner in space["subspaces"].items()]
        return {leaf: what for part in parts for leaf, what in part.items()}
    if kind == "Box" and isinstance(shape, list) and len(shape) <= 1 and (place or shape):
        return {place: None}
    return {place: f"{kind} of shape {shape}" if shape else str(kind)}


def _under(key: str, leaves: dict[Leaf, str | None], field: str, path: Path) -> dict[Leaf, str | None]:
    parts = tuple(key.split("/"))
    found = {leaf: kind for leaf, kind in leaves.items() if parts == leaf[: len(parts)] or leaf[:1] == (key,)}
    if not found:
        known = ", ".join("/".join(leaf) for leaf in leaves)
        raise InputError("the space has no such key", path=path, field=field, found=key, expected=f"some of {known}")
    return found


def flat_values(value: Any, leaves: Sequence[Leaf], rows: int, field: str, path: Path) -> NDArray[np.float32]:
    """The values of a space at `rows` steps as one array [rows, width].

    Raises:
        InputError: a part missing, or of another number of rows.
    """
    if list(leaves) == [()]:
        return as_float32(value, field, str(path), ndim=2)
    parts = []
    for leaf in leaves:
        name = f"{'/'.join(leaf)} of {field}"
        part = nested(value, "/".join(leaf))
        if part is None:
            raise InputError("a field is missing", path=path, field=name)
        array = np.asarray(part)
        parts.append(as_float32(array[:, None] if array.ndim == 1 else array, name, str(path), ndim=2))
    check_rows({field: parts[0]}, rows, path)
    for leaf, part in zip(leaves, parts, strict=True):
        check_rows({f"{'/'.join(leaf)} of {field}": part}, rows, path)
    return np.concatenate(parts, axis=1)
