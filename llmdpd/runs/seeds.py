"""Runs of several seeds in one process: data and embeddings once, a run folder a seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.runs import pipeline
from llmdpd.runs.folder import RunFolder, decisive, folder_lock
from llmdpd.runs.pipeline import Run, note_training, selection_pool, training_loop
from llmdpd.training.batches import BatchSampler
from llmdpd.training.stopping import StopSignals
from llmdpd.training.together import Generators, Member, Together
from llmdpd.utils.bounds import bounds_of
from llmdpd.utils.device import check_device
from llmdpd.utils.files import atomic_write_json, read_json
from llmdpd.utils.progress import console

FORMAT = 1
MOST = 256
_SEED = re.compile("[0-9]{1,99}")  # Python reads no number of thousands of digits


@dataclass
class SeedsFolder:
    """A folder of run folders, `seed-0` and so on, that differ by the seed; `seeds.json` in it says which there are."""

    path: Path
    seeds: tuple[int, ...]

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder is of several seeds."""
        return _manifest(path).is_file()

    @classmethod
    def create(cls, path: Path | None, preset: str, seeds: tuple[int, ...]) -> SeedsFolder:
        """A new folder, named after preset, number of seeds and time unless a path is given.

        Raises:
            InputError: the folder holds something already.
        """
        if path is None:
            path = Path("runs") / f"{preset}-{len(seeds)}seeds-{datetime.now():%Y%m%d-%H%M%S}"
        if path.exists() and not path.is_dir():
            raise InputError("the folder of the runs is a file", path=path, expected="a new or an empty folder")
        if path.is_dir() and any(path.iterdir()):
            hint = (
                f"continue those runs with --resume {path}, or choose another --run-dir" if cls.is_one(path) else None
            )
            problem, expected = "the folder of the runs is not empty", "a new or an empty folder"
            raise InputError(problem, path=path, expected=expected, hint=hint)
        path.mkdir(parents=True, exist_ok=True)
        atomic_write_json(_manifest(path), {"format": FORMAT, "seeds": list(seeds)})
        return cls(path, seeds)

    @classmethod
    def open(cls, path: Path) -> SeedsFolder:
        """A folder that exists.

        Raises:
            InputError: `seeds.json` is damaged, or of another format version.
        """
        file = _manifest(path)
        known = read_json(file)
        if not isinstance(known, dict) or known.get("format") != FORMAT:
            found = known.get("format") if isinstance(known, dict) else known
            raise InputError("another format version", path=file, field="format", found=found, expected=FORMAT)
        seeds = known.get("seeds")
        if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
            raise InputError("damaged", path=file, field="seeds", found=repr(seeds)[:80], expected="numbers")
        if len(set(seeds)) < len(seeds):
            raise InputError("damaged", path=file, field="seeds", found=repr(seeds)[:80], expected="different numbers")
        return cls(path, tuple(seeds))

    def run(self, seed: int) -> Path:
        """A seed's run folder."""
        return self.path / f"seed-{seed}"

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from training these runs while the block runs.

        Raises:
            InputError: another process is at work in them.
        """
        return folder_lock(self.path, "in these runs", "wait for it, or stop it (SIGTERM: it saves), then resume")

    def discard(self) -> None:
        """Remove what runs that failed before they began have made; whatever else lies in the folder stays."""
        for seed in self.seeds:
            RunFolder(self.run(seed)).discard()
        for file in (_manifest(self.path), self.path / ".lock"):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.path.rmdir()

    def any_config(self) -> TrainConfig:
        """The configuration of a seed whose run was begun: a kill may have left others without one.

        Raises:
            InputError: there is none.
        """
        for seed in self.seeds:
            folder = RunFolder(self.run(seed))
            if folder.config.is_file():
                return folder.read_config()
        hint = "remove the folder, and begin anew"
        raise InputError("no seed's run was begun", path=self.path, expected="seed-… in it", hint=hint)


def _manifest(path: Path) -> Path:
    return path / "seeds.json"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds as a command line names them: "0-7", "3,5,11", "0-3,8".

    Raises:
        InputError: something else, a seed twice, or too many.
    """
    seeds: list[int] = []
    expected = "numbers and ranges, as 0-7 or 3,5,11"
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _SEED.fullmatch(first) or (dash and not _SEED.fullmatch(last)):
            raise InputError("no seeds", field="--seeds", found=part, expected=expected)
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise InputError("a range that ends before it begins", field="--seeds", found=part, expected=expected)
        if len(seeds) + high - low >= MOST:
            raise InputError("too many seeds for one process", field="--seeds", found=text, expected=f"{MOST} at most")
        seeds += range(low, high + 1)
    bounds_of(TrainConfig)["seed"].check(max(seeds), "--seeds")
    if len(set(seeds)) < len(seeds):
        raise InputError("a seed twice", field="--seeds", found=text, expected="each once")
    return tuple(seeds)


