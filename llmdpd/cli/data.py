"""`llmdpd data convert SOURCE OUT` and `llmdpd data check FOLDER`: data sets in shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llmdpd.cli.common import command
from llmdpd.data import TrajectoryDataset, read_one_by_one, save_shards, sources_of
from llmdpd.data.shards import MANIFEST, load_shards
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.bounds import Bounds, check_config
from llmdpd.utils.command_line import parse
from llmdpd.utils.extras import extra
from llmdpd.utils.progress import ProgressBar, console

with extra("cli"):
    import tyro


@dataclass(frozen=True)
class DataCommand:
    """Write data of any format as shards, which are trained on from the disk; or check such shards.

    One data set of the source is in memory at a time. It is read and checked as by a run that names it by --data.path.
    """

    action: Annotated[Literal["convert", "check"], tyro.conf.Positional]
    """convert: SOURCE, of any format, becomes shards in OUT. check: the shards in SOURCE are read through, whether they
    are whole and the same as when they were written."""
    source: Annotated[str, tyro.conf.Positional]
    """A data set, a folder of several, or a name (minari:ID, d4rl:NAME)."""
    out: Annotated[Path | None, tyro.conf.Positional] = None
    """The new folder, where SOURCE is converted."""
    shard_gigabytes: Annotated[float, Bounds(0.001, 1000)] = 4.0
    """About so large is a shard."""
    observation: tuple[str, ...] = ()
    """Keys of Dict observations, in this order; all by default."""
    action_key: str | None = None
    """Key of the actions, where there are several."""
    success: str | None = None
    """Key of the infos that says whether a step succeeds."""
    part: str | None = None
    """A part of the data (robomimic's filter keys, LeRobot's splits)."""
    terminates: bool | None = None
    """Whether episodes can end by themselves, where the data's flags leave it open."""


def _convert(config: DataCommand, out: Path) -> None:
    if out.exists():
        expected = "no file or folder of this name yet"
        raise InputError("this is written to a new folder", path=out, found="one that exists", expected=expected)
    names = ("observation", "success", "part", "terminates")
    reading = Reading(action=config.action_key, **{name: getattr(config, name) for name in names})
    count = len(sources_of(config.source))
    _check_apart(Path(config.source).expanduser(), out, count)
    with StopSignals() as stop, ProgressBar("converting", "data sets", check=stop.check) as bar:

        def parts() -> Iterator[TrajectoryDataset]:
            for number, part in enumerate(read_one_by_one(config.source, reading)):
                bar.update(number, count, part.source)
                yield part
            bar.update(count, count)

        save_shards(parts(), out, shard_bytes=int(config.shard_gigabytes * (1 << 30)), reading=reading)
    _tell(out)


def _check_apart(source: Path, out: Path, count: int) -> None:
    """Refuse what would have every episode twice: shards within the folder of data that they are made of."""
    if not source.is_dir():
        return
    expected = "a folder outside of SOURCE"
    if source.resolve() in out.resolve().parents:
        raise InputError("who reads SOURCE would read its shards, too", path=out, field="OUT", expected=expected)
    shards = [path.parent for path in source.rglob(MANIFEST)]
    if 0 < len(shards) < count:
        problem, hint = "shards among data of other formats, which may be their copies", "move or name one of them"
        raise InputError(problem, path=shards[0], field="SOURCE", hint=hint)


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
    config = parse(DataCommand, words, "llmdpd data")
    check_config(config)
    if (config.out is None) == (config.action == "convert"):
        found, expected = config.out or "none", "convert SOURCE OUT, or check FOLDER"
        raise InputError("a folder to write to is for convert alone", field="out", found=found, expected=expected)
    if config.out is None:
        _tell(Path(config.source))
    else:
        _convert(config, config.out)


main = command(_data)
