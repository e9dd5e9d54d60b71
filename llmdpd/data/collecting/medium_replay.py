"""Collecting a medium-replay: all steps of SAC until it reached the medium level (`llmdpd.collect --policy sac`).

Each task's SAC run is kept in a hidden folder beside its output: its transitions in pieces that are written once, the
rest in a checkpoint that is replaced. The same command continues a run that was stopped or killed; on one machine the
result has the same bits as without the interruption.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from llmdpd.data import TrajectoryDataset, load_dataset, save_d4rl, save_minari
from llmdpd.data.replay_log import ReplayLog
from llmdpd.errors import InputError
from llmdpd.tasks.locomotion import locomotion_base, normalised_score
from llmdpd.tasks.specs import TaskSpec, canonical_task, task_spec
from llmdpd.utils.bounds import Bounds, Count, Episodes, WholeNumber, check_config
from llmdpd.utils.checkpoint import check_learner, latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from llmdpd.utils.files import atomic_directory, atomic_write_json, process_lock, read_json
from llmdpd.utils.plain import differences

if TYPE_CHECKING:
    from llmdpd.data.collecting.sac_trainer import Level, SacTrainer

MEDIUM = 100.0 / 3
_FORMAT = 1
_MANIFEST = "collect.json"
_SLICE = 100  # steps between two looks at progress and stop signals

OnSteps = Callable[[str, int, int, str], None]
"""(task, steps so far, maximal steps, the current level in a few words)."""


@dataclass(frozen=True)
class MediumReplayConfig:
    """Train SAC (stable-baselines3, its defaults) on each task until it is of medium level, and keep all its steps.

    Writes OUT/hopper-medium-replay.hdf5 in D4RL's layout, or OUT/reach-v3-medium-replay, a Minari data set. The same
    command continues a run that was stopped at any moment.
    """

    tasks: tuple[str, ...] = ("hopper",)
    """Tasks, as their suites name them: hopper, halfcheetah, walker2d, push …"""
    level: Annotated[float, Bounds(1e-9, 1000)] = MEDIUM
    """Stop at this level, the mean of evaluation episodes: D4RL's normalised score (a third of an expert's is medium),
    where tasks succeed or fail, success in percent."""
    steps: Annotated[int, Bounds(1, 100_000_000)] = 1_000_000
    """Maximal steps in the environment, each with a gradient step; a run that ends here says so."""
    evaluate_every: Count = 5000
    """Steps from one evaluation, and one checkpoint, to the next."""
    evaluation_episodes: Episodes = 5
    """Episodes per evaluation, by the deterministic policy; they are not kept."""
    max_steps: Annotated[int | None, Bounds(1)] = None
    """Maximal steps of an episode; by default the environment's limit."""
    out: Path = Path("data/sac")
    """Folder of the data sets."""
    seed: WholeNumber = 0
    """Decides networks, actions and episodes."""
    goal_visible: bool = True
    """Whether observations hold the goal, or zeros in its place, where the suite can hide it."""

    def check(self) -> None:
        """Raise `InputError` where there is no task."""
        if not self.tasks:
            raise InputError("no tasks to collect", field="tasks", found="none", expected="one or more")


@dataclass(frozen=True)
class SacCollected:
    """A finished collection of one task.

    `level` is of the last evaluation, in the unit of `MediumReplayConfig.level`; `reached` says whether it is the
    requested one; `reused` says that the data existed before.
    """

    task: str
    path: Path
    dataset: TrajectoryDataset
    level: float
    reached: bool
    reused: bool = False


def collect_sac(config: MediumReplayConfig, progress: OnSteps | None = None) -> list[SacCollected]:
    """Collect every task, continue it, or read existing data. Waits for another process that collects the same.

    Args:
        config: what to collect.
        progress: called every few hundred steps; may raise to stop, after which the run can be continued.

    Raises:
        InputError: a wrong setting; stable-baselines3 is not installed; OUT holds another collection.
    """
    check_config(config)
    report = progress or (lambda *_: None)
    tasks = dict.fromkeys(canonical_task(task) for task in config.tasks)
    return [_collect_task(config, task_spec(task), report) for task in tasks]


