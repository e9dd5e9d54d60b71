"""The data of a run: what it trains on, the examples of its evaluation, the embedded texts."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmdpd.collection import CollectConfig, Collected, collect_metaworld
from llmdpd.config import TrainConfig
from llmdpd.data import TrajectoryDataset, load_dataset
from llmdpd.envs import is_metaworld
from llmdpd.errors import InputError
from llmdpd.progress import ProgressBar, console
from llmdpd.prompts import LLMEncoder, metaworld_prompt
from llmdpd.prompts.models import LLMIdentity
from llmdpd.runs.folder import Stopwatch

STATE_DIM, ACTION_DIM = 39, 4
Check = Callable[[], None]
# The examples of the evaluation are collected apart from the training data, with other goals.
_EXAMPLE_SEED = 500_000


def load_tasks(spec: str | Path, tasks: Sequence[str], goal_visible: bool) -> TrajectoryDataset:
    """Data of these Meta-World tasks from whatever `spec` names; its `tasks` are exactly those asked for.

    A file with one task that it has no name for (a plain HDF5 file is called by its own name) is taken for the task
    where one is asked for.

    Raises:
        InputError: a task that is not there, another shape than the environment's, a goal that is hidden in the data
            and visible in evaluation or the other way round; and as `load_dataset`.
    """
    try:
        dataset = load_dataset(spec, tasks=tasks)
    except InputError as error:
        whole = load_dataset(spec) if error.field == "task" else None
        if whole is None or len(whole.tasks) > 1 or is_metaworld(whole.tasks[0]):
            raise
        if len(tasks) > 1:
            raise InputError(
                "the data has no task name, and several tasks are asked for",
                path=whole.source,
                field="task",
                found=f"{whole.tasks[0]!r}, which is no Meta-World task",
                expected=", ".join(tasks),
                hint=f"name the file {tasks[0]}{Path(whole.source).suffix}, or ask for one task alone",
            ) from None
        dataset = whole
    dataset = dataclasses.replace(dataset, tasks=tuple(tasks))
    dataset.check_matches(STATE_DIM, ACTION_DIM, "Meta-World")
    if dataset.goal_visible not in (None, goal_visible):
        raise InputError(
            "data and evaluation differ in whether the goal is visible",
            path=dataset.source,
            field="tasks.goal_visible",
            found=f"data: {dataset.goal_visible}",
            expected=goal_visible,
        )
    return dataset


def training_data(config: TrainConfig, check: Check = lambda: None) -> tuple[TrajectoryDataset, str]:
    """The seen tasks' data, collected if no path is given, and what it is in words.

    `check` is called as episodes are collected and may raise to stop.

    Raises:
        InputError: data that lacks a task, has another shape than the environment, or no labels to clone.
    """
    data, tasks = config.data, config.tasks
    if data.path is not None:
        dataset = load_tasks(data.path, tasks.seen, tasks.goal_visible)
        words = f"{data.path}, {dataset.num_episodes} episodes"
    else:
        collected = _collect(config, tasks.seen, data.episodes, data.noise, data.seed, "training", check)
        dataset = collected.dataset.select_tasks(tasks.seen)
        words = f"scripted experts, {data.episodes} episodes a task, noise {data.noise}"
    if not data.keep_failed:
        failed = dataset.successes == 0
        for task in dataset.tasks:
            if failed[dataset.episodes_of(task)].all():
                raise InputError(
                    "every episode of a task failed",
                    path=dataset.source,
                    field=task,
                    found=f"{len(dataset.episodes_of(task))} failed episodes",
                    expected="at least one that did not",
                )
        if failed.any():
            console.print(f"{int(failed.sum())} of {len(failed)} episodes failed and are left out")
            dataset = dataset.select(~failed)
            words += ", failed ones left out"
    if config.agent.clone == "expert" and dataset.expert_actions is None:
        raise InputError(
            "the data has no expert actions to clone",
            path=dataset.source,
            field="agent.clone",
            found="expert",
            expected="executed",
            hint="use --agent.clone executed",
        )
    return dataset, words + f"; clones the {config.agent.clone} actions"


def example_data(config: TrainConfig, check: Check = lambda: None) -> TrajectoryDataset:
    """The examples that the evaluation's trajectory prompts are taken from, seen and unseen tasks alike."""
    tasks = (*config.tasks.seen, *config.tasks.unseen)
    if config.data.prompts is not None:
        return load_tasks(config.data.prompts, tasks, config.tasks.goal_visible)
    seed = config.data.seed + _EXAMPLE_SEED
    collected = _collect(config, tasks, config.data.prompt_episodes, "clean", seed, "example", check)
    return collected.dataset.select_tasks(tasks)


@dataclass(frozen=True)
class Embeddings:
    """The LLM's embeddings [D] of rendered texts, their size D, and what made them; empty where text is off."""

    vectors: dict[str, torch.Tensor]
    width: int
    llm: LLMIdentity | None


def embed_tasks(config: TrainConfig, tasks: tuple[str, ...]) -> Embeddings:
    """The LLM's embedding of each task's rendered text; nothing where text is off."""
    if not config.policy.context.text:
        return Embeddings({}, 0, None)
    encoder = LLMEncoder(config.llm, device=config.device)
    texts = [metaworld_prompt(task).render() for task in tasks]
    return Embeddings(dict(zip(texts, encoder.encode(texts), strict=True)), encoder.dim, encoder.identity)


def _collect(
    config: TrainConfig, tasks: tuple[str, ...], episodes: int, noise: str, seed: int, kind: str, check: Check
) -> Collected:
    wanted = CollectConfig(
        tasks=tasks,
        episodes=episodes,
        noise=noise,
        seed=seed,
        workers=config.data.workers,
        goal_visible=config.tasks.goal_visible,
    )
    # Another collection gets another folder; the same one finds its own again.
    parts = repr((tasks, noise, wanted.goal_visible, wanted.tail, wanted.max_steps)).encode()
    name = f"{kind}-{len(tasks)}tasks-{episodes}episodes-seed{seed}-{zlib.crc32(parts):08x}"
    wanted = CollectConfig(**{**vars(wanted), "out": Path(config.data.root) / name})
    watch = Stopwatch()
    with ProgressBar(f"collecting {kind} data", "episodes") as bar:

        def progress(done: int, total: int, steps: int) -> None:
            bar.update(done, total, f"{steps:,} steps")
            check()

        collected = collect_metaworld(wanted, progress)
    dataset = collected.dataset
    success = float(np.mean(dataset.successes == 1))
    console.print(
        f"{kind} data: {dataset.num_episodes} episodes, {dataset.num_transitions} transitions, {success:.0%} succeeded"
        f"; {wanted.out} ({watch.seconds:.0f} s)"
    )
    return collected
