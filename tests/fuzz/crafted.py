"""Small files made to be read for ever, to take gigabytes, or to read what is none of theirs: each must be refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from judge import Case, Target
from readers import TESTS, _sums, _write_run

from llmdpd.data import EpisodeRecord, join_episodes, load_dataset, save_d4rl, save_minari
from llmdpd.errors import InputError
from llmdpd.policy.policy import Policy
from llmdpd.reporting.run import read_run

Make = Callable[[Path], Path]
_ROWS, _STATE, _ACTION = 4, 39, 4  # of push-v3, so that nothing else refuses them


def _external(folder: Path, how: str) -> Path:
    """Observations that lie in a file beside this one; or, to compare, inside."""
    path, other = folder / "push-v3.hdf5", folder / "other.bin"
    other.write_bytes(np.ones((_ROWS, _STATE), np.float32).tobytes())
    with h5py.File(folder / "other.h5x", "w") as file:
        file["observations"] = np.ones((_ROWS, _STATE), np.float32)
    with h5py.File(path, "w") as file:
        shape = (_ROWS, _STATE)
        if how == "storage":
            file.create_dataset("observations", shape, "f4", external=[(str(other), 0, 4 * _ROWS * _STATE)])
        elif how == "inside":
            file["observations"] = np.ones(shape, np.float32)
        elif how == "link":
            file["observations"] = h5py.ExternalLink(str(folder / "other.h5x"), "observations")
        else:
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource(str(folder / "other.h5x"), "observations", shape)
            file.create_virtual_dataset("observations", layout)
        _others(file)
    return path


def _others(file: h5py.File) -> None:
    file["actions"] = np.zeros((_ROWS, _ACTION), np.float32)
    file["rewards"] = np.zeros(_ROWS, np.float32)
    file["terminals"] = np.zeros(_ROWS, bool)
    file["timeouts"] = np.arange(_ROWS) == _ROWS - 1


def _declared(folder: Path) -> Path:
    """A few bytes that declare gigabytes of observations, actions and rewards."""
    path = folder / "push-v3.hdf5"
    with h5py.File(path, "w") as file:
        for name, width in (("observations", _STATE), ("actions", _ACTION), ("rewards", None)):
            shape = (10**9,) if width is None else (10**9, width)
            file.create_dataset(name, shape, "f4", chunks=(1000, *shape[1:]))
        for name in ("terminals", "timeouts"):
            file.create_dataset(name, (10**9,), "?", chunks=(1000,))
    return path


def _minari(folder: Path, how: str) -> Path:
    """A Minari data set whose first episode has its observations in a file beside, or declares gigabytes of them."""
    record = EpisodeRecord(np.zeros((4, _STATE)), np.zeros((3, _ACTION)), np.zeros(3), "push-v3")
    path = save_minari(join_episodes([record]), folder / "set")[0]
    (main,) = path.rglob("main_data.hdf5")
    with h5py.File(main, "r+") as file:
        episode = file["episode_0"]
        del episode["observations"]
        shape = (4, _STATE)
        if how == "declared":
            episode.create_dataset("observations", (10**9, _STATE), "f4", chunks=(1000, _STATE))
            return path
        (folder / "other.bin").write_bytes(np.ones(shape, np.float32).tobytes())
        if how == "storage":
            source = [(str(folder / "other.bin"), 0, 16 * _STATE)]
            episode.create_dataset("observations", shape, "f4", external=source)
        else:
            with h5py.File(folder / "other.h5x", "w") as other:
                other["observations"] = np.ones(shape, np.float32)
            episode["observations"] = h5py.ExternalLink(str(folder / "other.h5x"), "observations")
    return path


def _minari_fifo(folder: Path) -> Path:
    path = _minari(folder, "storage")
    (main,) = path.rglob("main_data.hdf5")
    main.unlink()
    os.mkfifo(main)
    return path


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "push-v3.hdf5")
    return folder / "push-v3.hdf5"


def _shared_lists(folder: Path) -> Path:
    """10^12 numbers, as each list holds the one before ten times."""
    value: list[object] = [0.0] * 10
    for _ in range(11):
        value = [value] * 10
    path = folder / "data.pkl"
    path.write_bytes(pickle.dumps([{"observations": value, "actions": value, "rewards": value, "terminals": value}]))
    return path


def _without_width(folder: Path) -> Path:
    """A header of 10^10 texts of no byte each."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|S0", "fortran_order": False, "shape": (10**10,)})
    path = folder / "push-v3.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("observations", "actions", "rewards", "terminals", "timeouts"):
            archive.writestr(f"{name}.npy", head.getvalue())
    return path


def _without_width_pickled(folder: Path) -> Path:
    """A pickled array of 10^9 values of no byte each."""
    episode = {name: np.zeros(3, np.float32) for name in ("observations", "actions", "terminals")}
    path = folder / "data.pkl"
    path.write_bytes(pickle.dumps([episode | {"rewards": np.ndarray((10**9,), "V0", b"")}], protocol=2))
    return path


