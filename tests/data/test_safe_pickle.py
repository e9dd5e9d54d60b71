"""Pickles: NumPy's own read right, everything else refused by name, and nothing of it run."""

from __future__ import annotations

import builtins
import codecs
import collections
import io
import os
import pickle
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdpd.data.safe_pickle import load_arrays
from llmdpd.errors import InputError

ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    np.arange(5, dtype=">i4"),
    np.array([True, False]),
    np.array("box-close-v2"),
    np.array(["ä", "\U0001f600x"]),
    np.array([b"ab", b"c"]),
    np.zeros((0, 3), np.float16),
    np.array(3.5),
    np.arange(24)[::2].reshape(3, 4).T,
    np.array([1 + 2j]),
]


def load(data: bytes) -> Any:
    return load_arrays(io.BytesIO(data), "file.pkl", "episodes")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_back_as_they_were(array: np.ndarray, protocol: int) -> None:
    back = load(pickle.dumps({"x": [array, (array, "text", 7, 2.5, None, True)]}, protocol=protocol))
    for value in (back["x"][0], back["x"][1][0]):
        assert value.dtype == array.dtype
        np.testing.assert_array_equal(value, array)
    assert back["x"][1][1:] == ("text", 7, 2.5, None, True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_object_arrays_nest_and_scalars_are_read(protocol: int) -> None:
    inner = np.empty(2, object)
    inner[0], inner[1] = np.arange(3), {"s": np.float32(1.5)}
    outer = np.empty(2, object)
    outer[0], outer[1] = inner, "t"
    back = load(pickle.dumps(outer, protocol=protocol))
    assert isinstance(back, list), "a flat list"
    np.testing.assert_array_equal(back[0][0], np.arange(3))
    assert back[0][1]["s"] == np.float32(1.5)
    assert type(back[0][1]["s"]) is np.float32
    assert back[1] == "t"


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("nested", [False, True])
def test_code_is_refused_and_not_run(tmp_path: Path, protocol: int, nested: bool) -> None:
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()"
    attempts: list[tuple[Any, str]] = [
        (Calls(os.system, f"touch {mark}"), "system"),
        (Calls(builtins.eval, code), "eval"),
        (Calls(builtins.exec, code), "exec"),
        (Calls(subprocess.getoutput, f"touch {mark}"), "getoutput"),
        (Calls(builtins.getattr, "x", "format"), "getattr"),
        (Calls(builtins.open, str(mark), "w"), "open"),
        (Calls(np.load, "x.npy"), "load"),
        (Calls(np.fromfile, "/etc/passwd"), "fromfile"),
        (Calls(np.memmap, str(mark), "u1", "w+", 0, (1,)), "memmap"),
        (Calls(np.save, str(mark), 1), "save"),
        (Calls(np.vectorize, os.system), "vectorize"),
        (Calls(np.frompyfunc, os.system, 1, 1), "frompyfunc"),
        (Calls(codecs.decode, b"x", "zlib"), "decode"),
        (Calls(collections.OrderedDict), "OrderedDict"),
    ]
    for value, name in attempts:
        if nested:
            array = np.empty(1, object)
            array[0] = {"observations": np.zeros(3), "task": value}
            value = array
        with pytest.raises(InputError, match="refused: the pickle asks for more than arrays") as caught:
            load(pickle.dumps(value, protocol=protocol))
        assert name in str(caught.value.found)
        assert (caught.value.path, caught.value.field) == ("file.pkl", "episodes")
        assert not mark.exists()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


NDARRAY = b"cnumpy\nndarray\n"
RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n"
EMPTY = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85C\x01btR"
DTYPE_O = b"cnumpy\ndtype\n(" + text("O8") + b"\x89\x88tR"
POINTERS = b"C\x08" + struct.pack("<Q", 0x4141414141414141)

HOSTILE = {
    # An object dtype with its flags forged to 0: NumPy's own setstate would then take raw bytes for pointers.
    "forged object flags": b"\x80\x03" + EMPTY + b"(K\x01K\x01\x85" + DTYPE_O
    + b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + b"\x89" + POINTERS + b"tb.",
    "objects from a buffer": b"\x80\x05cnumpy._core.numeric\n_frombuffer\n(" + POINTERS + DTYPE_O
    + b"K\x01\x85" + text("C") + b"tR.",
    "scalar of objects": b"\x80\x03cnumpy._core.multiarray\nscalar\n" + DTYPE_O + POINTERS + b"\x86R.",
    "record dtype": b"\x80\x03cnumpy\ndtype\n(" + text("V8") + b"\x89\x88tR.",
    "dtype from a list": b"\x80\x03cnumpy\ndtype\n]\x85R.",
    "dtype with fields": b"\x80\x03" + EMPTY + b"(K\x01K\x01\x85cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR"
    + b"(K\x03" + text("<") + b"N" + text("a") + b"\x85}" + b"K\x01K\x01K\x00tb\x89" + POINTERS + b"tb.",
    "more shape than data": b"\x80\x03" + EMPTY + b"(K\x01M\xff\xff\x85cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR"
    + b"\x89" + POINTERS + b"tb.",
    "negative shape": b"\x80\x03" + EMPTY + b"(K\x01J\xff\xff\xff\xff\x85cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR"
    + b"\x89" + POINTERS + b"tb.",
    "array of no dtype": b"\x80\x03" + EMPTY + b"(K\x01K\x01\x85N\x89" + POINTERS + b"tb.",
    "subclass": RECONSTRUCT + b"(cnumpy\ndtype\nK\x00\x85C\x01btR.",
    "state of a constructor": b"\x80\x03" + RECONSTRUCT + b"}" + text("x") + text("y") + b"sb.",
    "attributes of a constructor": b"\x80\x03" + RECONSTRUCT + b"N}" + text("function") + NDARRAY + b"s\x86b.",
    "a constructor as data": b"\x80\x03" + NDARRAY + b".",
    "a dtype as data": b"\x80\x03" + DTYPE_O + b".",
    "an array without contents": b"\x80\x03" + EMPTY + b".",
    "new object": b"\x80\x02" + NDARRAY + b")\x81.",
    "new object ex": b"\x80\x04" + NDARRAY + b")}\x92.",
    "instance opcode": b"(ios\nsystem\n.",
    "obj opcode": b"(" + NDARRAY + b"o.",
    "calling text": b"\x80\x03" + text("x") + b")R.",
    "extension registry": b"\x80\x02\x82\x01.",
    "persistent id": b"Pmy-id\n.",
    "persistent id, binary": b"\x80\x02K\x01Q.",
    "buffer outside": b"\x80\x05\x97.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "dotted module": b"\x80\x04\x8c\x05numpy\x8c\x08core.sys\x93.",
    "a submodule's name": b"cnumpy.lib.npyio\nload\n.",
    "ctypeslib": b"cnumpy\nctypeslib\n.",
    "bytes of a size": b"c__builtin__\nbytes\nI1000000000\n\x85R.",
    "another codec": b"c_codecs\nencode\n" + text("x") + text("zlib_codec") + b"\x86R.",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "contains itself": b"\x80\x03]q\x00h\x00a.",
    "a tower": b"\x80\x03" + b"]" * 60 + b"a" * 59 + b".",
}  # fmt: skip


def test_shared_parts_are_read_once() -> None:
    shared: list[Any] = [np.arange(2)]
    for _ in range(12):
        shared = [shared, shared]
    back = load(pickle.dumps(shared))
    assert back[0] is back[1]


VALID = pickle.dumps([{"a": np.arange(6.0).reshape(2, 3), "t": np.array("x"), "s": np.float32(1)}], protocol=3)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=0, max_size=4), st.integers(0, 4))
def test_damage_gives_a_value_or_one_error(place: int, insert: bytes, remove: int) -> None:
    damaged = VALID[:place] + insert + VALID[place + remove :]
    try:
        value = load(damaged)
    except InputError:
        return
    assert isinstance(value, (list, dict, tuple, str, bytes, int, float, np.ndarray, np.generic, type(None)))


