"""Texts of any length in HDF5: their lengths are counted before HDF5 makes room for them."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from llmdpd.data import EpisodeRecord, join_episodes, load_dataset, save_minari
from llmdpd.data.hdf5 import check_own_contents, open_hdf5, read_names, text_attribute
from llmdpd.errors import InputError

_TEXT = h5py.string_dtype()
_PLACES: dict[str, Callable[[h5py.File, list[str]], object]] = {
    "an array": lambda file, texts: file.create_dataset("texts", data=texts, dtype=_TEXT),
    "chunks": lambda file, texts: file.create_dataset("texts", data=texts, dtype=_TEXT, chunks=(3,)),
    "an attribute": lambda file, texts: file.create_group("group").attrs.create("texts", texts, dtype=_TEXT),
    "one text": lambda file, texts: file.create_group("group").attrs.create("texts", texts[0], dtype=_TEXT),
}


def _read(path: Path) -> Any:
    check_own_contents(path)
    with open_hdf5(path, "texts") as file:
        if "texts" in file:
            return read_names(file, "texts")
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


@pytest.mark.parametrize("place", ["an array", "chunks", "an attribute"])
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


@pytest.mark.parametrize(
    ("options", "found"),
    [({"compression": "gzip"}, "packed by a filter"), ({"maxshape": (None,)}, "never written")],
)
def test_texts_of_unknown_length_are_refused(tmp_path: Path, options: dict[str, Any], found: str) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("texts", (7,), _TEXT, chunks=(3,), **options)[:2] = ["a", "b"]
    for read in (_read, check_own_contents):
        with pytest.raises(InputError, match=found):
            read(path)


def test_objects_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("lists", (2,), h5py.vlen_dtype(np.float32))[:] = [np.ones(3), np.ones(2)]
    with pytest.raises(InputError, match="objects that are no texts"):
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
