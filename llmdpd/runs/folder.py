"""The run folder: what lies where, and what is written down about the machine and the times."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llmdpd.config.schema import TrainConfig
from llmdpd.config.stored import read_stored
from llmdpd.data import is_named
from llmdpd.data.task_file import given_data, task_file_in_use, use_task_file
from llmdpd.errors import InputError
from llmdpd.tasks.user import use_no_file
from llmdpd.tasks.user.file import TaskFile, read_task_file
from llmdpd.utils import ranks
from llmdpd.utils.checkpoint import latest_checkpoint, read_state
from llmdpd.utils.files import (
    atomic_write_json,
    atomic_write_text,
    process_lock,
    read_json,
    read_text,
    recover_directory,
)
from llmdpd.utils.plain import differences, to_plain
from llmdpd.utils.progress import Stopwatch, console

_PACKAGES = (
    *("llmdpd", "torch", "numpy", "transformers", "gymnasium", "metaworld", "mujoco", "minari", "safetensors"),
    *("stable-baselines3", "ogbench", "dm_control"),
)
# Where a resumed run may differ from its start: none of these changes what is learned or chosen. Where collected data
# is kept may change because what lies there is held against the checkpoint's hash.
_FREE_ON_RESUME = (
    "threads",
    *("evaluation.episodes", "evaluation.seen_episodes", "evaluation.videos", "evaluation.video_tasks"),
    *("data.root", "data.workers"),
    *("training.checkpoint_every", "training.cuda_graph", "training.logger"),
)


@dataclass
class RunFolder:
    """A run's folder, and the paths within it.

    prompts  the demonstrations of the evaluation, as Minari data sets
    tasks    the task file as it was when the run was begun, of a run on a user's own tasks; task_texts, what the text
             files held that it names, by task
    origin   the policy that the run started from, where it did (see `llmdpd.runs.origin`)
    replay   the steps of a method that learns in the environment, from which its checkpoints continue
    """

    path: Path

    def __post_init__(self) -> None:
        path = self.path
        self.config = path / "config.json"
        self.meta = path / "meta.json"
        self.results = path / "results.json"
        self.report = path / "report.html"
        self.videos = path / "videos"
        self.prompts = path / "prompt_data"
        self.replay = path / "replay"
        self.tasks = path / "tasks.toml"
        self.task_texts = path / "task_texts.json"
        self.origin = path / "init.json"
        self._lock_file = path / ".lock"
        self._before: tuple[str, Path | None] | None = None

    def new_evaluation(self) -> Path:
        """A new file for an evaluation apart from the run's own."""
        return self.path / "evaluations" / f"{datetime.now():%Y%m%d-%H%M%S-%f}.json"

    def policy(self, checkpoint: str) -> Path:
        """The policy folder of the `last` or the `best` checkpoint."""
        return self.path / ("policy" if checkpoint == "last" else "policy_best")

    @classmethod
    def create(cls, path: Path | None, config: TrainConfig) -> RunFolder:
        """A new run folder, named after preset, seed and time unless a path is given.

        Raises:
            InputError: the folder holds something already, or another process is at work in it.
        """
        if path is None:
            path = Path("runs") / f"{config.preset}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        if path.exists() and not path.is_dir():
            raise InputError("the run folder is a file", path=path, expected="a new or an empty folder")
        run = cls(path)
        with run.lock():
            if not run.is_new:
                expected = "a new or an empty folder"
                hint = f"continue that run with --resume {path}, or choose another --run-dir"
                raise InputError("the run folder is not empty", path=path, expected=expected, hint=hint)
            if config.tasks.file is not None:
                file = task_file_in_use(config.tasks.file, given_data(config.data)).file
                atomic_write_text(run.tasks, file.content)
                if file.texts:
                    atomic_write_json(run.task_texts, dict(file.texts))
            atomic_write_json(run.meta, {"versions": _versions(), "machine": _machine(), "times": {}})
            # Last, by one rename: a folder with a configuration is a whole run folder, and without it is begun anew.
            atomic_write_json(run.config, to_plain(config))
        return run

    @property
    def is_new(self) -> bool:
        """Whether nothing is there but what a creation that was killed may have left."""
        return not self.config.exists() and all(map(self._is_begun_with, self.path.glob("*")))

    def _is_begun_with(self, file: Path) -> bool:
        """Whether a creation that was killed may have left this file: what is written up to the configuration."""
        before = (self._lock_file, self.meta, self.tasks, self.task_texts)
        names = "|".join(re.escape(each.name) for each in (*before, self.config))
        return file in before or re.fullmatch(rf"\.({names})\..+\.tmp", file.name) is not None

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A run folder that exists. Policies that a kill left under their temporary names are put back.

        Raises:
            InputError: it is none.
        """
        run = cls(path)
        if not run.config.is_file():
            raise _no_run(path)
        for name in ("last", "best"):
            recover_directory(run.policy(name))
        return run

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from training this run, or writing its results, while the block runs.

        Raises:
            InputError: another process is at work in it.
        """
        return folder_lock(self.path, "in this run", "wait for it, or stop it (SIGTERM: it saves), then resume")

    def read_config(self) -> TrainConfig:
        """The configuration that the run was started with."""
        return read_stored(read_json(self.config), self.config)

    def use_tasks(self, config: TrainConfig, *, unchanged: bool) -> None:
        """Make the tasks of the run's task file known, by the run's own copy of it; in other runs no file is in use.

        Where the file or a text file that it names was changed since, or is gone, a line says so. Relative paths, and
        environments' modules, are looked for where the file lay.

        Args:
            config: the run's own.
            unchanged: whether a changed file is refused.

        Raises:
            InputError: the copy is gone, the file was changed; and as `use_task_file`.
        """
        if config.tasks.file is None:
            use_no_file()
            return
        file = Path(config.tasks.file)
        if not self.tasks.is_file():
            hint = f"put {file} there, as it was when the run was begun"
            raise InputError("the run's copy of its task file is gone", path=self.tasks, hint=hint)
        texts = read_json(self.task_texts) if self.task_texts.is_file() else None
        own = use_task_file(file, read_text(self.tasks), texts, given_data(config.data)).file
        what = self._change(file, own, refuse=unchanged)
        if what is not None:
            other = "" if unchanged else "; --tasks-file names another"
            console.print(f"{what}; the run's own copy is used: {self.tasks}{other}", markup=False, soft_wrap=True)

    def _change(self, file: Path, own: TaskFile, *, refuse: bool) -> str | None:
        """How a task file differs from the run's own copy, in words; a changed one raises `InputError` on `refuse`."""
        if not file.is_file():
            return f"{file} is gone"
        try:
            present = read_task_file(file, is_named)
        except InputError as error:
            if refuse:
                raise
            return f"{error.problem} ({error.path})"
        if present.sha256 == own.sha256:
            return None
        same = present.content == own.content
        if refuse:
            copy = f"as in {self.task_texts}" if same else f"cp {self.tasks} {file}"
            raise InputError(
                f"{'a text file that the task file names' if same else 'the task file'} was changed since the run was "
                "begun",
                path=file,
                found=f"SHA-256 {present.sha256}",
                expected=f"SHA-256 {own.sha256}, of {self.tasks}",
                hint=f"put it back ({copy}), or start a new run",
            )
        return f"{f'a text file that {file} names' if same else file} was changed since the run was begun"

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Hold what is learned from, as hashes by name, against the run's checkpoint, where there is one.

        Raises:
            InputError: naming every setting and every input that is not the checkpoint's.
        """
        checkpoint = latest_checkpoint(self.path / "checkpoint")
        if checkpoint is None:
            return
        state = read_state(checkpoint)
        known = {name: state.get(name) for name in inputs}
        if known["config"] is not None:
            # Settings from after the checkpoint was written are at their defaults in it: what was done before.
            known["config"] = decisive(read_stored(known["config"], checkpoint / "state.json", "config."))
            _move_end(known["config"], inputs["config"])
        if changed := differences(known, dict(inputs)):
            raise InputError(
                "the run cannot be resumed: what it learns from is not what its checkpoint learned from",
                path=checkpoint,
                found="; ".join(changed),
                expected="the same configuration, data and embeddings",
                hint="put them back as they were, or start a new run",
            )

    def take_up(self, config: TrainConfig) -> None:
        """Prepare an interrupted run for continuing with `config`, and remove what a kill left half written.

        Fields from after the run was begun count as their defaults, which are what was done before there were such.

        Raises:
            InputError: naming every field in which `config` would change what is learned.
        """
        changed = differences(to_plain(self.read_config().heeding_texts()), to_plain(config))
        free = (*_FREE_ON_RESUME, *_longer(self.read_config(), config))
        forbidden = [line for line in changed if line.split(":")[0] not in free]
        if forbidden:
            raise InputError(
                "the run cannot be resumed with another configuration",
                path=self.config,
                found="; ".join(forbidden),
                expected="the run's own configuration",
                hint=_hint_of([line.split(":")[0] for line in forbidden]),
            )
        self._before = read_text(self.config), latest_checkpoint(self.path / "checkpoint")
        if changed:
            atomic_write_json(self.config, to_plain(config))
        for half in (*self.path.glob(".policy*.tmp"), *self.path.glob("checkpoint/.step-*.tmp")):
            shutil.rmtree(half)

    def put_back(self) -> None:
        """Give a run that was not gone on with, after `take_up`, the configuration that it had."""
        if self._before is not None and latest_checkpoint(self.path / "checkpoint") == self._before[1]:
            atomic_write_text(self.config, self._before[0])

    def check_whole(self) -> None:
        """Hold that nothing was deleted while the run was at work.

        Raises:
            InputError: naming what of the finished run is gone.
        """
        policy = self.policy("last") / "policy.json"
        parts = (self.config, self.meta, self.results, self.path / "metrics.jsonl", policy)
        gone = [str(part.relative_to(self.path)) for part in parts if not part.is_file()]
        if gone or latest_checkpoint(self.path / "checkpoint") is None:
            found = ", ".join(gone or ["checkpoint/"]) + " gone"
            problem, hint = "files of the run were deleted while it ran", "what is left is in the folder; run it anew"
            raise InputError(
                problem, path=self.path, found=found, expected="a folder that others leave alone", hint=hint
            )

    @property
    def begun(self) -> bool:
        """Whether training has begun, so that there is something to continue."""
        return (self.path / "metrics.jsonl").exists()

    def discard(self) -> None:
        """Remove what a run that failed before it began has made; whatever else lies in its folder stays."""
        # The configuration before what a creation begins with: killed between them, it is begun anew.
        shutil.rmtree(self.prompts, ignore_errors=True)
        own = (self.config, self.meta, self.tasks, self.task_texts, self.origin, self._lock_file)
        for file in (self.path / "prompts.json", *own):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: data that was collected into it
            self.path.rmdir()

    @contextmanager
    def timed(self, name: str, runs: int = 1) -> Iterator[None]:
        """Add the seconds that the block takes to meta.json's times, to those of earlier processes, stopped or not.

        runs: how many the block works on; each is given an equal part of the time.
        """
        watch = Stopwatch()
        try:
            yield
        finally:
            # On a full disk the block's own error is the one to tell.
            with suppress(OSError):
                known = self.notes().get("times", {}).get(name, 0.0)
                self.note(times={name: round(known + watch.seconds / runs, 2)})

    def notes(self) -> dict[str, dict[str, Any]]:
        """The sections of meta.json; none where it is not there.

        Raises:
            InputError: it is damaged.
        """
        known = read_json(self.meta) if self.meta.is_file() else {}
        if not isinstance(known, dict) or not all(isinstance(section, dict) for section in known.values()):
            raise InputError("damaged", path=self.meta, found=repr(known)[:80], expected="an object of objects")
        for name, value in known.get("times", {}).items():
            if type(value) not in (int, float):
                found = repr(value)[:80]
                raise InputError("damaged", path=self.meta, field=f"times.{name}", found=found, expected="seconds")
        return known

    def note(self, **sections: dict[str, Any]) -> None:
        """Merge sections into meta.json (versions, machine, times …); of several processes the first one alone does."""
        if ranks.rank():
            return
        known = self.notes()
        for name, values in sections.items():
            known[name] = {**known.get(name, {}), **values}
        atomic_write_json(self.meta, known)


def folder_lock(folder: Path, where: str, hint: str) -> AbstractContextManager[None]:
    """Hold `folder`'s lock while the block runs; an `InputError` where another process has it."""

    def refuse(holder: int | None) -> None:
        process = "a live process" if holder is None else f"process {holder}"
        raise InputError(f"another process is at work {where}", path=folder, found=process, hint=hint)

    return process_lock(folder / ".lock", refuse)


