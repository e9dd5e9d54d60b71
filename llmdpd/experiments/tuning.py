"""Hyper-parameter search by Optuna, on tasks that nothing is reported on: trials are runs, kept in folders."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from llmdpd.config.parse import parse_train, split_options
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.experiments.cell import DECIDED, Cell
from llmdpd.experiments.executors import Executor
from llmdpd.experiments.scheduler import Outcome, Scheduler
from llmdpd.experiments.search_space import Dimension, read_dimension
from llmdpd.tasks import base_name
from llmdpd.tasks.protocols import PROTOCOLS, TaskConfig
from llmdpd.tasks.specs import task_spec
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.bounds import Bounds
from llmdpd.utils.device import seen_device
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_write_json, atomic_write_text
from llmdpd.utils.progress import console

with extra("cli"):
    import tyro

_DESIGN = "design"
"""The protocol whose held-out tasks are for choosing."""


@dataclass(frozen=True)
class TuneSettings:
    """What is searched, and on how much of the machine."""

    search: tuple[str, ...]
    """Options of llmdpd train and their values: method.lr=log:1e-4:1e-2, method.weight-decay=float:0:0.1,
    method.batch-size=int:240:960:240, method.network.context.kind=pooled,retrieval."""
    trials: int = 20
    """Trials in all; those that an earlier call has finished count."""
    preset: str | None = None
    """The configuration that is varied, by default that of llmdpd train: metaworld, or the one for tasks of a file."""
    tasks_file: Path | None = None
    """A file of your own tasks."""
    hold_out: tuple[str, ...] = ()
    """Seen tasks to hold out and judge by, where there is no protocol `design`. Tasks that are held out to be reported
    are refused."""
    seeds: int = 1
    """Runs of each trial; its value is their mean."""
    episodes: int = 40
    """Evaluated episodes of each held-out task."""
    out: Path = Path("tune")
    """Folder of the study, the runs and the page."""
    data_root: Path = Path("data")
    """Folder of collected data, shared by all runs."""
    jobs: int = 1
    """Trials at once; the search learns from those that have ended."""
    threads: int | None = None
    """CPU threads of a run; by default the cores shared out."""
    device: str = "auto"
    """auto, cpu or cuda, as of llmdpd experiment."""
    executor: str = "local"
    """local, ray or slurm, as of llmdpd experiment."""
    slurm: tuple[str, ...] = ()
    """As of llmdpd experiment."""
    options: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Options of llmdpd train for all trials."""


@dataclass(frozen=True)
class Study:
    """A search: its dimensions, what all trials share, and the tasks that judge them."""

    settings: TuneSettings
    preset: str
    dimensions: tuple[Dimension, ...]
    options: tuple[str, ...]
    judges: tuple[str, ...]

    def config(self, values: dict[str, Any]) -> TrainConfig:
        """The configuration of a trial."""
        return parse_train(("--preset", self.preset, "--device", seen_device(), *self.words(values)))

    def words(self, values: dict[str, Any]) -> tuple[str, ...]:
        """A trial's options after the preset."""
        chosen = (word for each in self.dimensions for word in each.words(values[each.option]))
        return (*self.options, *chosen)

    def cells(self, number: int, values: dict[str, Any]) -> list[Cell]:
        """The runs of a trial, one a seed."""
        settings, config = self.settings, self.config(values)
        return [
            Cell(
                method=f"trial-{number:04d}",
                preset=self.preset,
                options=self.words(values),
                config=dataclasses.replace(config, seed=seed),
                folder=settings.out.absolute() / f"trial-{number:04d}-seed{seed}",
                episodes=settings.episodes,
                data_root=settings.data_root.absolute(),
                seen_episodes=1,
            )
            for seed in range(settings.seeds)
        ]

    def value(self, cells: Sequence[Cell]) -> float:
        """Mean success of the held-out tasks with the last checkpoint, over tasks and seeds, 0 to 1."""
        rates = [
            record.success_rate
            for cell in cells
            for record in cell.records()
            if record.checkpoint == "last" and record.split == "unseen"
        ]
        return fmean(rate for rate in rates if rate is not None)


