"""`python -m llmdpd.evaluate RUN`: success of a run's policies, or of a control, under prompts of your choice."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from llmdpd.cli.common import results_table, run_command
from llmdpd.cli.options import has_field
from llmdpd.cli.report import build_report
from llmdpd.config.schema import EvaluationConfig, TaskConfig, TrainConfig
from llmdpd.errors import InputError
from llmdpd.evaluation.non_learned import CONTROLS
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.results import TaskResult, read_results, write_results
from llmdpd.evaluation.scoring import evaluate_control, evaluate_policies, film, film_run
from llmdpd.methods.acting import ActingConfig
from llmdpd.ops.native import use_threads
from llmdpd.runs.checks import check_max_steps, check_views
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.prompt_choice import PromptChoice, check_choice, prompt_sets
from llmdpd.tasks.specs import canonical_task, common_spec
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.bounds import LIMITS, check_limits
from llmdpd.utils.device import check_device
from llmdpd.utils.progress import console


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate the policies of a run. Seeds are fixed, and apart from those of data and training."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The run's folder; a control does without one."""
    episodes: int = 500
    """Episodes a task."""
    seen_episodes: int | None = None
    """Episodes a task that was trained on; by default as many."""
    control: Literal["replay", "tracker"] | None = None
    """Instead of the policies, evaluate what learns nothing: the example's actions replayed, or a hand-written tracker
    of the example's hand. On the run's tasks and prompts, or without a run on --tasks."""
    checkpoint: Literal["last", "best", "both"] = "both"
    """Which policy: the last one, the best by the selection during training, or both."""
    tasks: tuple[str, ...] = ()
    """Tasks; by default those of the run, seen and unseen."""
    prompt_data: str | None = None
    """Data set to take the example trajectories from (Minari, HDF5, MTDiff files …); by default the run's own."""
    prompt_text: Path | None = None
    """Text file that replaces the text prompt of every evaluated task."""
    prompts: Literal["own", "swapped", "no-trajectory", "no-text"] = "own"
    """Each task under its own prompts, under another task's (of the same split: seen or unseen), with the text alone,
    or with the example alone (a policy can do without what prompt dropout taught it to do without)."""
    prompt_behaviours: tuple[str, ...] = ()
    """Evaluate once with examples by each of these behaviours (clean, slow, pauses …: see llmdpd.collect --help), which
    are collected, or found again, under --data-root."""
    examples: int | None = None
    """Examples a task that the episodes take in turn; by default 5 with --prompt-behaviours, else 1."""
    data_root: Path | None = None
    """Folder under which collected examples are kept; by default the run's, or data."""
    samples: int | None = None
    """Actions drawn a state; by default the run's."""
    noise_scale: float | None = None
    """Factor on the sampler's noise; by default the run's."""
    replan: int | None = None
    """Actions of a chunk that are played before the next is drawn; by default the run's."""
    views: int | None = None
    """Turned and mirrored views of the scene whose actions' mean is done, 1 for none; by default the run's."""
    max_steps: int | None = None
    """Steps an episode at most; by default the run's."""
    films: bool = False
    """Film one episode a task: into the run's films, or beside a file of its own in NAME-films."""
    workers: int | None = None
    """Environment processes; one a core by default."""
    threads: int = 0
    """CPU threads of the C++ kernels, 0 for all cores; results do not depend on it."""
    device: str = "cpu"
    """Where the policy runs: cpu, cuda or cuda:N."""
    out: Path | None = None
    """File for the results. By default the run's results.json, which is replaced, and its report is written anew; with
    other tasks, prompts, acting or steps, one checkpoint alone or fewer episodes, a new file in the run's folder
    evaluations."""


