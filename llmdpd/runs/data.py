"""The data of a run: what it trains on, the examples of its evaluation, the embedded texts."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from llmdpd.collection import CollectConfig, Collected, collect_metaworld
from llmdpd.config import TrainConfig
from llmdpd.data import TrajectoryDataset, load_dataset
from llmdpd.errors import InputError
from llmdpd.progress import ProgressBar, console
from llmdpd.prompts import LLMEncoder, metaworld_prompt
from llmdpd.runs.folder import Stopwatch

STATE_DIM, ACTION_DIM = 39, 4
# The examples of the evaluation are collected apart from the training data, with other goals.
_EXAMPLE_SEED = 500_000


def training_data(config: TrainConfig) -> tuple[TrajectoryDataset, str]:
    """The seen tasks' data, collected if no path is given, and what it is in words.

    Raises:
        InputError: data that lacks a task, has another shape than the environment, or no labels to clone.
    """
    data, tasks = config.data, config.tasks
    if data.path is not None:
        dataset = load_dataset(data.path, tasks=tasks.seen)
        words = f"{data.path}, {dataset.num_episodes} episodes"
    else:
        collected = _collect(config, tasks.seen, data.episodes, data.noise, data.seed, "training")
        dataset = collected.dataset.select_tasks(tasks.seen)
        words = f"scripted experts, {data.episodes} episodes a task, noise {data.noise}"
    dataset.check_matches(STATE_DIM, ACTION_DIM, "Meta-World")
    if dataset.goal_visible not in (None, tasks.goal_visible):
        raise InputError(
            "data and evaluation differ in whether the goal is visible",
            path=dataset.source,
            field="tasks.goal_visible",
            found=f"data: {dataset.goal_visible}",
            expected=tasks.goal_visible,
        )
    if not data.keep_failed:
        failed = dataset.successes == 0
        if failed.all():
            raise InputError("every episode of the data failed", path=dataset.source, hint="use --data.keep-failed")
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


def example_data(config: TrainConfig) -> TrajectoryDataset:
    """The examples that the evaluation's trajectory prompts are taken from, seen and unseen tasks alike."""
    tasks = (*config.tasks.seen, *config.tasks.unseen)
    if config.data.prompts is not None:
        return load_dataset(config.data.prompts, tasks=tasks)
    seed = config.data.seed + _EXAMPLE_SEED
    return _collect(config, tasks, config.data.prompt_episodes, "clean", seed, "examples").dataset.select_tasks(tasks)


def embed_tasks(config: TrainConfig, tasks: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], int]:
    """The LLM's embedding of each task's rendered text, by text, and its size D; nothing where text is off."""
    if not config.policy.context.text:
        return {}, 0
    encoder = LLMEncoder(config.llm, device=config.device)
    texts = [metaworld_prompt(task).render() for task in tasks]
    return dict(zip(texts, encoder.encode(texts), strict=True)), encoder.dim


def _collect(config: TrainConfig, tasks: tuple[str, ...], episodes: int, noise: str, seed: int, kind: str) -> Collected:
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
    wanted = CollectConfig(**{**vars(wanted), "out": Path(config.data.root) / "metaworld" / name})
    watch = Stopwatch()
    with ProgressBar(f"collecting {kind} data", len(tasks) * episodes, "episodes") as bar:
        collected = collect_metaworld(wanted, lambda done, total, steps: bar.update(done, f"{steps} steps"))
    dataset = collected.dataset
    success = float(np.mean(dataset.successes == 1))
    console.print(
        f"{kind} data: {dataset.num_episodes} episodes, {dataset.num_transitions} transitions, {success:.0%} succeeded"
        f"; {wanted.out} ({watch.seconds:.0f} s)"
    )
    return collected
