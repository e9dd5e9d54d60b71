"""From a run's policies to its results.json and films."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from llmdpd.config import EvaluationConfig, TaskConfig
from llmdpd.config_io import to_plain
from llmdpd.envs import ML45_TEST, ML45_TRAIN
from llmdpd.envs.rollout import EnvPool, EpisodeResult
from llmdpd.errors import InputError
from llmdpd.policy import Policy
from llmdpd.progress import ProgressBar, console
from llmdpd.results import ActingUse, PromptUse, TaskResult, write_results
from llmdpd.runs.evaluation import evaluate_tasks, make_films
from llmdpd.runs.folder import RunFolder, Stopwatch
from llmdpd.runs.prompts import TaskPrompt

PROTOCOLS = {"paper": (TaskConfig().seen, TaskConfig().unseen), "ml45": (ML45_TRAIN, ML45_TEST)}
"""Protocols that others know by these names: tasks that are trained on, tasks that are held out."""


def evaluate_run(
    run: RunFolder,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    *,
    checkpoints: Sequence[str] = ("last", "best"),
    acting: Mapping[str, object] | None = None,
    workers: int | None = None,
    device: str = "cpu",
    out: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Evaluate a run's policies on every task that has prompts, and write `out` (by default the run's results.json).

    `acting` changes fields of `ActingConfig`; `check` is called as episodes end and may raise to stop.

    Raises:
        InputError: a policy that is missing or broken.
    """
    policies = {name: Policy.load(run.policy(name), device) for name in checkpoints if run.policy(name).exists()}
    if not policies:
        found = [name for name in ("last", "best") if run.policy(name).exists()]
        raise InputError(
            f"the run has no {' and no '.join(checkpoints)} policy",
            path=run.policy(checkpoints[0]),
            found=", ".join(found) or "no policy at all",
            hint=f"go on training with: python -m llmdpd.train --resume {run.path}" if not found else None,
        )
    records: list[TaskResult] = []
    for name, policy in policies.items():
        twin = next((r for r in records if r.iterations == policy.facts["iterations"]), None)
        if twin is not None:
            # The same networks on the same seeds: the episodes would be the same, bit for bit.
            console.print(f"{name} is the checkpoint of the same iteration as {twin.checkpoint}: same results")
            records += [dataclasses.replace(record, checkpoint=name) for record in records]
            continue
        if acting:
            policy = policy.with_acting(**acting)
        records += _evaluate(name, policy, config, prompts, workers, check)
    write_results(out or run.results, records)
    return records


def film_run(
    run: RunFolder,
    prompts: Mapping[str, TaskPrompt],
    max_steps: int,
    *,
    checkpoint: str = "last",
    acting: Mapping[str, object] | None = None,
    device: str = "cpu",
    folder: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Film a policy, one episode a task, into `folder` (by default the run's films), or leave word why there is none.

    `acting`, `device` and `check` as in `evaluate_run`: with the same ones the first of its episodes are what is seen.
    """
    policy = Policy.load(run.policy(checkpoint), device).with_acting(**(acting or {}))
    folder = folder or run.films
    watch = Stopwatch()
    with ProgressBar("filming", "episodes") as bar:
        bar.update(0, len(prompts))

        def progress(done: int) -> None:
            bar.update(done, len(prompts))
            check()

        obstacle = make_films(
            policy,
            prompts,
            folder,
            goal_visible=policy.facts["goal_visible"],
            max_steps=max_steps,
            checkpoint=checkpoint,
            progress=progress,
        )
    console.print(f"no films: {obstacle}" if obstacle else f"films: {folder} ({watch.seconds:.0f} s)")


def _evaluate(
    name: str,
    policy: Policy,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    workers: int | None,
    check: Callable[[], None],
) -> list[TaskResult]:
    total = config.episodes * len(prompts)
    watch = Stopwatch()
    with (
        EnvPool(workers, policy.facts["goal_visible"]) as pool,
        ProgressBar(f"evaluating {name}", "episodes") as bar,
    ):
        bar.update(0, total)

        def progress(done: int) -> None:
            bar.update(done, total)
            check()

        results = evaluate_tasks(policy, prompts, config.episodes, pool, max_steps=config.max_steps, progress=progress)
        for death in pool.deaths:
            console.print(f"a worker died and its episodes were redone: {death}")
    steps = sum(result.length for episodes in results.values() for result in episodes)
    protocol = protocol_of(policy.facts["protocol"], policy.facts["trained_on"], prompts)
    return [
        _record(name, policy, protocol, config.max_steps, prompts[task], episodes, watch.seconds / steps)
        for task, episodes in results.items()
    ]


def protocol_of(name: str, trained_on: Iterable[str], evaluated: Iterable[str]) -> str:
    """The protocol's name, or "custom" for one that is well known and is not what was done.

    That is, other tasks were trained on, or one was evaluated that it does not have.
    """
    if name not in PROTOCOLS:
        return name
    seen, unseen = PROTOCOLS[name]
    return name if set(trained_on) == set(seen) and set(evaluated) <= {*seen, *unseen} else "custom"


def _record(
    name: str,
    policy: Policy,
    protocol: str,
    max_steps: int,
    prompt: TaskPrompt,
    episodes: Sequence[EpisodeResult],
    seconds_a_step: float,
) -> TaskResult:
    facts, config, acting = policy.facts, policy.network.config, policy.acting
    context, task = config.context, episodes[0].request.task
    return TaskResult(
        task=task,
        split="seen" if task in facts["trained_on"] else "unseen",
        protocol=protocol,
        episodes=len(episodes),
        successes=sum(result.success for result in episodes),
        max_steps=max_steps,
        seed=facts["seed"],
        prompts=PromptUse(
            text=prompt.text_source if context.text else False,
            trajectory=prompt.example_source if context.trajectory and prompt.example is not None else False,
        ),
        acting=ActingUse(**(to_plain(acting) | {"steps": acting.plan(config).steps})),
        trained_on=tuple(facts["trained_on"]),
        training_data=facts["training_data"],
        goal_visible=facts["goal_visible"],
        checkpoint=name,
        context=context.kind,
        iterations=facts["iterations"],
        # Tasks run mixed; the time is shared out by steps.
        wall_seconds=round(seconds_a_step * sum(result.length for result in episodes), 2),
    )