_LIMITS = {
    "episodes": LIMITS["evaluation.episodes"],
    "seen_episodes": LIMITS["evaluation.seen_episodes"],
    "max_steps": LIMITS["evaluation.max_steps"],
    "samples": LIMITS["acting.samples"],
    "noise_scale": LIMITS["acting.noise_scale"],
    "replan": LIMITS["acting.replan"],
    "views": LIMITS["acting.views"],
    "examples": LIMITS["data.episodes"],
    "workers": LIMITS["data.workers"],
    "threads": LIMITS["threads"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, 2 for bad input."""
    return run_command(lambda: _evaluate(tyro.cli(EvaluateConfig, args=arguments, prog="python -m llmdpd.evaluate")))


def check_evaluation(options: Sequence[str], trained: TrainConfig) -> None:
    """Refuse, before there is a run of the configuration, options of this command that it could not be evaluated with.

    Raises:
        InputError: as the command of limits, acting and prompts; not of files, nor of what the tasks' environments or
            the trained network alone can tell.
        SystemExit: no such option.
    """
    config = tyro.cli(EvaluateConfig, args=("RUN", *options), prog="python -m llmdpd.evaluate")
    check_limits(config, _LIMITS)
    _check_player(config)
    _check_acting(config, trained)
    check_choice(_choice(config, trained), None, trained)


def _evaluate(config: EvaluateConfig) -> None:
    check_limits(config, _LIMITS)
    if config.out is not None and config.out.is_dir():
        raise InputError("the results cannot be written", path=config.out, found="a folder", expected="a file name")
    check_device(config.device)
    run = None if config.run is None else RunFolder.open(config.run)
    _check_player(config)
    trained = _without_a_run(config) if run is None else run.read_config()
    _check_acting(config, trained)
    use_threads(config.threads)
    steps = trained.evaluation.max_steps if config.max_steps is None else config.max_steps
    choice = _choice(config, trained)
    spec = common_spec(choice.tasks)
    check_max_steps(spec, steps, "max_steps")
    if config.control is not None and not spec.has_success:
        raise InputError("controls are for Meta-World", field="--control", found=spec.task, expected="its tasks")
    evaluation = EvaluationConfig(config.episodes, config.seen_episodes, steps)
    out = config.out or _default_out(config, run, trained)
    own = run is not None and out == run.results
    with StopSignals() as stop:
        sets = prompt_sets(choice, run, trained, stop.check)
        # The run's own results are its trainer's to write as long as that is at work.
        with run.lock() if run is not None and own else nullcontext():
            records: list[TaskResult] = []
            for prompts in sets:
                records += _records(config, run, trained, evaluation, prompts, stop.check)
                write_results(out, records)
            if config.films:
                _film(config, run, trained, steps, sets, out, stop.check)
    console.print(results_table(records))
    console.print(f"results: {out}")
    if run is not None and own:
        console.print(f"report: {build_report([run.path])}")


def _check_player(config: EvaluateConfig) -> None:
    """Refuse what does not fit a control, or nothing to evaluate at all."""
    if config.control is None:
        if config.run is None:
            raise InputError("nothing to evaluate", field="RUN", found="neither a run nor --control", expected="one")
        return
    defaults = {field.name: field.default for field in dataclasses.fields(EvaluateConfig)}
    for name in ("samples", "noise_scale", "replan", "views", "checkpoint", "prompt_text"):
        if getattr(config, name) != defaults[name]:
            option = "--" + name.replace("_", "-")
            raise InputError("a control has no use for this", field=option, found=getattr(config, name))
    if config.prompts not in ("own", "swapped"):
        raise InputError(
            "a control follows an example and reads no text", field="--prompts", found=config.prompts,
            expected="own or swapped",
        )  # fmt: skip


def _check_acting(config: EvaluateConfig, trained: TrainConfig) -> None:
    """Refuse ways of acting that the run's method does not have."""
    for name in _changes(config):
        if config.run is not None and not has_field(trained.method, f"acting.{name}"):
            option = "--" + name.replace("_", "-")
            found = f"{getattr(config, name)}, of a run of {trained.method}"
            raise InputError(
                "the method has no such way of acting", field=option, found=found, hint=f"leave {option} out"
            )
    told = trained.policy.context.trajectory and config.prompts != "no-trajectory"
    if (config.views or 1) > 1 and not told:
        raise InputError(
            "without an example there is one view",
            field="--views",
            found=config.views,
            expected="1, or a policy and prompts with an example",
        )
    if config.run is not None:
        check_views(dataclasses.replace(trained, acting=dataclasses.replace(trained.acting, **_changes(config))))


def _without_a_run(config: EvaluateConfig) -> TrainConfig:
    """What a run's configuration would say of the tasks."""
    if not config.tasks:
        raise InputError("no tasks to evaluate", field="--tasks", found="none", expected="Meta-World tasks, or a run")
    if config.prompt_data is None and not config.prompt_behaviours:
        raise InputError(
            "no examples to follow", field="--prompt-data", found="none",
            hint="name a data set, or collect examples with --prompt-behaviours clean",
        )  # fmt: skip
    tasks = tuple(dict.fromkeys(canonical_task(task) for task in config.tasks))
    return TrainConfig(tasks=TaskConfig(protocol="none", seen=(), unseen=tasks))


def _default_out(config: EvaluateConfig, run: RunFolder | None, trained: TrainConfig) -> Path:
    if run is None:
        return Path("evaluations") / f"{config.control}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    return run.results if _is_standard(config, run, trained) else run.new_evaluation()


def _records(
    config: EvaluateConfig,
    run: RunFolder | None,
    trained: TrainConfig,
    evaluation: EvaluationConfig,
    prompts: dict[str, TaskPrompt],
    check: Callable[[], None],
) -> list[TaskResult]:
    """One set of prompts, all tasks."""
    if config.control is not None or run is None:
        seed, control = trained.seed, str(config.control)
        return evaluate_control(
            control, evaluation, prompts, trained.tasks, seed=seed, workers=config.workers, check=check
        )
    return evaluate_policies(
        run,
        evaluation,
        prompts,
        checkpoints=_checkpoints(config),
        acting=_changes(config),
        workers=config.workers,
        device=config.device,
        check=check,
    )


def _film(
    config: EvaluateConfig,
    run: RunFolder | None,
    trained: TrainConfig,
    steps: int,
    sets: Sequence[dict[str, TaskPrompt]],
    out: Path,
    check: Callable[[], None],
) -> None:
    """Film each set of prompts: into the run's films, or beside a file of results of its own."""
    most = None if config.tasks else trained.evaluation.film_tasks
    for number, prompts in enumerate(sets):
        folder = out.with_name(f"{out.stem}-films")
        if run is not None and out == run.results:
            folder = run.films
        if len(sets) > 1:
            folder = folder / config.prompt_behaviours[number]
        if config.control is not None or run is None:
            order = sorted(prompts, key=lambda task: task in trained.tasks.seen)
            some = {task: prompts[task] for task in order[:most]}
            film(CONTROLS[str(config.control)], some, steps, folder, trained.tasks.goal_visible, check=check)
            continue
        film_run(
            run,
            prompts,
            steps,
            checkpoint=_checkpoints(config)[0],
            acting=_changes(config),
            device=config.device,
            most=most,
            folder=folder,
            check=check,
        )


def _checkpoints(config: EvaluateConfig) -> tuple[str, ...]:
    return ("last", "best") if config.checkpoint == "both" else (config.checkpoint,)


def _is_standard(config: EvaluateConfig, run: RunFolder, trained: TrainConfig) -> bool:
    """Whether it is what results.json holds: the run's tasks, prompts, acting and steps, both policies, and no fewer
    episodes than are there already."""
    if config.tasks or config.prompt_data or config.prompt_text or _changes(config) or config.checkpoint != "both":
        return False
    if config.control or config.prompts != "own" or config.prompt_behaviours or config.examples not in (None, 1):
        return False
    known = read_results(run.results) if run.results.is_file() else []
    asked = EvaluationConfig(config.episodes, config.seen_episodes)
    enough = all(asked.episodes_of(record.split) >= record.episodes for record in known)
    return enough and config.max_steps in (None, trained.evaluation.max_steps)


def _choice(config: EvaluateConfig, trained: TrainConfig) -> PromptChoice:
    tasks = tuple(dict.fromkeys(canonical_task(task) for task in config.tasks))
    return PromptChoice(
        tasks=tasks or (*trained.tasks.seen, *trained.tasks.unseen),
        data=config.prompt_data,
        text=config.prompt_text,
        which=config.prompts,
        behaviours=tuple(dict.fromkeys(config.prompt_behaviours)),
        examples=config.examples,
        data_root=config.data_root,
        workers=config.workers,
        for_control=config.control is not None,
    )


def _changes(config: EvaluateConfig) -> dict[str, Any]:
    """The fields of `ActingConfig` that options change."""
    names = {field.name for field in dataclasses.fields(ActingConfig)}
    return {name: value for name, value in vars(config).items() if name in names and value is not None}


if __name__ == "__main__":
    sys.exit(main())
