"""One cell of an experiment: a run folder and further evaluations of it, what is there and what is to do next."""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError, abridged
from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.evaluation.results import SPLITS, TaskResult, read_results
from llmdpd.runs.folder import RunFolder, decisive
from llmdpd.utils.checkpoint import latest_checkpoint
from llmdpd.utils.files import last_iteration
from llmdpd.utils.plain import differences

State = Literal["missing", "partial", "done"]
DATA, UNSEEN = "{data}", "{unseen}"
"""Placeholders in a grid's options: for the folder of collected data, and for the names of the held-out tasks."""

DECIDED = {
    "preset": "--only chooses among the methods, each of which has a preset",
    "method": "--only chooses among the experiment's methods",
    "agent": "--only chooses among the experiment's methods",
    "protocol": "--protocol before the --",
    "tasks.protocol": "--protocol before the --",
    "run_dir": "--out before the -- is the folder of all runs",
    "resume": "an interrupted run continues by itself",
    "seed": "--seeds before the --",
    "device": "--device before the --",
    "threads": "--jobs before the -- shares out the machine",
    "data.workers": "--jobs before the -- shares out the machine",
    "data.root": "--data-root before the --",
    "evaluation.episodes": "--episodes before the --",
    "evaluation.seen_episodes": "--seen-episodes before the --",
    **dict.fromkeys(
        ("evaluation.videos", "evaluation.video_tasks"),
        "record videos of a run that is done: llmdpd.evaluate RUN --videos",
    ),
}
"""The fields of llmdpd.train that a cell's own arguments decide, and what decides them for all cells."""
# How earlier versions spelled options: the names of results depend on them.
_SPELLED_BEFORE = {"--baseline": "--control"}


@dataclass(frozen=True)
class Share:
    """What of the machine a cell may use: threads of computation, processes of environments, a CUDA device's number."""

    threads: int
    cuda: int | None = None

    @property
    def device(self) -> tuple[str, ...]:
        return ("--device", "cpu" if self.cuda is None else "cuda")

    @property
    def evaluation(self) -> tuple[str, ...]:
        """Options of `llmdpd.evaluate`."""
        return ("--threads", str(self.threads), "--workers", str(self.threads), *self.device)


@dataclass(frozen=True)
class Step:
    """One command of a cell: what it does, and a module of llmdpd with its arguments."""

    what: str
    words: tuple[str, ...]

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-m", *self.words]


@dataclass(frozen=True)
class Evaluation:
    """A further evaluation of a cell's policy: options of `llmdpd.evaluate`, and where its results lie."""

    name: str
    options: tuple[str, ...]

    def file(self, run: Path) -> Path:
        # Other options are other results: they must not be found under the same name.
        options = tuple(_SPELLED_BEFORE.get(word, word) for word in self.options)
        return run / "evaluations" / f"{self.name}-{zlib.crc32(repr(options).encode()):08x}.json"


