"""Reading HDF5 files of strangers: nothing outside the file is opened, and damage is named."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from llmdpd.data.hdf5 import (
    check_own_contents,
    hdf5_bytes,
    member,
    names_in,
    open_hdf5,
    read_names,
    read_numbers,
    subgroup,
    text_attribute,
)
from llmdpd.data.minari import load_minari, save_minari
from llmdpd.errors import InputError


@pytest.fixture
def values(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(5, 3))


@pytest.fixture
def other(tmp_path: Path, values: np.ndarray) -> Path:
    """A file that is not to be read."""
    path = tmp_path / "other.hdf5"
    with h5py.File(path, "w") as file:
        file["secret"] = values
    return path


def test_numbers_become_float32(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "a.bin"
    with h5py.File(path, "w") as file:
        file["group/wide"], file["group/column"], file["group/flags"] = values, values[:, :1], values[:, 0] > 0
        file["group"].attrs.update({"text": "push", "bytes": b"push", "number": 3})
    with open_hdf5(path, "numbers") as file:
        group = subgroup(file, "group")
        assert group is not None
        np.testing.assert_array_equal(read_numbers(group, "wide", ndim=2), values.astype(np.float32))
        np.testing.assert_array_equal(read_numbers(group, "column", ndim=1), values[:, 0].astype(np.float32))
        np.testing.assert_array_equal(read_numbers(group, "flags", ndim=1), values[:, 0] > 0)
        texts = [text_attribute(group, name) for name in ("text", "bytes", "number", "absent")]
        assert texts == ["push", "push", "", ""]
        assert (member(group, "absent"), subgroup(file, "absent")) == (None, None)


def test_texts_are_read_as_robomimic_and_h5py_write_them(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["fixed"], file["any"], file["numbers"] = np.array(["demo_0", "demo_10"], "S"), ["é", "b"], [1.0]
    with open_hdf5(path, "texts") as file:
        assert (read_names(file, "fixed"), read_names(file, "any")) == (["demo_0", "demo_10"], ["é", "b"])
        with pytest.raises(InputError, match="not a list of texts"):
            read_names(file, "numbers")


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "virtual"])
@pytest.mark.parametrize("there", [True, False])
def test_no_other_file_is_opened(tmp_path: Path, other: Path, kind: str, there: bool) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        if kind == "external link":
            file["x"] = h5py.ExternalLink(other.name, "/secret")
        elif kind == "soft link":
            file["behind"] = h5py.ExternalLink(other.name, "/")
            file["x"] = h5py.SoftLink("/behind/secret")
        elif kind == "external storage":
            file.create_dataset("x", (5, 3), np.float64, external=[(other.name, 0, 120)])
        else:
            layout = h5py.VirtualLayout((5, 3), np.float64)
            layout[:] = h5py.VirtualSource(other.name, "secret", (5, 3))
            file.create_virtual_dataset("x", layout)
    if not there:
        other.unlink()
    with open_hdf5(path, "numbers") as file, pytest.raises(InputError, match=r"not (followed|in the file)") as caught:
        read_numbers(file, "x", ndim=2)
    assert (caught.value.path, caught.value.field) == (str(path), "x")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("absent", "missing"),
        ("group", "not an array"),
        ("text", "not an array of numbers"),
        ("type", "neither a group nor an array"),
        ("deep", "wrong number of dimensions"),
        ("flat", "wrong number of dimensions"),
        ("unwritten", "never written"),
        ("nan", "NaN or Inf"),
        ("huge", "NaN or Inf"),
    ],
)
def test_what_is_no_array_of_numbers_is_named(tmp_path: Path, values: np.ndarray, name: str, problem: str) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        inner = file.create_group("in")
        inner.create_group("group")
        inner["text"], inner["type"], inner["flat"] = ["a", "b"], np.dtype("f4"), values[:, 0]
        inner["deep"], inner["nan"], inner["huge"] = values[None], values * np.nan, values * 1e300
        inner.create_dataset("unwritten", (5, 3), np.float32, chunks=(5, 3))
    with open_hdf5(path, "numbers") as file, pytest.raises(InputError, match=problem) as caught:
        read_numbers(file["in"], name, ndim=2)
    assert (caught.value.path, caught.value.field) == (str(path), f"in/{name}")


def test_names_that_are_no_text_are_named(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["in/b"], file["in/a"] = values, values
    with open_hdf5(path, "numbers") as file:
        assert names_in(file["in"]) == ["a", "b"]
    with h5py.File(path, "r+") as file:
        file["in"][b"c\xff"] = values
    with open_hdf5(path, "numbers") as file, pytest.raises(InputError, match="damaged") as caught:
        names_in(file["in"])
    assert (caught.value.path, caught.value.field) == (str(path), "in")


def test_a_group_is_no_array(tmp_path: Path, other: Path) -> None:
    with open_hdf5(other, "numbers") as file, pytest.raises(InputError, match="not a group"):
        subgroup(file, "secret")


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.hdf5"
    os.mkfifo(fifo)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("observations, actions")
    problems = {"fifo.hdf5": "regular file", "empty": "empty", "text": "not an HDF5", "absent": "not found"}
    for name, problem in {**problems, ".": "regular file"}.items():
        with pytest.raises(InputError, match=problem) as caught, open_hdf5(tmp_path / name, "numbers"):
            pass
        assert caught.value.path == str(tmp_path / name)


def test_a_damaged_file_is_named_or_read(tmp_path: Path, rng: np.random.Generator, values: np.ndarray) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("group/x", data=np.repeat(values, 40, axis=0), compression="gzip")
    whole = path.read_bytes()
    errors = []
    for trial in range(120):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            with open_hdf5(path, "numbers") as file:
                group = subgroup(file, "group")
                if group is not None:
                    read_numbers(group, "x", ndim=2)
        except InputError as error:
            errors.append(error)
    assert len(errors) >= 60
    assert {error.path for error in errors} == {str(path)}


def test_a_small_file_that_declares_much_is_refused(tmp_path: Path) -> None:
    """A compressed array of nothing but zeros, one that is hardly written, many that share what they expand to."""
    many = [(f"a{i}", (20_000_000,)) for i in range(10)]
    for number, arrays in enumerate(([("a", (10**9,))], many)):
        path = tmp_path / f"{number}.hdf5"
        with h5py.File(path, "w") as file:
            for name, shape in arrays:
                file.create_dataset(name, shape, np.float32, chunks=(100_000,), compression="gzip")[0] = 1

        def read(path: Path = path, names: tuple[str, ...] = tuple(name for name, _ in arrays)) -> None:
            with open_hdf5(path, "numbers") as file:
                for name in names:
                    read_numbers(file, name, ndim=1)

        with pytest.raises(InputError, match="more numbers than such a file can hold"):
            read()
        with pytest.raises(InputError, match="more numbers than such a file can hold"):
            check_own_contents(path)


def with_texts(path: Path) -> bytes:
    """A file whose attributes and texts are in one global heap; its bytes."""
    with h5py.File(path, "w") as file:
        file["in/numbers"], file["texts"] = np.ones(3), ["push", "pull"]
        file["in"].attrs["text"], file["in/numbers"].attrs["text"] = "one", "two"
    return path.read_bytes()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("at", ["in", "in/numbers", "texts"])
def test_objects_of_a_heap_without_end_are_not_followed(tmp_path: Path, number: int, at: str) -> None:
    """HDF5 walks along them, and never arrives where one has no size: free space, or a size that overflows."""
    path = tmp_path / "a.hdf5"
    whole = bytearray(with_texts(path))
    first = whole.index(b"GCOL") + 16
    length = 0 if number == 0 else 2**64 - 16
    whole[first : first + 16] = number.to_bytes(8, "little") + length.to_bytes(8, "little")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="no end"), open_hdf5(path, "texts") as file:
        assert read_names(file, "texts") if at == "texts" else text_attribute(file[at], "text")
    with pytest.raises(InputError, match="no end"):
        check_own_contents(path)


def test_bytes_that_a_file_does_not_have_are_not_made_room_for(tmp_path: Path) -> None:
    """The first version of the format names a block of the driver's, whose size HDF5 holds against nothing."""
    path = tmp_path / "a.hdf5"
    whole = bytearray(with_texts(path))
    whole[48:56] = len(whole).to_bytes(8, "little")
    path.write_bytes(whole + b"\0\0\0\0" + (2**32 - 2**24).to_bytes(4, "little") + b"NCSAmult")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="to be read at once"):
        check_own_contents(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


@pytest.mark.parametrize(("size", "chunk"), [(3, 10**9), (60_000_000, 4)])
def test_chunks_that_a_file_cannot_hold_are_not_made_room_for(tmp_path: Path, size: int, chunk: int) -> None:
    """HDF5 makes room for a whole chunk, also of a small array, and for a list of all of them."""
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (size,), np.bool_, chunks=(chunk,), maxshape=(None,), compression="gzip")
        if chunk == 4:
            file["x"][:3] = True
    for read in (lambda file: read_numbers(file, "x", ndim=1), lambda _: check_own_contents(path)):
        with pytest.raises(InputError, match="than such a file can hold"), open_hdf5(path, "numbers") as file:
            read(file)


