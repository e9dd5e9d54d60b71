"""Evaluating a run: its policies, or a non-learned baseline on its tasks, with prompts of your choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.evaluation.non_learned import BASELINES
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.recording import record_videos
from llmdpd.evaluation.results import TaskResult, read_results, write_results
from llmdpd.evaluation.scoring import evaluate_baseline, evaluate_policies
from llmdpd.ops.native import use_threads
from llmdpd.policy.policy import Policy
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.prompt_choice import PromptChoice, check_choice, prompt_sets
from llmdpd.tasks.protocols import TaskConfig
from llmdpd.tasks.specs import canonical_task, common_spec
from llmdpd.utils.bounds import Bounds, Count, WholeNumber, check_config
from llmdpd.utils.device import check_device

Check = Callable[[], None]
OptionalCount = Annotated[int | None, Bounds(1)]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate the policies of a run. Seeds are fixed, and apart from those of data and training."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """The run's folder; a baseline does without one."""
    episodes: Count = 500
    """Episodes a task."""
    seen_episodes: OptionalCount = None
    """Episodes a task that was trained on; by default as many."""
    baseline: Literal["replay", "tracker"] | None = None
    """Instead of the policies, evaluate a non-learned baseline: the demonstration's actions replayed, or a hand-written
    tracker of the demonstration's hand. On the run's tasks and prompts, or without a run on --tasks."""
    checkpoint: Literal["last", "best", "both"] = "both"
    """Which policy: the last one, the best by the selection during training, or both."""
    tasks: tuple[str, ...] = ()
    """Tasks; by default those of the run, seen and unseen."""
    prompt_data: str | None = None
    """Data set to take the demonstrations from (Minari, HDF5, MTDiff files …); by default the run's own."""
    prompt_text: Path | None = None
    """Text file that replaces the text prompt of every evaluated task."""
    prompts: Literal["own", "swapped", "no-trajectory", "no-text"] = "own"
    """Each task with its own prompts, with another task's (of the same split: seen or unseen), with the text alone, or
    with the demonstration alone (a policy can do without what prompt dropout taught it to do without)."""
    prompt_behaviours: tuple[str, ...] = ()
    """Evaluate once with demonstrations by each of these behaviour policies (clean, slow, pauses …: see llmdpd.collect
    --help), which are collected, or found again, under --data-root."""
    demonstrations: OptionalCount = None
    """Demonstrations a task that the episodes take in turn; by default 5 with --prompt-behaviours, else 1."""
    data_root: Path | None = None
    """Folder under which collected demonstrations are kept; by default the run's, or data."""
    samples: OptionalCount = None
    """Actions sampled a state; by default the run's."""
    noise_scale: Annotated[float | None, Bounds(0)] = None
    """Factor on the sampler's noise; by default the run's."""
    action_horizon: OptionalCount = None
    """Actions of a chunk that are executed before the next is sampled; by default the run's."""
    max_steps: OptionalCount = None
    """Steps an episode at most; by default the run's."""
    videos: bool = False
    """Record a video of one episode a task: into the run's videos, or beside a file of its own in NAME-videos."""
    workers: OptionalCount = None
    """Environment processes; one a core by default."""
    threads: WholeNumber = 0
    """CPU threads of the C++ kernels, 0 for all cores; results do not depend on it."""
    device: str = "cpu"
    """Where the policy runs: cpu, cuda or cuda:N."""
    out: Path | None = None
    """File for the results. By default the run's results.json, which is replaced, and its report is written anew; with
    other tasks, prompts, acting or steps, one checkpoint alone or fewer episodes, a new file in the run's folder
    evaluations."""


RENAMED_OPTIONS = {
    "--control": "--baseline",
    "--films": "--videos",
    "--examples": "--demonstrations",
    "--replan": "--action-horizon",
}
"""How the last version called options of `EvaluateConfig`."""

_ACTING = ("samples", "noise_scale", "action_horizon")
"""Options that change a field of the method's `ActingConfig`."""


class Evaluated(NamedTuple):
    """What an evaluation found, and the file that it was written to."""

    records: list[TaskResult]
    out: Path