def make_study(settings: TuneSettings) -> Study:
    """What a search is, checked before anything is trained.

    Raises:
        InputError: no trials, an option that the search decides or that the training command refuses with one of its
            values, or no tasks to judge by.
    """
    for name in ("trials", "seeds", "episodes", "jobs"):
        Bounds(1, 100_000).check(getattr(settings, name), f"--{name}")
    dimensions = tuple(map(read_dimension, settings.search))
    fields = [split_options([f"--{each.option}"])[0].field for each in dimensions]
    given = {option.field: option for option in split_options(settings.options)}
    for field in (*given, *fields):
        if field in DECIDED or field.startswith("tasks."):
            hint = DECIDED.get(field, "--hold-out before the -- chooses the tasks that judge")
            raise InputError("the search decides this option itself", field=field, hint=hint)
    for field in fields:
        if field in given or fields.count(field) > 1:
            raise InputError("an option that is searched is given once more", field=field)
    start = _start(settings)
    words, judges = _split(settings, start.tasks)
    study = Study(settings, start.preset, dimensions, (*words, *settings.options), judges)
    first = {each.option: each.ends[0] for each in dimensions}
    silent = [task for task in judges if not task_spec(task).has_success]
    mode = study.config(first).evaluation_mode
    if silent or mode != "rollout":
        found = ", ".join(silent) or f"--evaluation {mode}"
        expected = "tasks with an environment that tells success"
        raise InputError("no success is measured of what judges", field="--hold-out", found=found, expected=expected)
    for each in dimensions:
        for end in each.ends:
            study.config(first | {each.option: end})
    return study


def _file(settings: TuneSettings) -> tuple[str, ...]:
    """Options that name the task file, if there is one."""
    return () if settings.tasks_file is None else ("--tasks-file", str(settings.tasks_file.absolute()))


def _start(settings: TuneSettings) -> TrainConfig:
    """The configuration before anything is held out or varied."""
    preset = () if settings.preset is None else ("--preset", settings.preset)
    return parse_train((*preset, "--device", seen_device(), *_file(settings)))