def test_a_file_that_is_being_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with_texts(path)
    with h5py.File(path, "r+"), pytest.raises(InputError, match="BlockingIOError"), open_hdf5(path, "texts"):
        pass


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "virtual"])
def test_minari_is_not_led_to_other_files(tmp_path: Path, other: Path, kind: str, make_dataset: Any) -> None:
    (folder,) = save_minari(make_dataset((("a", 4),)), tmp_path / "root")
    data = folder / "data" / "main_data.hdf5"
    with h5py.File(data, "r+") as file:
        group = file["episode_0"]
        shape = group["observations"].shape
        del group["observations"]
        if kind == "external link":
            group["observations"] = h5py.ExternalLink(str(other), "secret")
        elif kind == "soft link":
            group["observations"] = h5py.SoftLink("/episode_0/actions")
        elif kind == "external storage":
            group.create_dataset("observations", shape, np.float32, external=[(str(other), 0, 10**6)])
        else:
            layout = h5py.VirtualLayout(shape, np.float32)
            layout[:] = h5py.VirtualSource(str(other), "secret", shape=shape)
            group.create_virtual_dataset("observations", layout)
    with pytest.raises(InputError, match=r"not followed|not in the file itself"):
        load_minari(folder)


def test_minari_does_not_wait_for_a_pipe(tmp_path: Path, make_dataset: Any) -> None:
    (folder,) = save_minari(make_dataset((("a", 4),)), tmp_path)
    (folder / "data" / "main_data.hdf5").unlink()
    os.mkfifo(folder / "data" / "main_data.hdf5")
    with pytest.raises(InputError, match="not a regular file"):
        load_minari(folder)


def test_an_image_in_memory_is_an_hdf5_file(tmp_path: Path, values: np.ndarray) -> None:
    (tmp_path / "a.hdf5").write_bytes(hdf5_bytes(lambda file: file.create_dataset("x", data=values) and None))
    with h5py.File(tmp_path / "a.hdf5") as file:
        np.testing.assert_array_equal(file["x"][()], values)
