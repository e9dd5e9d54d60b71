"""What a file is, by its first bytes alone."""

from __future__ import annotations

import io
import pickle
import resource
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from llmdpd.data import load_dataset
from llmdpd.data.content import is_kind, kind_of, read_npz
from llmdpd.errors import InputError


def hdf5(path: Path, userblock: int = 0) -> None:
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file["observations"] = np.zeros(3)


def test_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for block in (0, 512, 2048):
        hdf5(path, block)
        assert kind_of(path) == "hdf5"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps([{"observations": np.zeros((90, 9)), "actions": np.zeros(3)}], protocol))
        assert kind_of(path) == "pickle"
    np.save(path.open("wb"), np.zeros(3))
    assert kind_of(path) == "npy"
    np.savez_compressed(path.open("wb"), a=np.zeros(3))
    assert kind_of(path) == "npz"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["npy", "npz", "pickle"])
def test_text_that_is_no_unicode_is_refused(tmp_path: Path, kind: str, order: str) -> None:
    """NumPy makes texts of it on which `str` methods end in a SystemError."""
    task = np.array(["push-v3"], f"{order}U7")
    task.view(f"{order}u4")[2] = 0x110000
    record = {"observations": np.zeros((3, 39)), "actions": np.zeros((3, 4)), "rewards": np.zeros(3), "task": task}
    path = tmp_path / f"a.{kind}"
    with path.open("wb") as file:
        if kind == "npy":
            np.save(file, np.array([record]))
        elif kind == "npz":
            np.savez(file, **record)
        else:
            pickle.dump([record], file)
    with pytest.raises(InputError, match="no Unicode") as error:
        load_dataset(path)
    assert error.value.path == str(path)


def a_zip(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        a_zip("archive/data.pkl", "archive/version"),
        a_zip(),
        pickle.dumps({"weights": 3}),
        b"PK\x03\x04cut",
    ],
)
def test_what_is_something_else(tmp_path: Path, content: bytes) -> None:
    """A checkpoint of torch's is a zip, or a pickle, and lies beside data: neither is read as data."""
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert kind_of(path) is None
    assert kind_of(tmp_path) is None
    assert not is_kind(path, ("npz", "pickle"), (".npz", ".pkl"))
    # Its name asks for a reader, which says what is wrong.
    assert is_kind(path.rename(tmp_path / "data.PKL"), ("npz", "pickle"), (".npz", ".pkl"))


def test_a_name_that_says_something_else_does_not_count(tmp_path: Path) -> None:
    hdf5(tmp_path / "data.npz")
    assert not is_kind(tmp_path / "data.npz", ("npz",), (".npz",))
    assert is_kind(tmp_path / "data.npz", ("hdf5",), (".h5",))


def test_a_zip_of_zeros_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", observations=np.zeros(120_000_000, np.uint8))
    for read in (load_dataset, read_npz):
        with pytest.raises(InputError, match="more numbers than such a file can hold"):
            read(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04" + b"\0" * 50, None])
def test_what_is_no_npz_is_one_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_npz(tmp_path / "a.npz")
    assert error.value.path == str(tmp_path / "a.npz")


def test_a_zip_that_understates_its_size_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("observations.npy", "w") as part:
        for _ in range(300):
            part.write(bytes(1 << 20))
    content = bytearray(path.read_bytes())
    entry = content.rfind(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        load_dataset(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KB


def test_a_list_of_nothing_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "observations.pkl").write_bytes(pickle.dumps([None]))
    with pytest.raises(InputError, match="not a layout"):
        load_dataset(tmp_path / "observations.pkl")
