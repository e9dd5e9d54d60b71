"""The data of a run: what it trains on, the examples of its evaluation, the embedded texts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmdpd.config.schema import DataConfig, TrainConfig
from llmdpd.data import TrajectoryDataset, join_datasets
from llmdpd.data.collecting.replay import SacConfig, collect_sac
from llmdpd.data.collecting.scripted import CollectConfig, Collected, collect_metaworld
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.prompts import LLMEncoder, task_prompt
from llmdpd.prompts.models import LLMIdentity
from llmdpd.runs.folder import Stopwatch
from llmdpd.tasks.locomotion import is_locomotion
from llmdpd.utils.progress import ProgressBar, console

Check = Callable[[], None]
# The examples of the evaluation are collected apart from the training data, with other goals.
_EXAMPLE_SEED = 500_000
# The worst behaviours still succeed in every third episode of most tasks.
_EPISODES_AN_EXAMPLE = 3


def training_data(config: TrainConfig, check: Check = lambda: None) -> tuple[TrajectoryDataset, str]:
    """The seen tasks' data, collected if no path is given, and what it is in words.

    `check` is called as episodes are collected and may raise to stop.

    Raises:
        InputError: data that lacks a task, has another shape than the environment, or no labels to clone.
    """
    data, tasks = config.data, config.tasks
    if data.path is not None:
        dataset = load_tasks(data.path, tasks.seen, tasks.goal_visible)
        words = f"{data.path}{_collector(data.path)}, {dataset.num_episodes} episodes"
    elif is_locomotion(tasks.seen[0]):
        dataset, words = _sac_data(config, tasks.seen, check)
    else:
        collected = _collect(config, tasks.seen, data.episodes, data.noise, data.seed, "training", check)
        dataset = collected.dataset.select_tasks(tasks.seen)
        words = f"scripted experts, {data.episodes} episodes a task, noise {data.noise}"
        if data.tail != DataConfig.tail:
            words += f", {data.tail} steps after the success"
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
    if data.fraction < 1:
        dataset = _fraction(dataset, data.fraction, data.seed)
        words += f", of which {100 * data.fraction:g} %: {dataset.num_episodes} episodes"
    cloned, field = config.cloned
    if cloned == "expert" and dataset.expert_actions is None:
        raise InputError(
            "the data has no expert actions to clone",
            path=dataset.source,
            field=field,
            found="expert",
            expected="executed",
            hint=f"use --{field} executed",
        )
    verb = "learns from" if config.method == "cql" else "clones"
    return dataset, words + f"; {verb} the {cloned} actions"


def online_words(config: TrainConfig) -> str:
    """What a method learns from that has no data set but the environments: so many steps in them, in words."""
    steps = f"{config.training.iterations:,} steps in the environments of the tasks that it is trained on"
    cut = "" if config.sac.max_steps is None else f", episodes cut at {config.sac.max_steps}"
    return f"online: no data set; {steps}{cut} (SAC by stable-baselines3)"


def _fraction(dataset: TrajectoryDataset, share: float, seed: int) -> TrajectoryDataset:
    """A share of each task's episodes, at least one, in the data's order."""
    kept = []
    for task in dataset.tasks:
        # By the task's name: other tasks beside it don't change the draw.
        draw = np.random.default_rng([seed, zlib.crc32(task.encode())])
        episodes = draw.permutation(dataset.episodes_of(task))
        kept.append(episodes[: math.ceil(share * len(episodes))])
    return dataset.select(np.sort(np.concatenate(kept)))


def _sac_data(config: TrainConfig, tasks: tuple[str, ...], check: Check) -> tuple[TrajectoryDataset, str]:
    """A medium-replay of each task, collected by SAC or found where it was, and what it is in words."""
    data = config.data
    out = Path(data.root) / f"sac-seed{data.seed}-{data.sac_steps}steps"
    wanted = SacConfig(tasks=tasks, steps=data.sac_steps, out=out, seed=data.seed)
    with ProgressBar("SAC collects the training data", "steps") as bar:

        def progress(task: str, done: int, total: int, words: str) -> None:
            bar.update(done, total, f"{task}: {words}")
            check()

        collected = collect_sac(wanted, progress)
    for part in collected:
        if not (part.reached or part.reused):
            console.print(f"{part.task}: SAC did not reach the medium level in {data.sac_steps} steps")
    dataset = join_datasets([part.dataset for part in collected])
    made = ", ".join(f"{part.path}{_collector(str(part.path))}" for part in collected)
    return dataset, f"{made}, {dataset.num_episodes} episodes"


def _collector(spec: str) -> str:
    """Who made an HDF5 file, in brackets, where it says so: a score on such data is not D4RL's."""
    path = Path(spec)
    if path.suffix.lower() not in (".hdf5", ".h5") or not path.is_file():
        return ""
    from llmdpd.data.d4rl import collector_of

    words = collector_of(path)
    return f" ({words}; not D4RL's own)" if words else ""


def example_data(config: TrainConfig, check: Check = lambda: None) -> TrajectoryDataset:
    """The examples that the evaluation's trajectory prompts are taken from, seen and unseen tasks alike.

    Locomotion has no expert to drive: without `data.prompts` they come from the training data.
    """
    tasks = (*config.tasks.seen, *config.tasks.unseen)
    source = config.data.prompts or (config.data.path if is_locomotion(tasks[0]) else None)
    if source is not None:
        return load_tasks(source, tasks, config.tasks.goal_visible)
    if is_locomotion(tasks[0]):
        return _sac_data(config, tasks, check)[0]
    seed = config.data.seed + _EXAMPLE_SEED
    collected = _collect(config, tasks, config.data.prompt_episodes, "clean", seed, "example", check)
    return collected.dataset.select_tasks(tasks)


def behaviour_examples(
    config: TrainConfig, tasks: tuple[str, ...], behaviour: str, count: int, check: Check = lambda: None
) -> TrajectoryDataset:
    """Episodes of these tasks by one behaviour, most of which succeed `count` times or more; collected, or found again.

    Goals and starts are those of the run's own examples, the same for every behaviour.
    """
    seed = config.data.seed + _EXAMPLE_SEED
    episodes = _EPISODES_AN_EXAMPLE * count
    return _collect(config, tasks, episodes, behaviour, seed, f"{behaviour}-example", check).dataset.select_tasks(tasks)


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
    texts = [task_prompt(task).render() for task in tasks]
    return Embeddings(dict(zip(texts, encoder.encode(texts), strict=True)), encoder.dim, encoder.identity)


def _collect(
    config: TrainConfig, tasks: tuple[str, ...], episodes: int, noise: str, seed: int, kind: str, check: Check
) -> Collected:
    wanted = CollectConfig(
        tasks=tasks,
        episodes=episodes,
        noise=noise,
        seed=seed,
        post_success_steps=config.data.tail,
        workers=config.data.workers,
        goal_visible=config.tasks.goal_visible,
    )
    # Another collection gets another folder; the same one finds its own again.
    parts = repr((tasks, noise, wanted.goal_visible, wanted.post_success_steps, wanted.max_steps)).encode()
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
