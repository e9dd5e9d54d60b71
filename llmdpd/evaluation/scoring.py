"""From a run's policies to its results.json and films."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from llmdpd.config.schema import PROTOCOLS, EvaluationConfig, TaskConfig
from llmdpd.errors import InputError
from llmdpd.evaluation.episodes import MakeAct, evaluate_tasks, make_films
from llmdpd.evaluation.non_learned import CONTROLS
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.results import ActingUse, PromptUse, TaskResult, write_results
from llmdpd.methods.networks import method_of
from llmdpd.policy.policy import Policy
from llmdpd.runs.folder import RunFolder, Stopwatch
from llmdpd.tasks.locomotion import is_locomotion, normalised_score
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeResult
from llmdpd.utils.plain import to_plain
from llmdpd.utils.progress import ProgressBar, console


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

    As `evaluate_policies` otherwise.
    """
    records = evaluate_policies(
        run, config, prompts, checkpoints=checkpoints, acting=acting, workers=workers, device=device, check=check
    )
    write_results(out or run.results, records)
    return records


def evaluate_policies(
    run: RunFolder,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    *,
    checkpoints: Sequence[str] = ("last", "best"),
    acting: Mapping[str, object] | None = None,
    workers: int | None = None,
    device: str = "cpu",
    check: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Evaluate a run's policies on every task that has prompts; nothing is written.

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
        goal_visible = policy.facts["goal_visible"]
        results, seconds = _roll_out(
            f"evaluating {name}",
            policy,
            goal_visible,
            _counts(config, prompts, policy.facts["trained_on"]),
            config.max_steps,
            prompts,
            workers,
            check,
        )
        protocol = protocol_of(policy.facts["protocol"], policy.facts["trained_on"], prompts)
        records += [
            _record(name, policy, protocol, config.max_steps, prompts[task], episodes, seconds)
            for task, episodes in results.items()
        ]
    return records


def evaluate_control(
    control: str,
    config: EvaluationConfig,
    prompts: Mapping[str, TaskPrompt],
    tasks: TaskConfig,
    *,
    seed: int = 0,
    workers: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[TaskResult]:
    """Evaluate what learns nothing, a name in `CONTROLS`, on the same episodes as a policy.

    Its records are of the context "control-NAME", of 0 iterations, trained on nothing; what has no meaning for it is
    named "none", 0 or 1. Protocol, split and goal are those of `tasks`, so that they stand beside a policy's of the
    same tasks.
    """
    make_act = CONTROLS[control]
    results, seconds = _roll_out(
        f"evaluating the {control}",
        make_act,
        tasks.goal_visible,
        _counts(config, prompts, tasks.seen),
        config.max_steps,
        prompts,
        workers,
        check,
    )
    return [
        TaskResult(
            task=task,
            split="seen" if task in tasks.seen else "unseen",
            protocol=protocol_of(tasks.protocol, tasks.seen, prompts),
            episodes=len(episodes),
            successes=sum(result.success for result in episodes),
            max_steps=config.max_steps,
            seed=seed,
            prompts=PromptUse(text=False, trajectory=prompts[task].example_source),
            acting=ActingUse(
                samples=1, selection="none", temperature=0.0, noise_scale=0.0, sampler="none", steps=1, precision="fp32"
            ),
            trained_on=(),
            training_data="none",
            goal_visible=tasks.goal_visible,
            checkpoint="last",
            context=f"control-{control}",
            method="none",
            iterations=0,
            wall_seconds=round(seconds * sum(result.length for result in episodes), 2),
        )
        for task, episodes in results.items()
    ]


def film_run(
    run: RunFolder,
    prompts: Mapping[str, TaskPrompt],
    max_steps: int,
    *,
    checkpoint: str = "last",
    acting: Mapping[str, object] | None = None,
    device: str = "cpu",
    folder: Path | None = None,
    most: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Film a policy, one episode a task, into `folder` (by default the run's films), or leave word why there is none.

    At most `most` tasks are filmed, those first that were not trained on.

    `acting`, `device` and `check` as in `evaluate_run`: with the same ones the first of its episodes are what is seen.
    """
    policy = Policy.load(run.policy(checkpoint), device).with_acting(**(acting or {}))
    order = sorted(prompts, key=lambda task: task in policy.facts["trained_on"])
    prompts = {task: prompts[task] for task in order[:most]}
    film(policy, prompts, max_steps, folder or run.films, policy.facts["goal_visible"], checkpoint, check)


def film(
    policy: Policy | MakeAct,
    prompts: Mapping[str, TaskPrompt],
    max_steps: int,
    folder: Path,
    goal_visible: bool,
    checkpoint: str = "last",
    check: Callable[[], None] = lambda: None,
) -> None:
    """Film a policy or a control, one episode a task, into `folder`, or leave word there why there is none."""
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
            goal_visible=goal_visible,
            max_steps=max_steps,
            checkpoint=checkpoint,
            progress=progress,
        )
    console.print(f"no films: {obstacle}" if obstacle else f"films: {folder} ({watch.seconds:.0f} s)")


def _counts(config: EvaluationConfig, tasks: Iterable[str], trained_on: Iterable[str]) -> dict[str, int]:
    """Task → episodes."""
    seen = set(trained_on)
    return {task: config.episodes_of("seen" if task in seen else "unseen") for task in tasks}


def _roll_out(
    title: str,
    policy: Policy | MakeAct,
    goal_visible: bool,
    episodes: Mapping[str, int],
    max_steps: int,
    prompts: Mapping[str, TaskPrompt],
    workers: int | None,
    check: Callable[[], None],
) -> tuple[dict[str, list[EpisodeResult]], float]:
    """The episodes of each task, and the seconds that a step took: tasks run mixed, so time is shared out by steps."""
    total = sum(episodes.values())
    watch = Stopwatch()
    with (
        EnvPool(workers, goal_visible) as pool,
        ProgressBar(title, "episodes") as bar,
    ):
        bar.update(0, total)

        def progress(done: int) -> None:
            bar.update(done, total)
            check()

        results = evaluate_tasks(policy, prompts, episodes, pool, max_steps=max_steps, progress=progress)
        for death in pool.deaths:
            console.print(f"a worker died and its episodes were redone: {death}")
    steps = sum(result.length for rolled in results.values() for result in rolled)
    return results, watch.seconds / steps


def protocol_of(name: str, trained_on: Iterable[str], evaluated: Iterable[str]) -> str:
    """The protocol's name, or "custom" for one that is well known and is not what was done.

    That is, other tasks were trained on, or one was evaluated that it does not have.
    """
    if name not in PROTOCOLS:
        return name
    known = PROTOCOLS[name]
    own = set(trained_on) == set(known.seen) and set(evaluated) <= {*known.seen, *known.unseen}
    return name if own else "custom"


def _record(
    name: str,
    policy: Policy,
    protocol: str,
    max_steps: int,
    prompt: TaskPrompt,
    episodes: Sequence[EpisodeResult],
    seconds_a_step: float,
) -> TaskResult:
    facts, context, task = policy.facts, policy.network.config.context, episodes[0].request.task
    told_by_example = bool(context.trajectory and prompt.examples)
    return TaskResult(
        task=task,
        split="seen" if task in facts["trained_on"] else "unseen",
        protocol=protocol,
        episodes=len(episodes),
        **_outcome(task, episodes),
        max_steps=max_steps,
        seed=facts["seed"],
        prompts=PromptUse(
            text=prompt.text_source if context.text and prompt.text is not None else False,
            trajectory=prompt.example_source if told_by_example else False,
        ),
        acting=_acting_use(policy, told_by_example),
        trained_on=tuple(facts["trained_on"]),
        training_data=facts["training_data"],
        goal_visible=facts["goal_visible"],
        checkpoint=name,
        context=context.kind,
        iterations=facts["iterations"],
        method=method_of(policy.network),
        wall_seconds=round(seconds_a_step * sum(result.length for result in episodes), 2),
    )


def _acting_use(policy: Policy, told_by_example: bool) -> ActingUse:
    chain: dict[str, Any] = {"steps": policy.acting.plan(policy.network.config).steps}
    if not policy.network.diffuses:
        chain = {"sampler": "none", "steps": 1}  # there is no chain to walk
    views = policy.acting.views if told_by_example else 1
    return ActingUse(**(to_plain(policy.acting) | chain | {"replan": policy.replan, "views": views}))


def _outcome(task: str, episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """The fields of `TaskResult` that say how it went: successes, or in locomotion returns and D4RL's score."""
    if not is_locomotion(task):
        return {"successes": sum(result.success for result in episodes)}
    returns = [result.episode_return for result in episodes]
    mean = fmean(returns)
    return {"returns_mean": mean, "returns_std": pstdev(returns), "normalised_score": normalised_score(task, mean)}
