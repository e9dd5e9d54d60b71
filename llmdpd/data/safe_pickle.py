"""Reading pickled NumPy arrays without running anything from the file.

NumPy's own constructors are admitted by NAME only. The file gets stand-ins of this module in their place, because the
real ones are not safe with hostile files: an array of objects whose dtype was rebuilt with forged flags takes raw bytes
for pointers. The stand-ins build plain arrays of numbers and text, and lists, from checked parts.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.content import array_of
from llmdpd.errors import InputError

_DTYPE = re.compile(r"(?:[fiuc][0-9]{1,2}|b1|\?|[SU][0-9]{0,6}|O8?)")
_MAX_DEPTH = 16
_MARK = -1
_MOST_EMPTY = 1 << 20
_SHARED = 8
"""What lists hold, counted once a place, is at most so many times the file's bytes: shared lists can be a tower."""

# What pickled arrays, dicts, lists, text and numbers are written with, protocols 0 to 5. Left out: everything that
# makes objects other than by calling an admitted constructor, asks for outside data, or uses the process's registries.
_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL
    STACK_GLOBAL REDUCE BUILD NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    """.split()  # noqa: SIM905
)


class _RefusedError(Exception):
    """The file asks for something that is not admitted; becomes an InputError naming the file."""


class _Inert:
    """The stand-in for a name. It may be passed on and called, and no attribute of it may be set."""

    __slots__ = ("function", "name")
    name: str
    function: Callable[..., object] | None

    def __init__(self, name: str, function: Callable[..., object] | None = None) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "function", function)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise _RefusedError(f"setting {name} of {self.name}")

    def __setstate__(self, state: object) -> NoReturn:
        raise _RefusedError(f"setting the state of {self.name}")

    def __call__(self, *args: object) -> object:
        if self.function is None:
            raise _RefusedError(f"calling {self.name}")
        return self.function(*args)


_NDARRAY = _Inert("numpy.ndarray")


class _DType:
    """Stand-in for a dtype under construction: numbers, text or objects; no record, no sub-array, no forged size."""

    __slots__ = ("code", "real")

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise _RefusedError(f"numpy.dtype({code!r:.60})")
        self.code = code
        self.real: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        # (version, byte order, sub-array, names, fields, size, alignment, flags): all but the order follow from `code`.
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise _RefusedError("a dtype with fields or sub-arrays")
        if state[1] not in ("<", ">", "=", "|"):
            raise _RefusedError(f"a dtype of byte order {state[1]!r:.20}")
        self.real = self.real.newbyteorder(state[1])


class _Array:
    """Stand-in for an array under construction: `value` is a real array of numbers or text, or a list of objects."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: NDArray[Any] | list[Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise _RefusedError("an array with an unknown state")
        shape, dtype, fortran, data = state[-4:]
        self.value = _array_value(data, dtype, shape, bool(fortran))


def _array_value(data: object, dtype: object, shape: object, fortran: bool) -> NDArray[Any] | list[Any]:
    if not isinstance(dtype, _DType):
        raise _RefusedError("an array without a dtype")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise _RefusedError(f"an array of shape {shape!r:.60}")
    if dtype.code[0] == "O":
        if not isinstance(data, list) or len(data) != math.prod(shape):
            raise _RefusedError("an array of objects whose contents are not a list of its size")
        return data
    raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote its bytes as text
    if not isinstance(raw, (bytes, bytearray)):
        raise _RefusedError("an array of numbers whose contents are not bytes")
    real = dtype.real
    if not real.itemsize and math.prod(shape) > _MOST_EMPTY:
        raise _RefusedError(f"an array of {math.prod(shape)} empty texts")
    if len(raw) != real.itemsize * math.prod(shape):
        raise _RefusedError(f"an array of shape {shape} and type {real} from {len(raw)} bytes")
    return array_of(raw, real, shape, fortran)


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _NDARRAY:
        raise _RefusedError("an array of another class than numpy.ndarray")
    return _Array()


def _frombuffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.value = _array_value(data, dtype, shape, order == "F")
    if isinstance(array.value, list):
        raise _RefusedError("an array of objects from a buffer")
    return array


def _scalar(dtype: object, data: object = b"") -> Any:
    value = _array_value(data, dtype, (), False)
    if isinstance(value, list):
        raise _RefusedError("a scalar of objects")
    return value[()]


def _encode(text: object, encoding: object = "latin1") -> bytes:
    # How protocols 0 to 2 write bytes. Any other codec is refused: codecs are looked up, and may decompress.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"_codecs.encode to {encoding!r:.40}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], _Inert] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Inert("numpy.dtype", _DType),
    ("_codecs", "encode"): _Inert("_codecs.encode", _encode),
    # How protocols 0 to 2 write no bytes at all (an array without rows). Any argument is one too many.
    ("__builtin__", "bytes"): _Inert("bytes", lambda: b""),
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _Inert("numpy _reconstruct", _reconstruct)
    _ADMITTED[f"{_core}.multiarray", "scalar"] = _Inert("numpy scalar", _scalar)
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _Inert("numpy _frombuffer", _frombuffer)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("an object kept outside the file")


