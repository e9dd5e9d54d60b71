"""`python -m llmdpd.evaluate RUN`: success of a run's policies, over many episodes, under prompts of your choice."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from llmdpd.acting import ActingConfig
from llmdpd.cli import results_table, run_command
from llmdpd.config import EvaluationConfig, TrainConfig
from llmdpd.device import check_device, use_threads
from llmdpd.envs import check_task
from llmdpd.errors import InputError
from llmdpd.limits import LIMITS, check_limits
from llmdpd.progress import console
from llmdpd.report import build_report
from llmdpd.results import read_results
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.prompts import TaskPrompt, read_text, task_prompts
from llmdpd.runs.scoring import evaluate_run, film_run
from llmdpd.training.stopping import StopSignals


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate the policies of a run. Seeds are fixed, and apart from those of data and training."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    episodes: int = 500
    """Episodes a task."""
    checkpoint: Literal["last", "best", "both"] = "both"
    """Which policy: the last one, the best by the selection during training, or both."""
    tasks: tuple[str, ...] = ()
    """Meta-World tasks; by default those of the run, seen and unseen."""
    prompt_data: str | None = None
    """Data set to take the example trajectories from (Minari, HDF5, MTDiff files …); by default the run's own."""
    prompt_text: Path | None = None
    """Text file that replaces the text prompt of every evaluated task."""
    samples: int | None = None
    """Actions drawn a state; by default the run's."""
    noise_scale: float | None = None
    """Factor on the sampler's noise; by default the run's."""
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
    "max_steps": LIMITS["evaluation.max_steps"],
    "samples": LIMITS["acting.samples"],
    "noise_scale": LIMITS["acting.noise_scale"],
    "workers": LIMITS["data.workers"],
    "threads": LIMITS["threads"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, 2 for bad input."""
    return run_command(lambda: _evaluate(tyro.cli(EvaluateConfig, args=arguments, prog="python -m llmdpd.evaluate")))


def _evaluate(config: EvaluateConfig) -> None:
    check_limits(config, _LIMITS)
    if config.out is not None and config.out.is_dir():
        raise InputError("the results cannot be written", path=config.out, found="a folder", expected="a file name")
    check_device(config.device)
    run = RunFolder.open(config.run)
    trained = run.read_config()
    use_threads(config.threads)
    prompts = _prompts(config, run, trained)
    steps = trained.evaluation.max_steps if config.max_steps is None else config.max_steps
    evaluation = EvaluationConfig(episodes=config.episodes, max_steps=steps)
    out = config.out or (run.results if _is_standard(config, run, trained) else run.new_evaluation())
    own = out == run.results
    checkpoints = ("last", "best") if config.checkpoint == "both" else (config.checkpoint,)
    # The run's own results are its trainer's to write as long as that is at work.
    with StopSignals() as stop, run.lock() if own else nullcontext():
        records = evaluate_run(
            run,
            evaluation,
            prompts,
            checkpoints=checkpoints,
            acting=_changes(config),
            workers=config.workers,
            device=config.device,
            out=out,
            check=stop.check,
        )
        if config.films:
            film_run(
                run,
                prompts,
                steps,
                checkpoint=checkpoints[0],
                acting=_changes(config),
                device=config.device,
                folder=run.films if own else out.with_name(f"{out.stem}-films"),
                check=stop.check,
            )
    console.print(results_table(records))
    console.print(f"results: {out}")
    if own:
        console.print(f"report: {build_report([run.path])}")


def _is_standard(config: EvaluateConfig, run: RunFolder, trained: TrainConfig) -> bool:
    """Whether it is what results.json holds: the run's tasks, prompts, acting and steps, both policies, and no fewer
    episodes than are there already."""
    if config.tasks or config.prompt_data or config.prompt_text or _changes(config) or config.checkpoint != "both":
        return False
    known = [record.episodes for record in read_results(run.results)] if run.results.is_file() else []
    return config.max_steps in (None, trained.evaluation.max_steps) and config.episodes >= max(known, default=0)


def _prompts(config: EvaluateConfig, run: RunFolder, trained: TrainConfig) -> dict[str, TaskPrompt]:
    """The prompts of every task to evaluate."""
    context = trained.policy.context
    for option, given, used in (
        ("--prompt-data", config.prompt_data, context.trajectory),
        ("--prompt-text", config.prompt_text, context.text),
    ):
        if given is not None and not used:
            raise InputError("this run's policy was trained without such prompts", path=run.path, field=option)
    tasks = tuple(dict.fromkeys(check_task(task) for task in config.tasks))
    text = None if config.prompt_text is None else read_text(config.prompt_text)
    source = "built in" if config.prompt_text is None else str(config.prompt_text)
    tasks = tasks or (*trained.tasks.seen, *trained.tasks.unseen)
    data = (config.prompt_data or run.prompts) if context.trajectory else None
    foreign = [task for task in tasks if task not in (*trained.tasks.seen, *trained.tasks.unseen)]
    if foreign and data == run.prompts:
        raise InputError(
            "the run has no example of this task",
            path=run.prompts,
            field="--tasks",
            found=", ".join(foreign),
            hint="give a data set that has one with --prompt-data (python -m llmdpd.collect makes one)",
        )
    return task_prompts(tasks, data, trained.tasks.goal_visible, text, source)


def _changes(config: EvaluateConfig) -> dict[str, Any]:
    """The fields of `ActingConfig` that options change."""
    names = {field.name for field in dataclasses.fields(ActingConfig)}
    return {name: value for name, value in vars(config).items() if name in names and value is not None}


if __name__ == "__main__":
    sys.exit(main())