FOUND = {
    "forged object flags": "objects whose contents are not a list",
    "scalar of objects": "objects whose contents are not a list",
    "extension registry": "EXT1",
    "new object": "NEWOBJ",
    "instance opcode": "INST",
    "huge memo": "memo number",
    "dotted name": "numpy.ndarray.__init__",
    "another codec": "zlib_codec",
    "state of a constructor": "state of numpy _reconstruct",
    "contains itself": "contains itself",
    "a tower": "nested too deep",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_by_what_they_ask_for(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load(HOSTILE[name])
    assert caught.value.path == "file.pkl"
    assert FOUND.get(name, "") in str(caught.value.found)


def test_other_bytes() -> None:
    """Older NumPy's spelling is read; forged lengths and shapes, and a cut at any place, are refused."""
    array = np.empty(3, object)
    array[:] = ["a", "b", "c"]
    data = pickle.dumps(array, protocol=3)
    for spelling in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        assert load(data.replace(b"numpy._core.multiarray", spelling)) == ["a", "b", "c"]
    assert data.count(b"K\x03\x85") == 1
    with pytest.raises(InputError, match="refused"):
        load(data.replace(b"K\x03\x85", b"K\x04\x85"))
    with pytest.raises(InputError, match="damaged or cut off"):
        load(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.")
    for length in range(0, len(VALID), 7):
        with pytest.raises(InputError):
            load(VALID[:length])


def test_lists_that_hold_each_other_many_times_are_refused(tmp_path: Path) -> None:
    """A file of some hundred bytes that would be 10^12 numbers."""
    value: list[Any] = [0.0]
    for _ in range(12):
        value = [value] * 10
    with pytest.raises(InputError, match="hold each other"):
        load_arrays(io.BytesIO(pickle.dumps(value)), tmp_path)
    shared = [np.ones(3)] * 1000  # an array that many episodes have, such as a goal
    assert len(load_arrays(io.BytesIO(pickle.dumps(shared)), tmp_path)) == 1000


def test_arrays_of_nothing_take_no_memory(tmp_path: Path) -> None:
    small = pickle.dumps(np.zeros(7, "S1"), protocol=2)
    huge = small.replace(b"K\x07\x85", b"J\x00\xca\x9a\x3b\x85").replace(b"S1", b"S0")
    assert huge != small
    with pytest.raises(InputError, match=r"empty texts|from .* bytes|damaged|dtype"):
        load_arrays(io.BytesIO(huge), tmp_path)


def test_a_tower_of_tuples_as_a_key_is_refused_before_it_is_hashed(tmp_path: Path) -> None:
    """Each tuple holds the one before twice: hashing the 40th takes 10^12 steps."""
    tower = b"\x80\x02}q\x00K\x01\x85q\x01"
    for number in range(2, 42):
        tower += b"h" + bytes([number - 1]) + b"h" + bytes([number - 1]) + b"\x86q" + bytes([number])
    with pytest.raises(InputError, match="tuples nested too deep"):
        load_arrays(io.BytesIO(tower + b"K\x01s."), tmp_path)
