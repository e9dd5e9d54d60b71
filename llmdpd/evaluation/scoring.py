"""From policies, or a non-learned baseline, to records of how they did."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.evaluation.episodes import MakeAct, UnfinishedError, evaluate_tasks
from llmdpd.evaluation.non_learned import BASELINES
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.results import ActingUse, Checkpoint, PromptUse, TaskResult
from llmdpd.policy.policy import Policy
from llmdpd.tasks.protocols import PROTOCOLS, TaskConfig
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeResult
from llmdpd.tasks.specs import suite_of, task_spec
from llmdpd.utils.progress import ProgressBar, Stopwatch, console

_WARM_UP, _TIMED = 10, 100
_TRACKED_TASKS = 5  # of which a line says in how many episodes the tracker took over


class IncompleteError(WorkerError):
    """An evaluation that could not be finished; `records` are those of the tasks all of whose episodes ended."""

    def __init__(self, message: str, records: list[TaskResult]) -> None:
        super().__init__(message)
        self.records = records


def evaluate_policies(
    policies: Mapping[Checkpoint, Policy],
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    *,
    whole: bool = False,
    workers: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Evaluate policies, by the name of their checkpoint, on every task that has prompts; nothing is written.

    `whole` episodes go on after the success, and returns are recorded beside successes. `check` is called as episodes
    end and may raise to stop.

    Raises:
        IncompleteError: episodes that workers died of.
    """
    records: list[TaskResult] = []
    for name, policy in policies.items():
        metadata = policy.metadata
        twin = next((record for record in records if record.iterations == metadata["iterations"]), None)
        if twin is not None:
            # The same networks on the same seeds: the episodes would be the same, bit for bit.
            console.print(f"{name} is the checkpoint of the same iteration as {twin.checkpoint}: same results")
            records += [dataclasses.replace(record, checkpoint=name) for record in records]
            continue
        tasks = TaskConfig(metadata["protocol"], tuple(metadata["trained_on"]), (), metadata["goal_visible"])
        title = f"evaluating {name}"
        scored, lost = _score(title, policy, config, prompts, tasks, whole, workers, check)
        for task, episodes, common in scored:
            outcome = _outcome(task, episodes, config.max_steps, whole)
            records.append(policy_record(policy, name, prompts[task], **common, **outcome))
        if lost:
            raise IncompleteError(lost, records)
        _say_what_was_tracked([record for record in records if record.checkpoint == name and record.tracked])
    return records


def _say_what_was_tracked(records: Sequence[TaskResult]) -> None:
    """Print in how many episodes of which tasks the tracker took over, most first."""
    most = sorted(records, key=lambda record: -record.tracked)
    parts = [f"{r.tracked} of {r.episodes} of {r.task}, {r.tracked_successes} succeeded" for r in most[:_TRACKED_TASKS]]
    if len(most) > _TRACKED_TASKS:
        rest = most[_TRACKED_TASKS:]
        parts.append(f"{sum(record.tracked for record in rest)} of {len(rest)} other tasks")
    if parts:
        console.print(f"episodes that the tracker took over: {'; '.join(parts)}", markup=False, soft_wrap=True)


def policy_record(
    policy: Policy, checkpoint: Checkpoint, prompt: TaskPrompt, *, hands_over: bool = True, **measured: Any
) -> TaskResult:
    """The record of a task evaluated with a policy under a prompt.

    `hands_over`: as of `policy_act`. `measured`: the fields that neither policy nor prompt says.
    """
    context, metadata = policy.network.reads, policy.metadata
    acting = policy.acting.describe(policy.network.config)
    if not (hands_over and prompt.demonstrations):
        acting.pop("track_after", None)
    start = metadata.get("init")
    text = context.text and prompt.text is not None and prompt.text_source
    trajectory = bool(context.trajectory and prompt.demonstrations) and prompt.demonstration_source
    return TaskResult(
        **measured,
        **{field: metadata[field] for field in ("seed", "training_data", "iterations")},
        prompts=PromptUse(text, trajectory),
        acting=ActingUse(**acting),
        trained_on=tuple(metadata["trained_on"]),
        checkpoint=checkpoint,
        context=context.kind,
        method=policy.method,
        started_from="" if start is None else f"{start['source']} (SHA-256 {start['sha256']})",
    )