def replay_path(out: Path, task: str) -> Path:
    """The place of a task's data: a file of D4RL's layout, or a folder with a Minari data set."""
    base = locomotion_base(task)
    return out / (f"{canonical_task(task)}-medium-replay" if base is None else f"{base}-medium-replay.hdf5")


def _content(config: MediumReplayConfig, spec: TaskSpec) -> dict[str, Any]:
    """The settings that determine the data, as JSON."""
    same = ("level", "steps", "evaluate_every", "evaluation_episodes", "seed")
    return {
        **{"format": _FORMAT, "policy": "sac", "task": spec.task},
        **{name: getattr(config, name) for name in same},
        "max_steps": min(config.max_steps or spec.max_steps, spec.max_steps),
        "goal_visible": config.goal_visible if spec.has_success else None,
    }


def _collect_task(config: MediumReplayConfig, spec: TaskSpec, report: OnSteps) -> SacCollected:
    path, content = replay_path(Path(config.out), spec.task), _content(config, spec)
    summary = path.with_name(f"{path.name}.json")

    def wait(holder: int | None) -> None:
        report(spec.task, 0, config.steps, f"waiting for process {holder or '(unknown)'}, which is collecting it")

    with process_lock(path.with_name(f".{path.name}.lock"), wait):
        partial = path.with_name(f".{path.name}.partial")
        if path.exists():
            collected = _read_finished(path, summary, content, spec)
        else:
            run = _Run(partial, content, config, spec)
            run.execute(report)
            collected = run.write(path, summary)
        shutil.rmtree(partial, ignore_errors=True)
        return collected


def _read_finished(path: Path, summary: Path, content: dict[str, Any], spec: TaskSpec) -> SacCollected:
    """Existing data; refused if they are not those of the configuration."""
    found = read_json(summary) if summary.is_file() else {}
    changed = differences(found.get("config", {}), content)
    if changed:
        what = "; ".join(changed) if found else f"no {summary.name} beside it"
        problem, expected = "this is not the requested collection", "a collection with these settings"
        hint = "choose another --out, or give the data by its path (--data)"
        raise InputError(problem, path=path, found=what, expected=expected, hint=hint)
    dataset = load_dataset(path)
    return SacCollected(spec.task, path, dataset, found["level"], found["reached"], reused=True)