def decisive(config: TrainConfig) -> dict[str, Any]:
    """The plain configuration without what a resumed run may change."""
    plain: dict[str, Any] = to_plain(config.heeding_texts())
    for name in _FREE_ON_RESUME:
        *sections, field = name.split(".")
        del (plain[sections[0]] if sections else plain)[field]
    return plain


_END = "training.iterations"


def _longer(begun: TrainConfig, config: TrainConfig) -> tuple[str, ...]:
    """The field of a run's end, where it is put off; a run can't be made shorter."""
    return (_END,) if config.training.iterations > begun.training.iterations else ()


def _hint_of(forbidden: Sequence[str]) -> str:
    """What to do about fields that a resumed run can't change."""
    if list(forbidden) == [_END]:
        return "a run's end can be put off, not brought forward: give more iterations, or start a new run"
    return "leave these options out, or start a new run"


def _move_end(known: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Put off the end of a checkpoint's run, in its plain configuration, to that of the wanted one where it is later.

    What goes by shares of the run, as schedules of learning rates do, goes on as at this iteration of the longer run.
    """
    before, after = known["training"]["iterations"], wanted["training"]["iterations"]
    if after > before:
        known["training"]["iterations"] = after
        console.print(
            f"the run's end moves from {before} to {after} iterations; schedules, as of the learning rate, "
            "are those of the longer run from here on"
        )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout, or an optional package
            versions[name] = importlib.metadata.version(name)
    return versions


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = named[1].strip() if named else cpu
    return {"system": platform.platform(), "cpu": cpu, "cores": os.cpu_count()}


def _no_run(path: Path) -> InputError:
    """Why a path is no run folder, and which of the runs in it could have been meant."""
    found = "no config.json" if path.is_dir() else "a file" if path.exists() else "no such folder"
    runs = sorted(each.parent.name for each in path.glob("*/config.json"))
    hint = f"name one of the runs in it, as {path / runs[0]}" if runs else None
    return InputError("not a run folder", path=path, found=found, expected="a folder made by llmdpd.train", hint=hint)