def _split(settings: TuneSettings, start: TaskConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options that hold out the tasks to judge by, and those tasks: never such as are reported."""
    file = _file(settings)
    if settings.hold_out:
        asked = tuple(map(base_name, settings.hold_out))
        seen = {base_name(task): task for task in start.seen}
        wrong = [name for name in asked if name not in seen]
        left = tuple(task for name, task in seen.items() if name not in asked)
        if wrong or not left:
            reported = ", ".join(map(base_name, start.unseen)) or "none"
            raise InputError(
                "tasks that cannot judge a search",
                field="--hold-out",
                found=", ".join(wrong or asked),
                expected=f"some that are trained on ({', '.join(seen)}), none of those reported ({reported})",
            )
        judges = tuple(seen[name] for name in asked)
        return (*file, "--tasks.seen", *left, "--tasks.unseen", *judges), judges
    design = PROTOCOLS[_DESIGN]
    if file or not set(design.seen) & set(start.seen):
        raise InputError(
            "nothing says which tasks judge a search",
            field="--hold-out",
            found="none",
            expected="some of the tasks that are trained on; the reported ones would no longer be a test",
        )
    return ("--protocol", _DESIGN), design.unseen


def search(study: Study, executor: Executor, stop: StopSignals, command: Sequence[str]) -> list[Outcome]:
    """Run trials until there are as many as asked for, and write the page; the cells that failed.

    The study is `OUT/study.db` (SQLite). What an earlier call left unfinished goes on first, from its checkpoints.

    Raises:
        InputError: Optuna is not installed, the folder's study searched something else, or all of its trials failed in
            earlier calls.
        StopRequestedError: a stop was asked for; what ran has saved.
    """
    optuna = _import_optuna()
    settings = study.settings
    settings.out.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{settings.out.absolute() / 'study.db'}"
    found = optuna.create_study(storage=store, study_name="llmdpd", direction="maximize", load_if_exists=True)
    _check_same(found, study)
    states = optuna.trial.TrialState
    for trial in found.get_trials(deepcopy=False):
        if trial.state == states.RUNNING and any(each.option not in trial.params for each in study.dimensions):
            found.tell(trial.number, state=states.PRUNED)  # a kill left it without all of its values
    # Another seed a call: the first trials are sampled without looking at what was tried before.
    seed = len(found.get_trials(deepcopy=False))
    found.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    failed: list[Outcome] = []
    try:
        while True:
            trials = found.get_trials(deepcopy=False)
            left = settings.trials - sum(trial.state in (states.COMPLETE, states.FAIL) for trial in trials)
            if left <= 0:
                if not failed and all(trial.state != states.COMPLETE for trial in trials):
                    raise _all_failed(settings)
                return failed
            batch = {trial.number: trial.params for trial in trials if trial.state == states.RUNNING}
            while len(batch) < min(left, settings.jobs):
                trial = found.ask()
                batch[trial.number] = {each.option: each.suggest(trial) for each in study.dimensions}
            failed += _run(found, study, batch, executor, stop)
    finally:
        _write_page(found, study, command)


def _run(
    found: Any, study: Study, batch: dict[int, dict[str, Any]], executor: Executor, stop: StopSignals
) -> list[Outcome]:
    """Run trials side by side and tell the study what they came to; the cells that failed."""
    cells = {number: study.cells(number, values) for number, values in batch.items()}
    every = [cell for row in cells.values() for cell in row]
    outcomes = Scheduler(every, executor, study.settings.out / "logs", stop).execute()
    failed = [outcome for outcome in outcomes if outcome.failed_step]
    broken = {outcome.cell.method for outcome in failed}
    for number, row in cells.items():
        if row[0].method in broken:
            found.tell(number, state=_import_optuna().trial.TrialState.FAIL)
            continue
        value = study.value(row)
        found.tell(number, value)
        best = found.best_trial
        console.print(f"trial {number}: {100 * value:.1f} %; best: trial {best.number}, {100 * best.value:.1f} %")
    return failed


def _check_same(found: Any, study: Study) -> None:
    """Note what is searched in a new study; refuse to go on with another search's."""
    settings = study.settings
    said = {
        "search": sorted(settings.search),
        "preset": study.preset,
        "options": list(study.options),
        "seeds": settings.seeds,
        "episodes": settings.episodes,
    }
    before = found.user_attrs.get("said")
    if before is None:
        found.set_user_attr("said", said)
    elif before != said:
        changed = [f"{name}: {before[name]}, now {value}" for name, value in said.items() if before.get(name) != value]
        raise InputError(
            "another search was done in this folder",
            path=settings.out,
            found="; ".join(changed),
            expected="the same search",
            hint="choose another --out",
        )


def _write_page(found: Any, study: Study, command: Sequence[str]) -> None:
    """`tune.json` and `tune.md`: every trial, the best first, and how many there were."""
    trials = [
        {"number": t.number, "state": t.state.name.lower(), "value": t.value, "values": t.params}
        for t in found.get_trials(deepcopy=False)
    ]
    trials.sort(key=lambda trial: (trial["value"] is None, -(trial["value"] or 0.0), trial["number"]))
    done = sum(trial["value"] is not None for trial in trials)
    judges = ", ".join(map(base_name, study.judges))
    record = {"command": list(command), "judged_by": list(study.judges), "finished": done, "trials": trials}
    atomic_write_json(study.settings.out / "tune.json", record)
    names = [each.option for each in study.dimensions]
    lines = [
        f"# {done} finished trials of {len(trials)}",
        "",
        f"`{shlex.join(command)}`",
        "",
        f"Value: mean success of {judges}, {study.settings.seeds} seed(s) × {study.settings.episodes} episodes, last",
        "checkpoint. The best of many is better here than it will be elsewhere: report it on other tasks and seeds.",
        "`tune.json` holds the values with all digits.",
        "",
        f"| trial | value | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
    ]
    for trial in trials:
        state = "stopped" if trial["state"] == "running" else trial["state"]  # nothing runs when the page is written
        value = state if trial["value"] is None else f"{100 * trial['value']:.1f} %"
        chosen = " | ".join(_short(trial["values"].get(name, "")) for name in names)
        lines.append(f"| {trial['number']} | {value} | {chosen} |")
    atomic_write_text(study.settings.out / "tune.md", "\n".join([*lines, ""]))
    console.print(f"page: {study.settings.out / 'tune.md'}")


def _all_failed(settings: TuneSettings) -> InputError:
    return InputError(
        "every trial of this search has failed",
        path=settings.out / "logs",
        found=f"no value after {settings.trials} trials",
        hint="mend what the logs say; then give more --trials, or another --out",
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _import_optuna() -> Any:
    with extra("tune"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