def load_arrays(file: io.BytesIO | mmap.mmap, path: str | Path, field: str | None = None) -> Any:
    """Read the pickle that starts at the position of `file`: NumPy arrays in lists, dicts and tuples, and nothing else.

    Arrays of objects come back as flat lists. `path` and `field` are for messages.

    Raises:
        InputError: the pickle asks for more than arrays (the message says for what; nothing of it was run), or it is
            broken or cut off.
    """
    start = file.tell()
    try:
        _check_opcodes(file)
        file.seek(start)
        # latin1 is how NumPy's own loader reads files written by Python 2.
        value = _resolve(_ArrayUnpickler(file, encoding="latin1").load(), {}, 0)
        if _places(value, {}) > max(_MOST_EMPTY, _SHARED * (file.seek(0, io.SEEK_END) or file.tell())):
            raise _RefusedError("lists that hold each other many times over")
        return value
    except _RefusedError as refused:
        problem = "refused: the pickle asks for more than arrays (nothing of it was run)"
        expected = "NumPy's array constructors only"
        raise InputError(problem, path=path, field=field, found=str(refused), expected=expected) from None
    except Exception as error:  # hostile or damaged bytes can make the parser raise anything
        problem, found = "a damaged or cut off pickle", f"{type(error).__name__}: {error}"[:200]
        expected = "a pickle of NumPy arrays"
        raise InputError(problem, path=path, field=field, found=found, expected=expected) from None


def _places(value: Any, counted: dict[int, int]) -> int:
    """How many things lists, tuples and dicts hold, each counted as often as it is held."""
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if id(value) not in counted:
        parts = value.values() if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_places(part, counted) for part in parts)
    return counted[id(value)]


def _check_opcodes(file: io.BytesIO | mmap.mmap) -> None:
    """Refuse opcodes that arrays don't need, and memo numbers that would make the unpickler fill the memory.

    And towers of tuples: as a key of a dict one is hashed while it is unpickled, its shared parts each time anew.
    """
    operations = pickletools.genops(file)  # type: ignore[arg-type]  # an mmap reads like a file
    heights = _Heights()
    for count, (opcode, argument, position) in enumerate(operations, start=1):
        if opcode.name not in _OPCODES:
            raise _RefusedError(f"the instruction {opcode.name} at byte {position}")
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > count:
            raise _RefusedError(f"memo number {argument} at byte {position}")
        if heights.after(opcode, argument) > _MAX_DEPTH:
            raise _RefusedError(f"tuples nested too deep at byte {position}")


class _Heights:
    """Follows the unpickler's stack: how many tuples are within each other in each of its things."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}

    def after(self, opcode: pickletools.OpcodeInfo, argument: object) -> int:
        """The height of the thing on top once this instruction is done."""
        name, before, stack = opcode.name, opcode.stack_before, self._stack
        if name == "MEMOIZE" or name.endswith("PUT"):
            self._memo[argument if isinstance(argument, int) else len(self._memo)] = stack[-1] if stack else 0
            return 0
        count = len(before)
        if pickletools.markobject in before:
            mark = len(stack) - 1 - stack[::-1].index(_MARK) if _MARK in stack else 0
            count = len(stack) - mark + before.index(pickletools.markobject)
        taken = stack[max(len(stack) - count, 0) :] if count else []
        del stack[len(stack) - len(taken) :]
        for thing in opcode.stack_after:
            height = 0
            if thing is pickletools.markobject:
                height = _MARK
            elif name.endswith("GET") and isinstance(argument, int):
                height = self._memo.get(argument, 0)
            elif name.startswith("TUPLE"):
                height = 1 + max(taken, default=0)
            elif name == "DUP":
                height = taken[-1] if taken else 0
            stack.append(height)
        return stack[-1] if stack else 0


def _resolve(value: Any, done: dict[int, Any], depth: int) -> Any:
    """Put real arrays (or lists) where stand-ins are. Shared parts are visited once; cycles and towers are refused."""
    if isinstance(value, (_Inert, _DType)):
        raise _RefusedError("a constructor kept as data")
    if not isinstance(value, (list, tuple, dict, _Array)):
        return value
    if depth > _MAX_DEPTH:
        raise _RefusedError("arrays nested too deep")
    if id(value) in done:
        if done[id(value)] is None:
            raise _RefusedError("an array that contains itself")
        return done[id(value)]
    done[id(value)] = None
    result: Any
    if isinstance(value, _Array):
        if value.value is None:
            raise _RefusedError("an array without contents")
        inner = value.value
        result = _resolve(inner, done, depth + 1) if isinstance(inner, list) else inner
    elif isinstance(value, dict):
        result = {_resolve(k, done, depth + 1): _resolve(v, done, depth + 1) for k, v in value.items()}
    else:
        result = type(value)(_resolve(part, done, depth + 1) for part in value)
    done[id(value)] = result
    return result
