"""`llmdpd data convert SOURCE OUT` and `llmdpd data check FOLDER`: data sets in shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llmdpd.cli.common import command
from llmdpd.data import TrajectoryDataset, read_one_by_one, save_shards, sources_of
from llmdpd.data.shards import load_shards
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.bounds import Bounds
from llmdpd.utils.command_line import parse
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import ProgressBar, console

with extra("cli"):
    import tyro


@dataclass(frozen=True)
class ConvertConfig:
    """Write data of any format as shards, which are trained on from the disk; one data set is in memory at a time.

    The data are read and checked as a run does that names them by --data.path.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A data set, a folder of several, or a name (minari:ID, d4rl:NAME)."""
    out: Annotated[Path, tyro.conf.Positional]
    """The new folder."""
    shard_gigabytes: Annotated[float, Bounds(0.001, 1000)] = 4.0
    """About so large is a shard."""
    observation: tuple[str, ...] = ()
    """Keys of Dict observations, in this order; all by default."""
    action: str | None = None
    """Key of the actions, where there are several."""
    success: str | None = None
    """Key of the infos that says whether a step succeeds."""
    part: str | None = None
    """A part of the data (robomimic's filter keys, LeRobot's splits)."""
    terminates: bool | None = None
    """Whether episodes can end by themselves, where the data's flags leave it open."""


@dataclass(frozen=True)
class CheckConfig:
    """Read a data set in shards through: whether it is whole, and the same as when it was written."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The data set's folder."""


def _convert(config: ConvertConfig) -> None:
    if config.out.exists():
        raise InputError("this is written to a new folder", path=config.out, found="something", expected="nothing")
    names = ("observation", "action", "success", "part", "terminates")
    reading = Reading(**{name: getattr(config, name) for name in names})
    count = len(sources_of(config.source))
    with StopSignals() as stop, ProgressBar("converting", "data sets", check=stop.check) as bar:

        def parts() -> Iterator[TrajectoryDataset]:
            for number, part in enumerate(read_one_by_one(config.source, reading)):
                bar.update(number, count, part.source)
                yield part
            bar.update(count, count)

        save_shards(parts(), config.out, shard_bytes=int(config.shard_gigabytes * (1 << 30)), reading=reading)
    _tell(config.out)


def _tell(folder: Path) -> None:
    data = load_shards(folder)
    files = list(folder.glob("shard-*.npy"))
    size = sum(path.stat().st_size for path in files) / 1e9
    console.print(
        f"{folder}: {data.num_episodes:,} episodes, {data.num_transitions:,} transitions of {len(data.tasks):,} tasks, "
        f"{len(files)} shards, {size:.2f} GB; all hashes are right",
        markup=False,
        soft_wrap=True,
    )


def _data(words: list[str]) -> None:
    kind, *rest = words or ["--help"]
    if kind == "convert":
        _convert(parse(ConvertConfig, rest, "llmdpd data convert"))
    elif kind == "check":
        _tell(parse(CheckConfig, rest, "llmdpd data check").folder)
    elif kind in ("-h", "--help"):
        for name, config in (("convert SOURCE OUT", ConvertConfig), ("check FOLDER", CheckConfig)):
            console.print(f"llmdpd data {name}\n    {(config.__doc__ or '').splitlines()[0]}", markup=False)
    else:
        raise InputError("unknown action", field="llmdpd data", found=kind, expected="convert or check")


main = command(_data)