def execute_seeds(configs: Sequence[TrainConfig], folders: Sequence[RunFolder], stop: StopSignals) -> dict[int, str]:
    """Everything that the run folders do not hold yet, of runs that differ by the seed alone.

    Returns:
        Why a seed diverged, by seed; those have no evaluation.

    Raises:
        StopRequestedError, InputError: as `llmdpd.runs.pipeline.execute`.
    """
    runs = [Run(config, folder, stop) for config, folder in zip(configs, folders, strict=True)]
    generators = [Generators(check_device(config.device)) for config in configs]
    failed: dict[int, str] = {}
    for stage in pipeline.STAGES:
        stop.check()
        if stage is pipeline.train:
            members = _train(runs, generators, stop)
            failed = {run.config.seed: str(m.failed) for run, m in zip(runs, members, strict=True) if m.failed}
            continue
        going = [(run, own) for run, own in zip(runs, generators, strict=True) if run.config.seed not in failed]
        for run, own in going:
            stop.check()
            with own.active():
                if run is not runs[0] and stage in _TAKEN_OVER:
                    _TAKEN_OVER[stage](run, runs[0])
                else:
                    stage(run)
    for run in runs:
        if run.config.seed not in failed:
            run.folder.check_whole()
    return failed


def _train(runs: Sequence[Run], generators: Sequence[Generators], stop: StopSignals) -> list[Member]:
    members: list[Member] = []
    with selection_pool(runs[0].config) as pool:
        for run, own in zip(runs, generators, strict=True):
            with own.active():
                loop = training_loop(run, pool)
            loop.name = f"seed {run.config.seed}"
            members.append(Member(loop, own))
            if isinstance(loop.sampler, BatchSampler):
                for other in runs:
                    other.batches = loop.sampler
        together = Together(members)
        console.print(f"{len(runs)} seeds: {together.description}")
        together.execute(stop)
    for run, member in zip(runs, members, strict=True):
        if member.failed is None:
            note_training(
                run, member.loop, member.loop.seconds / len(runs)
            )  # each has an equal part of the time of all
            seeds = [other.config.seed for other in runs]
            run.folder.note(training={"seeds in one process": seeds, "how": together.description})
            if together.cuda_graph is not None:
                run.folder.note(training={"cuda_graph": together.cuda_graph})
    return members


def _take_texts(run: Run, first: Run) -> None:
    run.texts = first.texts


def _take_data(run: Run, first: Run) -> None:
    run.dataset, run.description = first.dataset, first.description
    run.demonstrations, run.held_out = first.demonstrations, first.held_out


def _take_hashes(run: Run, first: Run) -> None:
    run.hashes = {**first.hashes, "config": decisive(run.config)}


_TAKEN_OVER: dict[Callable[[Run], None], Callable[[Run, Run], None]] = {
    pipeline.embed: _take_texts,
    pipeline.prepare_data: _take_data,
    pipeline.hash_inputs: _take_hashes,
}
"""The stages whose outcome does not depend on the seed: the first seed's run does them, the others take that over."""
