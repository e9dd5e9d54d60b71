"""The native module's entries, with arguments that are wrong in any way: an exception, never a read elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from judge import Case, Target
from readers import TESTS  # noqa: F401  (puts the tests' folders on the path)
from safety_entries import ENTRIES

from llmdpd.errors import InputError

Random = np.random.Generator
_OTHERS: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 7, 2**31, 2**32, 2**63, 2**64, 1.5, float("nan"), "x", b"x", [], {}, object(), object),
    *([None], [[]], np.float32(1), np.int64(3), np.zeros(0, np.float32), np.array(None), np.array("x")),
)
_DTYPES = ("f8", "f2", "i4", "i8", "u8", ">f4", "c8", "O", "U1", "?")


def _target(entry: str) -> Target:
    call, arguments, _ = ENTRIES[entry]

    def prepare(folder: Any) -> Case:
        def case(rng: Random) -> None:
            names = list(arguments)
            given = dict(arguments)
            for name in rng.choice(names, size=int(rng.integers(1, min(4, len(names) + 1))), replace=False):
                given[str(name)] = _wrong(given[str(name)], rng)
            call(**given)

        return case

    return Target(prepare, (ValueError, TypeError, OverflowError, InputError))


def _wrong(value: Any, rng: Random) -> Any:
    if isinstance(value, np.ndarray) and rng.random() < 0.8:
        return _ARRAYS[rng.integers(len(_ARRAYS))](value, rng)
    if isinstance(value, list) and rng.random() < 0.8:
        at = int(rng.integers(len(value)))
        how = int(rng.integers(3))
        middle = [[], [value[at], value[at]], [_wrong(value[at], rng)]][how]
        return [*value[:at], *middle, *value[at + 1 :]]
    return _OTHERS[rng.integers(len(_OTHERS))]


def _shape(array: np.ndarray, rng: Random) -> np.ndarray:
    """Another size in one dimension."""
    dim = int(rng.integers(array.ndim))
    shape = list(array.shape)
    shape[dim] = int(rng.choice([0, 1, max(shape[dim] - 1, 0), shape[dim] + 1, 2 * shape[dim], 1000]))
    return np.ones(shape, array.dtype)


def _overlapping(array: np.ndarray, rng: Random) -> np.ndarray:
    """All rows are the same memory, which may be read only."""
    return np.broadcast_to(array[:1], array.shape)


def _values(array: np.ndarray, rng: Random) -> np.ndarray:
    changed = array.copy()
    changed.flat[int(rng.integers(array.size))] = (
        2**60 if array.dtype.kind == "u" else rng.choice([np.nan, np.inf, 1e38])
    )
    return changed


_ARRAYS: tuple[Callable[[np.ndarray, Random], Any], ...] = (
    _shape,
    _overlapping,
    _values,
    lambda array, rng: array.astype(_DTYPES[rng.integers(len(_DTYPES))]),
    lambda array, rng: array[None],
    lambda array, rng: array.reshape(-1),
    lambda array, rng: array.T,
    lambda array, rng: array[..., ::-1],
    lambda array, rng: np.frombuffer(bytearray(array.nbytes + 1), array.dtype, offset=1, count=array.size).reshape(
        array.shape
    ),
    lambda array, rng: array.tolist(),
    lambda array, rng: memoryview(array),
)
NATIVE = {f"native: {entry}": _target(entry) for entry in ENTRIES}
