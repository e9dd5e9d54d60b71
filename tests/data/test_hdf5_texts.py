"""Texts of any length in HDF5: their lengths are counted before HDF5 makes room for them."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from llmdpd.data import EpisodeRecord, join_episodes, load_dataset, save_minari
from llmdpd.data.hdf5 import check_own_contents, open_hdf5, read_names, text_attribute
from llmdpd.data.hdf5_texts import array_bytes, attribute_bytes
from llmdpd.errors import InputError

_TEXT, _LIST = h5py.string_dtype(), h5py.vlen_dtype(np.uint8)
_PLACES: dict[str, Callable[[h5py.File, list[str]], object]] = {
    "an array": lambda file, texts: file.create_dataset("texts", data=texts, dtype=_TEXT),
    "chunks": lambda file, texts: file.create_dataset("texts", data=texts, dtype=_TEXT, chunks=(3,)),
    "an attribute": lambda file, texts: file.create_group("group").attrs.create("texts", texts, dtype=_TEXT),
    "lists": lambda file, texts: file.create_dataset("lists", (len(texts),), _LIST).__setitem__(
        slice(None), np.array([*(np.frombuffer(text.encode(), np.uint8) for text in texts), None], object)[:-1]
    ),
    "one text": lambda file, texts: file.create_group("group").attrs.create("texts", texts[0], dtype=_TEXT),
}


def _read(path: Path) -> Any:
    check_own_contents(path)
    with open_hdf5(path, "texts") as file:
        if "texts" in file:
            return read_names(file, "texts")
        if "lists" in file:
            return [bytes(values).decode() for values in file["lists"]]
        text_attribute(file["group"], "texts")
        return np.atleast_1d(file["group"].attrs["texts"]).tolist()


def _change(path: Path, length: int, change: Callable[[bytearray, int], object]) -> None:
    """Change the file at each reference to a text of this length."""
    content, sought = bytearray(path.read_bytes()), struct.pack("<I", length)
    at, found = content.find(sought), 0
    while at >= 0:
        heap = int.from_bytes(content[at + 4 : at + 12], "little")
        if any(content[base + heap :][:4] == b"GCOL" for base in (0, 512)):
            found += 1
            change(content, at)
        at = content.find(sought, at + 1)
    assert found
    path.write_bytes(content)


def _memory_of(read: Callable[[], object]) -> int:
    """Most bytes that were taken, beyond what there is, in a process of its own; it must refuse."""
    child = os.fork()
    if child:
        status = os.wait4(child, 0)
        assert status[1] == 0
        return 1024 * (status[2].ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    try:
        with pytest.raises(InputError):
            read()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("place", _PLACES)
def test_texts_are_read(tmp_path: Path, place: str, libver: str, userblock: int, rng: np.random.Generator) -> None:
    path = tmp_path / "a.hdf5"
    texts = ["ä" * int(rng.integers(0, 300)) for _ in range(1 if place == "one text" else 7)]
    with h5py.File(path, "w", libver=libver, userblock_size=userblock) as file:
        _PLACES[place](file, texts)
        if "group" in file:
            file["group"].attrs["other"] = np.zeros(3000)  # so that the header goes on in another block
    assert _read(path) == texts


@pytest.mark.parametrize(
    ("place", "libver"),  # in later files a header has a checksum
    [*((place, "earliest") for place in _PLACES), ("an array", "latest"), ("chunks", "latest")],
)
@pytest.mark.parametrize("userblock", [0, 512])
def test_a_length_of_gigabytes_is_refused_before_memory_is_taken(
    tmp_path: Path, place: str, libver: str, userblock: int
) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w", libver=libver, userblock_size=userblock) as file:
        _PLACES[place](file, ["x" * 77, "y" * 300, "z"])
    _change(path, 77, lambda content, at: content.__setitem__(slice(at, at + 4), struct.pack("<I", 2**32 - 16)))
    assert _memory_of(lambda: _read(path)) < 1 << 29
    with pytest.raises(InputError, match="more text than such a file can hold"):
        _read(path)


@pytest.mark.parametrize("place", ["an array", "chunks", "lists", "an attribute"])
def test_many_references_to_one_text_are_refused(tmp_path: Path, place: str) -> None:
    path, count = tmp_path / "a.hdf5", 3000
    with h5py.File(path, "w") as file:
        _PLACES[place](file, ["x" * 77] * count + ["y" * (1 << 20)])
    content = path.read_bytes()
    at = content.find(struct.pack("<I", 1 << 20))
    while content[int.from_bytes(content[at + 4 : at + 12], "little") :][:4] != b"GCOL":
        at = content.find(struct.pack("<I", 1 << 20), at + 1)
    _change(path, 77, lambda changed, where: changed.__setitem__(slice(where, where + 16), content[at : at + 16]))
    assert _memory_of(lambda: _read(path)) < 1 << 29
    with pytest.raises(InputError, match="more text than such a file can hold"):
        _read(path)


def _pack(references: bytes, shuffled: bool, packed: bool) -> bytes:
    content = np.frombuffer(references, np.uint8).reshape(-1, 16).T.tobytes() if shuffled else references
    return zlib.compress(content) if packed else content


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", [0, 1, 3])
def test_packed_texts_are_read_and_counted(
    tmp_path: Path, shuffled: bool, packed: bool, mask: int, rng: np.random.Generator
) -> None:
    """Of each chunk the mask says which filters were not applied to it."""
    path, texts = tmp_path / "a.hdf5", ["x" * 77, *("y" * int(rng.integers(1, 60)) for _ in range(6))]
    mask &= (1 << shuffled + packed) - 1
    with h5py.File(path, "w") as file:
        field = file.create_dataset("plain", data=texts, dtype=_TEXT, chunks=(7,))
        references = field.id.read_direct_chunk((0,))[1]
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((7,))
        if shuffled:  # of itself HDF5 gives no size here, and leaves the filter out
            layout.set_filter(h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FLAG_OPTIONAL, (16,))
        if packed:
            layout.set_deflate(4)
        kind = h5py.h5t.py_create(_TEXT, logical=True)
        field = h5py.Dataset(h5py.h5d.create(file.id, b"texts", kind, h5py.h5s.create_simple((7,)), layout))
        applied = (shuffled and not mask & 1, packed and not mask >> shuffled & 1)
        field.id.write_direct_chunk((0,), _pack(references, *applied), mask)
    assert _read(path) == texts
    with h5py.File(path, "r+") as file:
        with path.open("rb") as source:
            assert array_bytes(file["texts"], 1, source.fileno()) == 112 * 7 + sum(map(len, texts))
        huge = struct.pack("<I", 2**32 - 16) + references[4:]
        file["texts"].id.write_direct_chunk((0,), _pack(huge, *applied), mask)
    assert _memory_of(lambda: _read(path)) < 1 << 29
    with pytest.raises(InputError, match="more text than such a file can hold"):
        _read(path)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"compression": "gzip", "shuffle": True}])
def test_texts_packed_by_hdf5_itself_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    path, texts = tmp_path / "a.hdf5", ["push", "", "pull" * 20]
    with h5py.File(path, "w") as file:
        file.create_dataset("texts", data=texts, dtype=_TEXT, chunks=(2,), **options)
    assert _read(path) == texts


@pytest.mark.parametrize("content", [bytes(16 << 20), bytes(16 * 6)])
def test_a_chunk_that_expands_to_another_size_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        field = file.create_dataset("texts", (7,), _TEXT, chunks=(7,), compression="gzip")
        field.id.write_direct_chunk((0,), zlib.compress(content))
    with pytest.raises(InputError, match=r"expands to more|a chunk of 96 bytes, not 112"):
        _read(path)


def test_chunks_that_were_never_written_hold_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("texts", (7,), _TEXT, maxshape=(None,), chunks=(2,))[:2] = ["a", "b"]
    assert _read(path) == ["a", "b", *[""] * 5]


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("options", [{}, {"maxshape": (None,), "chunks": (2,)}])
def test_no_texts_at_all(tmp_path: Path, libver: str, options: dict[str, Any]) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset("texts", (0,), _TEXT, **options)
        file["none"] = h5py.Empty(_TEXT)
        file.attrs["empty"] = h5py.Empty(_TEXT)
        file.attrs.create("of none", [], (0,), _TEXT)
    assert _read(path) == []
    with open_hdf5(path, "texts") as file:
        assert text_attribute(file, "empty") == ""
        with pytest.raises(InputError, match="not a list of texts"):
            read_names(file, "none")


@pytest.mark.parametrize(
    "options", [{"libver": "latest"}, {"track_order": True}, {"libver": "latest", "userblock": 512}]
)
@pytest.mark.parametrize("count", [9, 40, 300])
def test_attributes_that_are_not_in_the_header_are_counted(
    tmp_path: Path, options: dict[str, Any], count: int, rng: np.random.Generator
) -> None:
    """From the ninth on they are in a heap, of which the blocks double: one block, a list of them, lists of lists."""
    path, options = tmp_path / "a.hdf5", dict(options)
    base = options.pop("userblock", 0)
    texts = {f"a{i}": ["x" * int(rng.integers(1, 9)) for _ in range(1 + i % 30)] for i in range(min(count, 40))}
    with h5py.File(path, "w", userblock_size=base, **options) as file:
        for i in range(40, count):
            file.attrs[f"b{i}"] = np.zeros(400)
        for name, values in texts.items():
            file.attrs.create(name, values, dtype=_TEXT)
    check_own_contents(path)
    with h5py.File(path, "r") as file, path.open("rb") as source:
        for name, values in texts.items():
            attribute = h5py.h5a.open(file.id, name.encode())
            counted = attribute_bytes(file["/"], attribute, 1, source.fileno())
            assert counted == sum(112 + len(value) for value in values)


def test_an_attribute_too_large_for_the_others_heap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w", libver="latest") as file:
        for i in range(9):
            file.attrs.create(f"a{i}", ["x"] * (5000 if i == 8 else 1), dtype=_TEXT)
    with pytest.raises(InputError, match="lengths are not known") as caught:
        check_own_contents(path)
    assert "h5repack" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "found"),
    [({"compression": "lzf"}, "packed by a filter: lzf"), ({"fillvalue": "x"}, "never written")],
)
def test_texts_of_unknown_length_are_refused(tmp_path: Path, options: dict[str, Any], found: str) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("texts", (7,), _TEXT, chunks=(3,), **options)[:2] = ["a", "b"]
    for read in (_read, check_own_contents):
        with pytest.raises(InputError, match=found):
            read(path)


@pytest.mark.parametrize("dtype", [h5py.vlen_dtype(_LIST), [("name", _TEXT), ("value", "f4")], h5py.ref_dtype])
def test_objects_that_are_neither_texts_nor_lists_are_refused(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        space = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        space.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
        h5py.h5d.create(file.id, b"written", kind, h5py.h5s.create_simple((2,)), space)
    with pytest.raises(InputError, match="neither texts nor lists"):
        check_own_contents(path)


def test_references_that_nobody_reads_are_passed_over(tmp_path: Path) -> None:
    """Files of netCDF4 and xarray name the axes of their arrays by references."""
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["time"], file["values"] = np.arange(3.0), np.arange(3.0)
        file["time"].make_scale("time")
        file["values"].dims[0].attach_scale(file["time"])
        file.attrs["first"] = file["time"].ref
    check_own_contents(path)


def _flat(folder: Path) -> Path:
    path = folder / "push-v3.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = np.ones((4, 39), np.float32), np.zeros((4, 4), np.float32)
        file["rewards"], file["terminals"], file["timeouts"] = np.zeros(4), np.zeros(4, bool), np.arange(4) == 3
        file.attrs["environment"] = "x" * 77
    return path


def _robomimic(folder: Path) -> Path:
    path = folder / "push.hdf5"
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["obs/state"], demo["actions"] = np.ones((4, 39), np.float32), np.zeros((4, 4), np.float32)
        file["data"].attrs["env_args"] = "{}" + " " * 75
    return path


def _minari(folder: Path) -> Path:
    record = EpisodeRecord(np.zeros((4, 39)), np.zeros((3, 4)), np.zeros(3), "push-v3")
    path = save_minari(join_episodes([record]), folder / "set")[0]
    (main,) = path.rglob("main_data.hdf5")
    with h5py.File(main, "r+") as file:
        del file["episode_0"]
        file.create_group("episode_0").attrs["options"] = "x" * 77
    return main


@pytest.mark.parametrize("write", [_flat, _robomimic, _minari])
def test_every_reader_counts_texts(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    _change(path, 77, lambda content, at: content.__setitem__(slice(at, at + 4), struct.pack("<I", 2**32 - 16)))
    read = path.parent if path.name == "main_data.hdf5" else path
    assert _memory_of(lambda: load_dataset(read)) < 1 << 29
    with pytest.raises(InputError, match="more text than such a file can hold"):
        load_dataset(read)