@dataclass(frozen=True)
class Cell:
    """A run of a grid.

    method       key of the grid's method
    preset, options   what the training command is given
    config       the resulting configuration: what the run's config.json must say
    folder       of the run
    episodes     evaluated episodes a task, at least
    seen_episodes  the same of a task that is trained on; None: as many
    data_root    folder of collected data, shared by all cells
    evaluations  evaluations beside the run's own
    """

    method: str
    preset: str
    options: tuple[str, ...]
    config: TrainConfig
    folder: Path
    episodes: int
    data_root: Path
    evaluations: tuple[Evaluation, ...] = field(default=())
    seen_episodes: int | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def state(self) -> State:
        """Done: the run's own results and all further ones hold as many episodes as asked for, and the report is there.

        Raises:
            InputError: something else lies in the folder, or a run of another configuration.
        """
        if not self._check_own():
            return "missing"
        return "partial" if self.next_step(Share(1)) else "done"

    def _check_own(self) -> bool:
        """Whether the cell's run is there; what is there and is not the cell's is an error, never written over."""
        run = self.run
        if not run.config.is_file():
            if not run.is_new or self.folder.is_file():
                found = sorted(path.name for path in self.folder.glob("*"))
                raise InputError(
                    "something else is where a cell of the experiment belongs",
                    path=self.folder,
                    found=", ".join(found[:4]) or "a file",
                    expected="a run of this experiment, or nothing",
                    hint="move it away, or choose another --out",
                )
            return False
        changed = differences(_compared(run.read_config()), _compared(self.config))
        if changed:
            raise InputError(
                "a cell of the experiment was run with another configuration",
                path=run.config,
                found=abridged(changed, 8, "; "),
                expected=f"that of {' '.join(('--preset', self.preset, *self.options))}",
                hint="choose another --out for other settings, or remove this folder to run the cell anew",
            )
        return True

    def next_step(self, share: Share) -> Step | None:
        """The first command that the cell still needs; None where it is done."""
        run = self.run
        if not self._check_own():
            own = ("--run-dir", str(self.folder), "--preset", self.preset, "--seed", str(self.config.seed))
            options = (*self._free(share), *share.device, *self.filled_in(self.options))
            return Step("train", ("llmdpd.train", *own, *options))
        # Someone may have evaluated it half way.
        trained = max((r.iterations for r in self.records() if r.checkpoint == "last"), default=0)
        half = run.results.is_file() and trained < self.config.training.iterations
        if half or not self.evaluated(run.results):
            if run.results.is_file() and not half:
                words = (str(self.folder), *self._episodes(run.results), *share.evaluation)
                return Step("evaluate", ("llmdpd.evaluate", *words))
            return Step("resume", ("llmdpd.train", "--resume", str(self.folder), *self._free(share)))
        if not run.report.is_file():
            return Step("report", ("llmdpd.report", str(self.folder)))
        for evaluation in self.evaluations:
            file = evaluation.file(self.folder)
            if not self.evaluated(file):
                words = (str(self.folder), "--out", str(file), *self._episodes(), *share.evaluation)
                return Step(evaluation.name, ("llmdpd.evaluate", *words, *self.filled_in(evaluation.options)))
        return None

    def filled_in(self, options: tuple[str, ...]) -> tuple[str, ...]:
        """Options with the names in place of what stands for them."""
        held_out = self.config.tasks.unseen or self.config.tasks.seen
        words = [name for word in options for name in (held_out if word == UNSEEN else (word,))]
        return tuple(word.replace(DATA, str(self.data_root)) for word in words)

    def _free(self, share: Share) -> tuple[str, ...]:
        """Options that do not decide what is learned: a resumed run may have others than it began with."""
        episodes = (*self._episodes(group="evaluation."), "--evaluation.no-videos")
        threads = ("--threads", str(share.threads), "--data.workers", str(share.threads))
        return (*episodes, "--data.root", str(self.data_root), *threads)

    def _episodes(self, known: Path | None = None, group: str = "") -> tuple[str, ...]:
        """Options for as many episodes as asked for, of neither split fewer than the results to be replaced have."""
        most = {split: self._asked.episodes_of(split) for split in SPLITS}
        for record in [] if known is None else read_results(known):
            most[record.split] = max(most[record.split], record.episodes)
        seen = () if most["seen"] == most["unseen"] else (f"--{group}seen-episodes", str(most["seen"]))
        return (f"--{group}episodes", str(most["unseen"]), *seen)

    def evaluated(self, path: Path) -> bool:
        """Whether a file of results is there and holds as many episodes of each task as asked for."""
        records = read_results(path) if path.is_file() else []
        return bool(records) and all(r.episodes >= self._asked.episodes_of(r.split) for r in records)

    @property
    def _asked(self) -> EvaluationConfig:
        return EvaluationConfig(self.episodes, self.seen_episodes)

    @property
    def iterations_done(self) -> int:
        """Iterations of the last checkpoint, 0 where there is none."""
        checkpoint = latest_checkpoint(self.folder / "checkpoint")
        return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))

    @property
    def progress(self) -> tuple[int, int]:
        """The last iteration that is recorded, 0 where none is, and the number of them."""
        return last_iteration(self.folder / "metrics.jsonl"), self.config.training.iterations

    def records(self, evaluation: Evaluation | None = None) -> list[TaskResult]:
        """The run's own results, or those of a further evaluation; empty where there are none yet."""
        file = self.run.results if evaluation is None else evaluation.file(self.folder)
        return read_results(file) if file.is_file() else []


def _compared(config: TrainConfig) -> dict[str, Any]:
    """What two configurations must agree in.

    The same cell may have been trained on another kind of device, and a language model that is no longer here can't say
    its sizes: `method.model` stands for them.
    """
    compared = {name: value for name, value in decisive(config).items() if name != "device"}
    compared["method"]["network"].pop("language", None)
    return compared