def check_evaluation(config: EvaluateConfig, trained: TrainConfig) -> None:
    """Refuse options with which a run of this configuration, there yet or not, cannot be evaluated.

    Raises:
        InputError: a number out of range; ways of acting or prompts that the method, or a baseline, does not have.
            Files, and what the tasks' environments or the trained network alone can tell, are not looked at.
    """
    check_config(config)
    if config.baseline is not None:
        _check_baseline(config)
    elif config.run is None:
        raise InputError("nothing to evaluate", field="RUN", found="neither a run nor --baseline", expected="one")
    for name in _ACTING:
        value = getattr(config, name)
        if value is not None and config.run is not None and not hasattr(trained.method.acting, name):
            raise InputError(
                "the method has no such way of acting",
                field=_option(name),
                found=f"{value}, of a run of {trained.method.name}",
                hint=f"leave {_option(name)} out",
            )
    check_choice(_choice(config, trained), config.run, trained)


def _check_baseline(config: EvaluateConfig) -> None:
    defaults = EvaluateConfig()
    for name in (*_ACTING, "checkpoint", "prompt_text"):
        if getattr(config, name) != getattr(defaults, name):
            raise InputError("a baseline has no use for this", field=_option(name), found=getattr(config, name))
    if config.prompts not in ("own", "swapped"):
        raise InputError(
            "a baseline follows a demonstration and reads no text",
            field="--prompts",
            found=config.prompts,
            expected="own or swapped",
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def evaluate(config: EvaluateConfig, check: Check = lambda: None) -> Evaluated:
    """Evaluate as the options say, and write the results; `check` is called now and then and may raise to stop.

    Raises:
        InputError: as `check_evaluation`; no run there, or one that another process writes the results of; prompts
            that are not there; a policy that is missing or broken.
    """
    if config.out is not None and config.out.is_dir():
        raise InputError("the results cannot be written", path=config.out, found="a folder", expected="a file name")
    check_device(config.device)
    run = None if config.run is None else RunFolder.open(config.run)
    trained = _without_a_run(config) if run is None else run.read_config()
    check_evaluation(config, trained)
    use_threads(config.threads)
    choice = _choice(config, trained)
    spec = common_spec(choice.tasks)
    steps = trained.evaluation.max_steps if config.max_steps is None else config.max_steps
    spec.check_max_steps(steps, "max_steps")
    if config.baseline is not None and not spec.has_success:
        raise InputError("baselines are for Meta-World", field="--baseline", found=spec.task, expected="its tasks")
    evaluation = EvaluationConfig(config.episodes, config.seen_episodes, steps)
    out = config.out or _default_out(config, run, trained)
    sets = prompt_sets(choice, run, trained, check)
    # The run's own results are its trainer's to write as long as that is at work.
    with run.lock() if run is not None and out == run.results else nullcontext():
        policies: dict[str, Policy] = {}
        if config.baseline is None and run is not None:
            checkpoints = ("last", "best") if config.checkpoint == "both" else (config.checkpoint,)
            policies = load_policies(run, checkpoints, _changes(config), config.device)
        records: list[TaskResult] = []
        for prompts in sets:
            if config.baseline is None:
                records += evaluate_policies(policies, evaluation, prompts, workers=config.workers, check=check)
            else:
                tasks, seed = trained.tasks, trained.seed
                records += evaluate_baseline(
                    config.baseline, evaluation, prompts, tasks, seed=seed, workers=config.workers, check=check
                )
            write_results(out, records)
        player = BASELINES[config.baseline] if config.baseline else next(iter(policies.values()))
        videos = run.videos if run is not None and out == run.results else out.with_name(f"{out.stem}-videos")
        for number, prompts in enumerate(sets if config.videos else ()):
            record_videos(
                player,
                prompts,
                videos / config.prompt_behaviours[number] if len(sets) > 1 else videos,
                max_steps=steps,
                goal_visible=trained.tasks.goal_visible,
                seen=trained.tasks.seen,
                most=None if config.tasks else trained.evaluation.video_tasks,
                checkpoint=next(iter(policies), "last"),
                check=check,
            )
    return Evaluated(records, out)


def load_policies(
    run: RunFolder, checkpoints: Sequence[str], acting: Mapping[str, object], device: str
) -> dict[str, Policy]:
    """Those of the run's checkpoints that are there, by name, with fields of their `ActingConfig` changed.

    Raises:
        InputError: none is there, or one is broken.
    """
    policies = {name: Policy.load(run.policy(name), device) for name in checkpoints if run.policy(name).exists()}
    if not policies:
        found = [name for name in ("last", "best") if run.policy(name).exists()]
        raise InputError(
            f"the run has no {' and no '.join(checkpoints)} policy",
            path=run.policy(checkpoints[0]),
            found=", ".join(found) or "no policy at all",
            hint=f"continue training with: python -m llmdpd.train --resume {run.path}" if not found else None,
        )
    return {name: policy.with_acting(**acting) if acting else policy for name, policy in policies.items()}


def evaluate_run(
    run: RunFolder,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    *,
    workers: int | None = None,
    device: str = "cpu",
    check: Check = lambda: None,
) -> None:
    """Evaluate a run's policies on every task that has prompts, and write the run's results.json.

    Raises:
        InputError: a policy that is missing or broken.
    """
    policies = load_policies(run, ("last", "best"), {}, device)
    write_results(run.results, evaluate_policies(policies, config, prompts, workers=workers, check=check))


def record_run(
    run: RunFolder,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    *,
    device: str = "cpu",
    check: Check = lambda: None,
) -> None:
    """Record videos of a run's last policy, at most as many as the configuration says, into the run's videos."""
    policy = load_policies(run, ("last",), {}, device)["last"]
    record_videos(
        policy,
        prompts,
        run.videos,
        max_steps=config.max_steps,
        goal_visible=policy.facts["goal_visible"],
        seen=policy.facts["trained_on"],
        most=config.video_tasks,
        check=check,
    )


def _without_a_run(config: EvaluateConfig) -> TrainConfig:
    """What a run's configuration would say of the tasks."""
    if config.baseline is None:
        return TrainConfig()
    if not config.tasks:
        raise InputError("no tasks to evaluate", field="--tasks", found="none", expected="Meta-World tasks, or a run")
    if config.prompt_data is None and not config.prompt_behaviours:
        raise InputError(
            "no demonstrations to follow",
            field="--prompt-data",
            found="none",
            hint="name a data set, or collect demonstrations with --prompt-behaviours clean",
        )
    tasks = tuple(dict.fromkeys(canonical_task(task) for task in config.tasks))
    return TrainConfig(tasks=TaskConfig(protocol="none", seen=(), unseen=tasks))


def _default_out(config: EvaluateConfig, run: RunFolder | None, trained: TrainConfig) -> Path:
    if run is None:
        return Path("evaluations") / f"{config.baseline}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    return run.results if _is_standard(config, run, trained) else run.new_evaluation()


def _is_standard(config: EvaluateConfig, run: RunFolder, trained: TrainConfig) -> bool:
    """Whether it is what results.json holds: the run's tasks, prompts, acting and steps, both policies, and no fewer
    episodes than are there already."""
    if config.tasks or config.prompt_data or config.prompt_text or _changes(config) or config.checkpoint != "both":
        return False
    if config.baseline or config.prompts != "own" or config.prompt_behaviours:
        return False
    if config.demonstrations not in (None, 1) or config.max_steps not in (None, trained.evaluation.max_steps):
        return False
    known = read_results(run.results) if run.results.is_file() else []
    asked = EvaluationConfig(config.episodes, config.seen_episodes)
    return all(asked.episodes_of(record.split) >= record.episodes for record in known)


def _choice(config: EvaluateConfig, trained: TrainConfig) -> PromptChoice:
    tasks = tuple(dict.fromkeys(canonical_task(task) for task in config.tasks))
    return PromptChoice(
        tasks=tasks or (*trained.tasks.seen, *trained.tasks.unseen),
        data=config.prompt_data,
        text=config.prompt_text,
        which=config.prompts,
        behaviours=tuple(dict.fromkeys(config.prompt_behaviours)),
        demonstrations=config.demonstrations,
        data_root=config.data_root,
        workers=config.workers,
        for_baseline=config.baseline is not None,
    )


def _changes(config: EvaluateConfig) -> dict[str, Any]:
    """The fields of `ActingConfig` that options change."""
    values = {name: getattr(config, name) for name in _ACTING}
    return {name: value for name, value in values.items() if value is not None}