def _bomb(folder: Path) -> Path:
    """Zeros that are packed a thousandfold."""
    path, rows, block = folder / "push-v3.npz", 15_000_000, 1_000_000
    widths = {"observations": _STATE, "actions": _ACTION, "rewards": 1, "terminals": 1, "timeouts": 1}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, width in widths.items():
            shape = (rows,) if width == 1 else (rows, width)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                for _ in range(rows // block):
                    file.write(bytes(4 * width * block))
    return path


def _circular_links(folder: Path) -> Path:
    """Two links to the folder itself: 2^40 paths to its one file."""
    record = EpisodeRecord(np.zeros((4, 39)), np.zeros((3, 4)), np.zeros(3), "push-v3")
    save_d4rl(join_episodes([record]), folder / "push-v3.hdf5")
    for name in ("a", "b"):
        (folder / name).symlink_to(".")
    return folder


def _large_policy(folder: Path) -> Path:
    """The description of 128 layers of 8,192, beside the tensors of a small network."""
    policy = folder / "policy"
    shutil.copytree(TESTS / "policy" / "recorded" / "llmdpd", policy)
    (policy / "actions.npz").unlink()
    whole = Policy.load(policy)
    shutil.rmtree(policy)
    whole.save(policy)
    description = json.loads((policy / "policy.json").read_text())
    encoder = description["network"]["context"]["encoder"]
    encoder |= {"layers": 128, "width": 8192, "inner": 8192}
    (policy / "policy.json").write_text(json.dumps(description))
    _sums(policy, np.random.default_rng(0))
    return policy


def _run_file(name: str, content: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "run").mkdir()
        _write_run(folder / "run")
        (folder / "run" / name).write_text(content)
        return folder / "run"

    return make


def _refused(make: Make, read: Callable[[Path], object]) -> Target:
    """It must be refused; what is read all the same is a fault."""

    def prepare(folder: Path) -> Case:
        path = make(folder)

        def case(rng: np.random.Generator) -> None:
            read(path)
            raise AssertionError("it was read")

        return case

    return Target(prepare, (InputError,))


def _read_once(make: Make, read: Callable[[Path], object]) -> Target:
    """It may be read or refused, but soon, and in little memory."""

    def prepare(folder: Path) -> Case:
        path = make(folder)
        return lambda rng: read(path)

    return Target(prepare, (InputError,))


def _sound(make: Make, read: Callable[[Path], object]) -> Target:
    """It must be read: what the others are held against."""
    return Target(_read_once(make, read).prepare, ())


def _report(path: Path) -> object:
    return read_run(path, 1 << 20)


CRAFTED: dict[str, Target] = {
    "crafted: nothing, to compare": _sound(lambda folder: _external(folder, "inside"), load_dataset),
    "crafted: external storage in HDF5": _refused(lambda folder: _external(folder, "storage"), load_dataset),
    "crafted: external link in HDF5": _refused(lambda folder: _external(folder, "link"), load_dataset),
    "crafted: virtual data set in HDF5": _refused(lambda folder: _external(folder, "virtual"), load_dataset),
    "crafted: 170 GB declared in HDF5": _refused(_declared, load_dataset),
    "crafted: external storage in Minari": _refused(lambda folder: _minari(folder, "storage"), load_dataset),
    "crafted: external link in Minari": _refused(lambda folder: _minari(folder, "link"), load_dataset),
    "crafted: 156 GB declared in Minari": _refused(lambda folder: _minari(folder, "declared"), load_dataset),
    "crafted: a FIFO in Minari": _refused(_minari_fifo, load_dataset),
    "crafted: a FIFO for a file": _refused(_fifo, load_dataset),
    "crafted: shared lists in a pickle": _refused(_shared_lists, load_dataset),
    "crafted: arrays of texts without width": _refused(_without_width, load_dataset),
    "crafted: pickled array of no bytes each": _refused(_without_width_pickled, load_dataset),
    "crafted: npz of zeros, packed 200-fold to 2.7 GB": _refused(_bomb, load_dataset),
    "crafted: two links to the folder itself": _read_once(_circular_links, load_dataset),
    "crafted: 128 layers of 8,192 in policy.json": _refused(_large_policy, Policy.load),
    "crafted: deep results.json": _refused(_run_file("results.json", "[" * 200_000), _report),
    "crafted: deep config.json": _read_once(_run_file("config.json", '{"a":' * 200_000), _report),
    "crafted: long integer in results.json": _refused(_run_file("results.json", "9" * 50_000), _report),
    "crafted: deep line in metrics.jsonl": _read_once(_run_file("metrics.jsonl", "[" * 200_000), _report),
}
