"""File formats that `load_dataset` reads. Importing this module imports none of their libraries."""

from __future__ import annotations

from pathlib import Path

from llmdpd.data.trajectories import TrajectoryDataset
from llmdpd.errors import InputError

_MINARI_METADATA = "metadata.json"


class DataFormat:
    """A file format: a value of `llmdpd.data.FORMATS`. A subclass overrides `reads` and `load`.

    Every format is asked about every file and folder, so its module should import the format's library only in `load`.

    Attributes:
        readable: what can be read, in a few words, for messages.
        scheme: `load_dataset("scheme:NAME")` calls `load_named`; None where data have no names.
    """

    readable: str
    scheme: str | None = None

    def reads(self, path: Path) -> bool:
        """Whether `path` is one data set of this format; asked of files, and of folders before their content."""
        raise NotImplementedError

    def load(self, path: Path) -> TrajectoryDataset:
        """Read one data set.

        Raises:
            InputError: a damaged file.
        """
        raise NotImplementedError

    def task(self, path: Path) -> str | None:
        """The task of a data set of one task where it is known without reading the data."""
        return None

    def load_named(self, name: str) -> TrajectoryDataset:
        """Read the data set that `scheme:name` names.

        Raises:
            InputError: there is none.
        """
        raise InputError("data sets of this format have no names", field="data", found=name, expected=self.readable)


class Minari(DataFormat):
    """Minari data sets, this project's own format (see `llmdpd.data.minari`)."""

    readable = "a Minari data set or a folder of them, minari:ID"
    scheme = "minari"

    def reads(self, path: Path) -> bool:
        # A Minari data set is a folder with this file; its inside is not searched for files of other formats.
        if not (path / _MINARI_METADATA).is_file():
            return False
        from llmdpd.data.minari import is_minari

        return is_minari(path)

    def load(self, path: Path) -> TrajectoryDataset:
        from llmdpd.data.minari import load_minari

        return load_minari(path)

    def task(self, path: Path) -> str | None:
        from llmdpd.data.minari import minari_task

        return minari_task(path)

    def load_named(self, name: str) -> TrajectoryDataset:
        from llmdpd.data.minari import load_minari_id

        return load_minari_id(name)


class D4RL(DataFormat):
    """HDF5 files of D4RL's layout (see `llmdpd.data.d4rl`)."""

    readable = "an .hdf5 file of D4RL's layout, d4rl:NAME"
    scheme = "d4rl"

    def reads(self, path: Path) -> bool:
        return path.is_file() and path.suffix.lower() in (".hdf5", ".h5")

    def load(self, path: Path) -> TrajectoryDataset:
        from llmdpd.data.d4rl import load_d4rl

        return load_d4rl(path)

    def load_named(self, name: str) -> TrajectoryDataset:
        from llmdpd.data.d4rl import load_d4rl_by_name

        return load_d4rl_by_name(name)


class MTDiff(DataFormat):
    """NumPy and pickle files of MTDiff's layout (see `llmdpd.data.mtdiff`)."""

    readable = "an .npy/.npz/.pkl file of MTDiff's layout"

    def reads(self, path: Path) -> bool:
        return path.is_file() and path.suffix.lower() in (".npy", ".npz", ".pkl", ".pickle")

    def load(self, path: Path) -> TrajectoryDataset:
        from llmdpd.data.mtdiff import load_mtdiff

        return load_mtdiff(path)


MINARI, D4RL_HDF5, MTDIFF = Minari(), D4RL(), MTDiff()