def evaluate_baseline(
    name: str,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    tasks: TaskConfig,
    *,
    seed: int = 0,
    whole: bool = False,
    workers: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Evaluate a non-learned baseline, a name in `BASELINES`, on the same episodes as a policy.

    Its records have the context "non-learned-NAME", 0 iterations, and no training tasks; what has no meaning for it is
    "none", 0 or 1. Protocol, split and goal are those of `tasks`, so that they can be compared with a policy's on the
    same tasks.

    Raises:
        IncompleteError: episodes that workers died of.
    """
    acting = ActingUse(samples=1, selection="none", temperature=0.0, noise_scale=0.0, sampler="none", steps=1)
    title = f"evaluating the {name} baseline"
    scored, lost = _score(title, BASELINES[name], config, prompts, tasks, whole, workers, check)
    records = [
        TaskResult(
            **common,
            **_outcome(task, episodes, config.max_steps, whole),
            seed=seed,
            prompts=PromptUse(text=False, trajectory=prompts[task].demonstration_source),
            acting=acting,
            trained_on=(),
            training_data="none",
            checkpoint="last",
            context=f"non-learned-{name}",
            method="none",
            iterations=0,
        )
        for task, episodes, common in scored
    ]
    if lost:
        raise IncompleteError(lost, records)
    return records


def _score(
    title: str,
    policy: Policy | MakeAct,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    tasks: TaskConfig,
    whole: bool,
    workers: int | None,
    check: Callable[[], None],
) -> tuple[list[tuple[str, list[EpisodeResult], dict[str, Any]]], str | None]:
    """Each task, its episodes, and the fields of `TaskResult` that policies and baselines have alike.

    Where workers died of episodes, only the tasks that have all of theirs, and beside them what is to be told of it.
    Tasks run mixed, so the wall time is shared out by steps.
    """
    splits = {task: "seen" if task in tasks.seen else "unseen" for task in prompts}
    counts = {task: config.episodes_of(split) for task, split in splits.items()}
    total = sum(counts.values())
    watch = Stopwatch()
    with EnvPool(workers, tasks.goal_visible) as pool, ProgressBar(title, "episodes") as bar:
        bar.update(0, total)

        def progress(done: int) -> None:
            bar.update(done, total)
            check()

        lost = None
        try:
            steps = config.max_steps
            results = evaluate_tasks(policy, prompts, counts, pool, max_steps=steps, whole=whole, progress=progress)
        except UnfinishedError as error:
            results, lost = error.results, str(error)
        for death in pool.deaths:
            console.print(f"a worker died and its episodes were redone: {death}")
    taken = {task: sum(result.length for result in episodes) for task, episodes in results.items()}
    seconds_a_step = watch.seconds / max(1, sum(taken.values()))
    protocol = protocol_of(tasks.protocol, tasks.seen, prompts)
    scored = []
    for task, episodes in results.items():
        common = {
            **{"task": task, "split": splits[task], "protocol": protocol, "episodes": len(episodes)},
            "max_steps": task_spec(task).steps(config.max_steps),
            "goal_visible": tasks.goal_visible if suite_of(task).hides_goal else None,
            "wall_seconds": round(seconds_a_step * taken[task], 2),
        }
        scored.append((task, episodes, common))
    return scored, lost


def protocol_of(name: str, trained_on: Iterable[str], evaluated: Iterable[str]) -> str:
    """The protocol's name, or "custom" where it is one of `PROTOCOLS` and was not followed.

    That is, other tasks were trained on, or one was evaluated that it does not have.
    """
    if name not in PROTOCOLS:
        return name
    known = PROTOCOLS[name]
    own = set(trained_on) == set(known.seen) and set(evaluated) <= {*known.seen, *known.unseen}
    return name if own else "custom"


def selection_score(results: Mapping[str, Sequence[EpisodeResult]]) -> tuple[dict[str, float], float]:
    """What a selection during training records, and the score that the best checkpoint is chosen by.

    The mean over the tasks of success; where there is none, of the normalised score, or of the return without one.
    """
    outcomes = {task: _outcome(task, episodes) for task, episodes in results.items()}
    suffix = "" if "successes" in next(iter(outcomes.values())) else "_score"
    scores = {
        task: _return_score(outcome) if suffix else outcome["successes"] / len(results[task])
        for task, outcome in outcomes.items()
    }
    score = sum(scores.values()) / len(scores)
    mean = "seen_score" if suffix else "seen_success"
    return {f"eval/{mean}": score, **{f"eval/{task}{suffix}": value for task, value in scores.items()}}, score


def _outcome(
    task: str, episodes: Sequence[EpisodeResult], max_steps: int | None = None, whole: bool = False
) -> dict[str, Any]:
    """The fields of `TaskResult` that say how it went: successes; returns and their score of whole episodes."""
    succeeds = task_spec(task).has_success
    outcome: dict[str, Any] = {"tracked": sum(result.tracked for result in episodes)}
    if succeeds:
        outcome["successes"] = sum(result.success for result in episodes)
        outcome["tracked_successes"] = sum(result.tracked and result.success for result in episodes)
    if succeeds and not whole:
        return outcome  # a return up to the success says nothing
    returns = [result.episode_return for result in episodes]
    mean = fmean(returns)
    score = suite_of(task).normalised_score(task, mean, task_spec(task).steps(max_steps))
    return {**outcome, "returns_mean": mean, "returns_std": pstdev(returns), "normalised_score": score}


def _return_score(outcome: Mapping[str, Any]) -> float:
    score = outcome["normalised_score"]
    return float(outcome["returns_mean"] if score is None else score)


def acting_cost(policy: Policy, prompt: TaskPrompt, observations: NDArray[np.float32]) -> dict[str, Any]:
    """Parameters of what acts (critics too, where they choose), and milliseconds an action on this machine.

    The time is the median of 100 calls, one state at a time, after the prompt was encoded; for a policy with action
    chunks, of 100 chunks, each divided by its action horizon.

    observations [N, S]: states to act in, taken in turn.
    """
    context = policy.network.reads
    policy.prompt(prompt.text if context.text else None, prompt.demonstration if context.trajectory else None)
    seconds = []
    for number in range(_WARM_UP + _TIMED):
        begin = time.perf_counter()
        for _ in range(policy.action_horizon):
            policy.act(observations[number % len(observations)])
        seconds.append((time.perf_counter() - begin) / policy.action_horizon)
    parts = [policy.network, *([policy.critic] if policy.critic is not None and policy.chooses else [])]
    return {
        "parameters": sum(parameter.numel() for part in parts for parameter in part.parameters()),
        "milliseconds_an_action": round(1e3 * median(seconds[_WARM_UP:]), 4),
    }
