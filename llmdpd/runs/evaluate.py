"""Evaluating a run: its policies, or a non-learned baseline on its tasks, with prompts of your choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from llmdpd.config.schema import TrainConfig
from llmdpd.data.task_file import use_task_file
from llmdpd.errors import InputError
from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.evaluation.non_learned import BASELINES
from llmdpd.evaluation.offline import offline_results
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.recording import record_videos
from llmdpd.evaluation.results import CHECKPOINTS, Checkpoint, TaskResult, read_results, write_results
from llmdpd.evaluation.scoring import IncompleteError, evaluate_baseline, evaluate_policies
from llmdpd.ops.native import use_threads
from llmdpd.policy.policy import Policy
from llmdpd.runs.data import offline_data
from llmdpd.runs.evaluate_options import EvaluateConfig as EvaluateConfig
from llmdpd.runs.evaluate_options import check_evaluation as check_evaluation
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.prompt_choice import prompt_sets
from llmdpd.tasks.protocols import TaskConfig
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.tasks.specs import TaskSpec, check_environments, common_spec, shown_by, task_spec
from llmdpd.tasks.user import use_no_file
from llmdpd.tasks.user.suite import Given
from llmdpd.utils import ranks
from llmdpd.utils.device import check_device

Check = Callable[[], None]
_DEFAULT = EvaluateConfig()
# Options that are about episodes in an environment, or about other demonstrations than the run's.
_ROLLED_OUT = (
    *("seen_episodes", "baseline", "prompt_data", "prompt_text", "prompts", "prompt_behaviours", "demonstrations"),
    *("max_steps", "whole_episodes", "videos"),
)


def evaluate(config: EvaluateConfig, check: Check = lambda: None) -> tuple[list[TaskResult], Path]:
    """Evaluate as the options say, and write the results; the records, and the file that they were written to.

    `check` is called now and then and may raise to stop.

    Raises:
        InputError: as `check_evaluation`; no run there, or one that another process writes the results of; prompts
            that are not there; a policy that is missing or broken.
    """
    if config.out is not None and config.out.is_dir():
        raise InputError("the results cannot be written", path=config.out, found="a folder", expected="a file name")
    check_device(config.device)
    run = None if config.run is None else RunFolder.open(config.run)
    if config.tasks_file is not None:
        use_task_file(config.tasks_file, given=Given(demonstrations=config.prompt_data))
    elif run is None:
        use_no_file()
    trained = _without_a_run(config) if run is None else run.read_config()
    if run is not None and config.tasks_file is None:
        run.use_tasks(trained, unchanged=False)
    check_evaluation(config, trained)
    use_threads(config.threads)
    if run is not None and config.tasks_file is None and trained.evaluation_mode != "rollout":
        return _evaluate_offline(config, run, trained, check)
    spec = common_spec(config.tasks_of(trained))
    check_environments(config.tasks_of(trained))
    steps = trained.evaluation.max_steps if config.max_steps is None else config.max_steps
    for task in config.tasks_of(trained):
        task_spec(task).check_max_steps(steps, "max_steps")
    evaluation = EvaluationConfig(config.episodes, config.seen_episodes, steps)
    out = config.out or _default_out(config, run, trained)
    sets = prompt_sets(config, run, trained, check)
    # The run's own results are its trainer's to write as long as that is at work.
    with run.lock() if run is not None and out == run.results else nullcontext():
        policies: dict[Checkpoint, Policy] = {}
        if config.baseline is None and run is not None:
            checkpoints = CHECKPOINTS if config.checkpoint == "both" else (config.checkpoint,)
            heed = any(shown_by(task) != task for task in config.tasks_of(trained))
            policies = load_policies(run, checkpoints, config.acting, config.device, heed)
            _check_widths(policies, spec)
        records: list[TaskResult] = []
        how: dict[str, Any] = {"whole": config.whole_episodes, "workers": config.workers, "check": check}
        for prompts in sets:
            with _kept(out, records):
                if config.baseline is None:
                    records += evaluate_policies(policies, evaluation, prompts, **how)
                else:
                    tasks, seed = trained.tasks, trained.seed
                    records += evaluate_baseline(config.baseline, evaluation, prompts, tasks, seed=seed, **how)
            write_results(out, records)
        player = BASELINES[config.baseline] if config.baseline else next(iter(policies.values()))
        videos = run.videos if run is not None and out == run.results else out.with_name(f"{out.stem}-videos")
        behaviours = dict.fromkeys(config.prompt_behaviours) if len(sets) > 1 else ("",)
        for behaviour, prompts in zip(behaviours, sets, strict=True) if config.videos else ():
            record_videos(
                player,
                prompts,
                videos / behaviour,
                max_steps=steps,
                goal_visible=trained.tasks.goal_visible,
                seen=trained.tasks.seen,
                most=None if config.tasks else trained.evaluation.video_tasks,
                checkpoint=next(iter(policies), "last"),
                check=check,
            )
    return records, out


@contextmanager
def _kept(out: Path, before: Sequence[TaskResult] = ()) -> Iterator[None]:
    """Keep what an evaluation that fails has finished beside its results, until one succeeds.

    Raises:
        WorkerError: workers died of episodes; it says where the rest is.
    """
    kept = out.with_name(f"{out.stem}-incomplete.json")
    try:
        yield
    except IncompleteError as error:
        records = [*before, *error.records]
        ranks.first(lambda: write_results(kept, records))
        tasks = ", ".join(dict.fromkeys(record.task for record in records)) or "no task"
        raise WorkerError(f"{error}\n  Results of {tasks} are kept in {kept}") from None
    ranks.first(lambda: kept.unlink(missing_ok=True))


def _evaluate_offline(
    config: EvaluateConfig, run: RunFolder, trained: TrainConfig, check: Check
) -> tuple[list[TaskResult], Path]:
    """`evaluate` of a run whose tasks have no environment, or that was not to be rolled out."""
    given = [f"--{name.replace('_', '-')}" for name in _ROLLED_OUT if getattr(config, name) != getattr(_DEFAULT, name)]
    if given:
        raise InputError(
            "this run is evaluated on recorded episodes: nothing is rolled out",
            path=run.path,
            field=given[0],
            expected="--checkpoint, --tasks, --device, --out and ways of acting alone",
        )
    (prompts,) = prompt_sets(config, run, trained, check)
    reads = trained.method.network.context_config().trajectory
    held_out = offline_data(trained.data, trained.tasks, reads, check).held_out
    standard = not config.tasks and not config.acting and config.checkpoint == "both"
    out = config.out or (run.results if standard else run.new_evaluation())
    checkpoints = CHECKPOINTS if config.checkpoint == "both" else (config.checkpoint,)
    with run.lock() if out == run.results else nullcontext():
        policies = load_policies(run, checkpoints, config.acting, config.device)
        records = offline_results(policies, prompts, held_out, check)
        write_results(out, records)
    return records, out


def load_policies(
    run: RunFolder, checkpoints: Sequence[Checkpoint], acting: Mapping[str, object], device: str, heed: bool = False
) -> dict[Checkpoint, Policy]:
    """Those of the run's checkpoints that are there, by name, with fields of their `ActingConfig` changed.

    `heed`: of tasks whose texts say something else than their demonstrations, as `Policy.heeding_texts`.

    Raises:
        InputError: none is there, or one is broken.
    """
    policies = {name: Policy.load(run.policy(name), device) for name in checkpoints if run.policy(name).exists()}
    if not policies:
        found = [name for name in CHECKPOINTS if run.policy(name).exists()]
        raise InputError(
            f"the run has no {' and no '.join(checkpoints)} policy",
            path=run.policy(checkpoints[0]),
            found=", ".join(found) or "no policy at all",
            hint=f"continue training with: python -m llmdpd.train --resume {run.path}" if not found else None,
        )
    if heed:
        policies = {name: policy.heeding_texts() for name, policy in policies.items()}
    return {name: policy.with_acting(**acting) if acting else policy for name, policy in policies.items()}


def _check_widths(policies: Mapping[Checkpoint, Policy], spec: TaskSpec) -> None:
    """Raise `InputError` for tasks of other observations or actions than those that a policy was trained on."""
    for policy in policies.values():
        sizes = (policy.network.spaces.observed_dim, policy.network.action_dim)
        if sizes != (spec.state_dim, spec.action_dim):
            found = f"{spec.task}: {spec.state_dim} state and {spec.action_dim} action numbers"
            expected = f"{sizes[0]} and {sizes[1]}, as the policy has"
            raise InputError("tasks that the policy cannot serve", field="--tasks", found=found, expected=expected)


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
    policies = load_policies(run, CHECKPOINTS, {}, device)
    with _kept(run.results):
        records = evaluate_policies(policies, config, prompts, workers=workers, check=check)
    ranks.first(lambda: write_results(run.results, records))


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
        goal_visible=policy.metadata["goal_visible"],
        seen=policy.metadata["trained_on"],
        most=config.video_tasks,
        check=check,
    )


def _without_a_run(config: EvaluateConfig) -> TrainConfig:
    """What a run's configuration would say of the tasks."""
    if config.baseline is None:
        return TrainConfig()
    if not (config.tasks or config.tasks_file):
        raise InputError("no tasks to evaluate", field="--tasks", found="none", expected="tasks, or a run")
    if not (config.prompt_data or config.prompt_behaviours or config.tasks_file):
        hint = "name a data set, or collect demonstrations with --prompt-behaviours clean"
        raise InputError("no demonstrations to follow", field="--prompt-data", found="none", hint=hint)
    tasks = TaskConfig(protocol="none", seen=(), unseen=config.tasks_of(TrainConfig()))
    return TrainConfig(tasks=tasks)


def _default_out(config: EvaluateConfig, run: RunFolder | None, trained: TrainConfig) -> Path:
    if run is None:
        return Path("evaluations") / f"{config.baseline}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    return run.results if _is_standard(config, run, trained) else run.new_evaluation()


def _is_standard(config: EvaluateConfig, run: RunFolder, trained: TrainConfig) -> bool:
    """Whether it is what results.json holds: the run's tasks, prompts, acting and steps, both policies, and no fewer
    episodes than are there already."""
    if (
        config.tasks
        or config.tasks_file
        or config.prompt_data
        or config.prompt_text
        or config.acting
        or config.checkpoint != "both"
    ):
        return False
    if config.baseline or config.prompts != "own" or config.prompt_behaviours or config.together:
        return False
    if config.whole_episodes:
        return False
    if config.demonstrations not in (None, 1) or config.max_steps not in (None, trained.evaluation.max_steps):
        return False
    known = read_results(run.results) if run.results.is_file() else []
    asked = EvaluationConfig(config.episodes, config.seen_episodes)
    return all(asked.episodes_of(record.split) >= record.episodes for record in known)
