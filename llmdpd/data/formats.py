"""File formats that `load_dataset` reads. Importing this module imports none of their libraries."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from llmdpd.data.content import is_kind, kind_of
from llmdpd.data.trajectories import TrajectoryDataset
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading

_MINARI_METADATA = "metadata.json"


class DataFormat:
    """A file format: a value of `llmdpd.data.FORMATS`. A subclass overrides `reads` and `load`.

    Every format is asked about every file and folder, so its module should import the format's library only in `load`.

    Attributes:
        readable: what can be read, in a few words, for messages.
        parts: whether its data sets have named parts, so that `load` heeds `reading.part`.
        scheme: `load_dataset("scheme:NAME")` calls `load_named`; None where data have no names.
    """

    readable: str
    scheme: str | None = None
    parts: bool = False

    def reads(self, path: Path) -> bool:
        """Whether `path` is one data set of this format; asked of files, and of folders before their content."""
        raise NotImplementedError

    def load(self, path: Path, reading: Reading) -> TrajectoryDataset:
        """Read one data set as `reading` says: a reader uses of it what its format leaves open.

        Raises InputError for a damaged file, and where the file lacks what `reading` names; its success aside, which
        may be the environment's alone.
        """
        raise NotImplementedError

    def task(self, path: Path) -> str | None:
        """The task of a data set of one task where it is known without reading the data."""
        return None

    def environment(self, path: Path) -> str:
        """The environment's id under which a data set was recorded, where it is known without reading; otherwise ""."""
        return ""

    def load_named(self, name: str, reading: Reading) -> TrajectoryDataset:
        """Read the data set that `scheme:name` names, as `load` does. Raises InputError where there is none."""
        raise InputError("data sets of this format have no names", field="data", found=name, expected=self.readable)


def _imported(module: str, function: str) -> Any:
    """A method that calls a function of a module of this folder, imported at the first call."""

    def method(self: DataFormat, *arguments: Any) -> Any:
        return getattr(importlib.import_module(f"llmdpd.data.{module}"), function)(*arguments)

    return method


class Minari(DataFormat):
    """Minari data sets, this project's own format (see `llmdpd.data.minari`)."""

    readable, scheme = "a Minari data set or a folder of them, minari:ID", "minari"
    load, load_named = _imported("minari", "load_minari"), _imported("minari", "load_minari_id")
    task, environment = _imported("minari", "minari_task"), _imported("minari", "minari_environment")
    _is_minari = _imported("minari", "is_minari")

    def reads(self, path: Path) -> bool:
        # A Minari data set is a folder with this file; its inside is not searched for files of other formats.
        return (path / _MINARI_METADATA).is_file() and self._is_minari(path)


class D4RL(DataFormat):
    """HDF5 files of D4RL's layout (see `llmdpd.data.d4rl`)."""

    readable, scheme = "an .hdf5 file of D4RL's layout, d4rl:NAME", "d4rl"
    load, load_named = _imported("d4rl", "load_d4rl"), _imported("d4rl", "load_d4rl_by_name")
    environment = _imported("d4rl", "environment_of")

    def reads(self, path: Path) -> bool:
        return is_kind(path, ("hdf5",), (".hdf5", ".h5"))


class Robomimic(DataFormat):
    """HDF5 files of robomimic's layout (see `llmdpd.data.robomimic`)."""

    readable, parts = "an HDF5 file of robomimic's layout", True
    load, _is_robomimic = _imported("robomimic", "load_robomimic"), _imported("robomimic", "is_robomimic")
    task = _imported("robomimic", "robomimic_task")

    def reads(self, path: Path) -> bool:
        return kind_of(path) == "hdf5" and bool(self._is_robomimic(path))


class LeRobot(DataFormat):
    """LeRobot's data sets, versions 2 and 3 (see `llmdpd.data.lerobot`)."""

    readable, parts = "the folder of a LeRobot data set", True
    load = _imported("lerobot", "load_lerobot")

    def reads(self, path: Path) -> bool:
        # One whose info.json is lost or damaged is named as such, and its inside not searched.
        info, meta = path / "meta" / "info.json", path / "meta"
        if info.is_file() and b'"codebase_version"' in info.read_bytes():
            return True
        return (path / "data").is_dir() and any((meta / name).exists() for name in ("episodes.jsonl", "episodes"))


class MTDiff(DataFormat):
    """NumPy and pickle files, of MTDiff's and others' layouts (see `llmdpd.data.mtdiff`)."""

    readable = "an .npy/.npz/.pkl file of dicts an episode (MTDiff's, Decision Transformer's) or of flat arrays"
    load = _imported("mtdiff", "load_mtdiff")

    def reads(self, path: Path) -> bool:
        return is_kind(path, ("npy", "npz", "pickle"), (".npy", ".npz", ".pkl", ".pickle"))


class Shards(DataFormat):
    """Data that stay on the disk (see `llmdpd.data.shards`)."""

    readable, parts = "a folder of shards", True
    load, _is_shards = _imported("shards", "load_shards"), _imported("shards", "is_shards")
    environment = _imported("shards", "shards_environment")

    def reads(self, path: Path) -> bool:
        return bool(self._is_shards(path))


MINARI, D4RL_HDF5, MTDIFF = Minari(), D4RL(), MTDiff()
ROBOMIMIC, LEROBOT, SHARDS = Robomimic(), LeRobot(), Shards()