class _Run:
    """One SAC run and its folder: `steps-FROM-TO.npz`, each written once, and `checkpoint` with everything else."""

    def __init__(self, folder: Path, content: dict[str, Any], config: MediumReplayConfig, spec: TaskSpec) -> None:
        from llmdpd.data.collecting.sac_trainer import SacTrainer

        self.folder, self._content, self._config, self._spec = folder, content, config, spec
        manifest = folder / _MANIFEST
        changed = differences(read_json(manifest), content) if manifest.is_file() else []
        if changed:
            hint = "remove this folder to start again, or choose another --out"
            problem = "this folder belongs to a collection with other settings"
            raise InputError(problem, path=folder, found="; ".join(changed), hint=hint)
        self._trainer: SacTrainer = SacTrainer(
            [spec], config.seed, config.steps, max_steps=config.max_steps, goal_visible=config.goal_visible
        )
        self._level: Level | None = None
        self._log = ReplayLog(folder)
        if manifest.is_file():
            self._restore()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_json(manifest, content)

    @property
    def level(self) -> float:
        """Level at the last evaluation, in percent of an expert; minus infinity before the first."""
        if self._level is None:
            return -np.inf
        if self._spec.has_success:
            return 100.0 * self._level.success
        return normalised_score(self._spec.task, self._level.mean_return)

    def execute(self, report: OnSteps) -> None:
        """Train until the level is reached or the steps are used up; a checkpoint at every evaluation and at a stop."""
        total, trainer = self._config.steps, self._trainer

        def tell() -> None:
            report(self._spec.task, trainer.steps, total, self._progress())

        while trainer.steps < total and self.level < self._config.level:
            mark = min((trainer.steps // self._config.evaluate_every + 1) * self._config.evaluate_every, total)
            while trainer.steps < mark:
                try:
                    tell()
                except BaseException:
                    self._save()  # here, between two slices, everything fits together; within one it does not
                    raise
                trainer.advance(min(_SLICE, mark - trainer.steps))
            # Stopped in here it continues from the last checkpoint, or else this evaluation would be left out.
            self._level = trainer.evaluate(self._config.evaluation_episodes, tell)
            self._save()
        tell()

    def _progress(self) -> str:
        if self._level is None:
            return "no evaluation yet"
        unit = "% success" if self._spec.has_success else "of 100, normalised"
        return f"level {self.level:.1f} {unit}, aimed at {self._config.level:.1f}"

    def _save(self) -> None:
        """Write the steps since the last piece, then the state, which says which pieces count."""
        steps = self._trainer.steps
        if not steps:
            return
        check_learner(self._trainer, steps, self.folder / "checkpoint")
        self._log.append(self._trainer.transitions(self._log.steps), steps)
        state = self._trainer.state()
        del state["random"]["torch"]  # the checkpoint has it
        with self._trainer.own_random():
            save_checkpoint(self.folder / "checkpoint", self._trainer, steps, {**state, "level": self._level})

    def _restore(self) -> None:
        from llmdpd.data.collecting.sac_trainer import Level

        trainer = self._trainer
        checkpoint = latest_checkpoint(self.folder / "checkpoint")
        if checkpoint is None:
            self._log.take_up(0)  # killed before its first one
            return
        try:
            state = read_state(checkpoint)
            with trainer.own_random():
                load_checkpoint(checkpoint, trainer)
                torch_state = trainer.state()["random"]["torch"]
            transitions = self._log.take_up(state["counters"][0])
            trainer.load_state({**state, "random": {**state["random"], "torch": torch_state}}, transitions)
        except (OSError, KeyError, IndexError, ValueError) as error:
            found = (error.problem if isinstance(error, InputError) else f"{type(error).__name__}: {error}")[:200]
            problem, hint = "the interrupted collection is damaged", "remove this folder to start again"
            raise InputError(problem, path=self.folder, found=found, hint=hint) from None
        self._level = None if state["level"] is None else Level(*state["level"])

    def write(self, path: Path, summary: Path) -> SacCollected:
        """Write the whole replay to its place, and its settings beside it."""
        assert self._level is not None, "the last step is evaluated"
        dataset, reached = self._dataset(str(path)), self.level >= self._config.level
        stop = "medium" if self._config.level == MEDIUM else f"level {self._config.level:g}"
        end = f"stopped at {stop}" if reached else f"{self._trainer.steps} steps, below {stop}"
        collector = f"stable-baselines3 SAC replay, {end}"
        attributes: dict[str, str | float] = {"collector": collector, "final_eval_return": self._level.mean_return}
        # First the summary: data without it would be taken for foreign data.
        atomic_write_json(summary, {"config": self._content, "level": self.level, "reached": reached, **attributes})
        if self._spec.has_success:
            with atomic_directory(path) as temporary:
                save_minari(dataset, temporary, name="sac-v0")
        else:
            save_d4rl(dataset, path, **attributes)
        # Read back, so that this process has the same data as every later one.
        return SacCollected(self._spec.task, path, load_dataset(path), self.level, reached)

    def _dataset(self, source: str) -> TrajectoryDataset:
        steps: dict[str, Any] = self._trainer.transitions()
        has_success = self._spec.has_success
        dones, timeouts = steps.pop("dones") != 0, steps.pop("timeouts") != 0
        offsets = np.unique([0, *(np.flatnonzero(dones) + 1), len(dones)]).astype(np.int64)
        episodes = len(offsets) - 1
        succeeded = np.array(self._trainer.successes[:episodes], np.int8)
        return TrajectoryDataset(
            **steps,
            terminals=dones & ~timeouts,
            offsets=offsets,
            task_ids=np.zeros(episodes, np.int32),
            tasks=(self._spec.task,),
            texts=("",),
            noise_levels=np.full(episodes, np.nan, np.float32),
            successes=succeeded if has_success else np.full(episodes, -1, np.int8),
            seeds=self._trainer.seeds[:episodes],
            success_steps=np.full(episodes, -1, np.int64),
            goal_visible=self._config.goal_visible if has_success else None,
            source=source,
        )
