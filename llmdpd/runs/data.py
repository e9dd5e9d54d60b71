"""The data of a run: what it trains on, the demonstrations of its evaluation, the embedded texts."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from llmdpd.data import TrajectoryDataset, join_datasets
from llmdpd.data.collecting.left_over import remove_superseded, take_over
from llmdpd.data.collecting.medium_replay import MediumReplayConfig, collect_sac
from llmdpd.data.collecting.scripted import (
    CollectConfig,
    collect_scripted,
    found_tasks,
    in_order,
    partial_folder,
    resolved,
)
from llmdpd.data.config import DataConfig
from llmdpd.data.content import kind_of
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.evaluation.offline import OfflineData, hold_out
from llmdpd.prompts import LLMEncoder, task_prompt
from llmdpd.prompts.source import LLMIdentity
from llmdpd.tasks.protocols import TaskConfig
from llmdpd.tasks.specs import shown_tasks, suite_of
from llmdpd.utils.files import process_lock
from llmdpd.utils.progress import ProgressBar, Stopwatch, console

Check = Callable[[], None]
# The demonstrations of the evaluation are collected apart from the training data, with other goals.
_DEMONSTRATION_SEED = 500_000
# The worst behaviour policies still succeed in every third episode of most tasks.
_EPISODES_A_DEMONSTRATION = 3


def training_data(data: DataConfig, tasks: TaskConfig, check: Check = lambda: None) -> tuple[TrajectoryDataset, str]:
    """The seen tasks' data, collected if no path is given, and its description.

    `check` is called as episodes are collected and may raise to stop.

    Raises:
        InputError: data that lacks a task, or has another shape than the environment.
    """
    if data.path is not None:
        dataset = load_tasks(data.path, tasks.seen, tasks.goal_visible)
        words = f"{data.path}{_collector(data.path)}, {dataset.num_episodes} episodes{_provenance(dataset)}"
    elif suite_of(tasks.seen[0]).data(tasks.seen[0]):
        dataset = load_tasks(None, tasks.seen, tasks.goal_visible)
        words = f"the tasks' own data, {dataset.num_episodes} episodes{_provenance(dataset)}"
    elif _collector_of(tasks.seen[0], "data.path") == "sac":
        dataset, words = _sac_data(data, tasks.seen, check)
    else:
        dataset = _collect(data, tasks, tasks.seen, "training", "training data", check)
        words = f"scripted experts, {data.episodes} episodes a task, noise {data.noise}"
        if data.post_success_steps != DataConfig.post_success_steps:
            words += f", {data.post_success_steps} steps after the success"
    if not data.keep_failed:
        dataset, left_out = _without_failed(dataset)
        words += left_out
    if data.fraction < 1:
        dataset = _fraction(dataset, data.fraction, data.seed)
        words += f", of which {100 * data.fraction:g} %: {dataset.num_episodes} episodes"
    return dataset, words


def _provenance(dataset: TrajectoryDataset) -> str:
    """Where the episodes were recorded and what says that one succeeded, as far as the data name them."""
    environments = ", ".join(dict.fromkeys(filter(None, dataset.environments)))
    recorded = f", recorded in {environments}" if environments else ""
    return recorded + (f", success by {dataset.success_from}" if dataset.success_from else "")


def _without_failed(dataset: TrajectoryDataset) -> tuple[TrajectoryDataset, str]:
    """The data without episodes that are known to have failed, and words that say so.

    Raises:
        InputError: a task of which all failed.
    """
    failed = dataset.successes == 0
    for task in dataset.tasks:
        if failed[dataset.episodes_of(task)].all():
            found = f"{len(dataset.episodes_of(task))} failed episodes"
            expected = "at least one that did not"
            raise InputError(
                "every episode of a task failed", path=dataset.source, field=task, found=found, expected=expected
            )
    if not failed.any():
        return dataset, ""
    console.print(f"{int(failed.sum())} of {len(failed)} episodes failed and are left out")
    return dataset.select(~failed), ", failed ones left out"


def _fraction(dataset: TrajectoryDataset, share: float, seed: int) -> TrajectoryDataset:
    """A share of each task's episodes, at least one, in the data's order."""
    kept = []
    for task in dataset.tasks:
        # By the task's name: other tasks beside it don't change the draw.
        draw = np.random.default_rng([seed, zlib.crc32(task.encode())])
        episodes = draw.permutation(dataset.episodes_of(task))
        kept.append(episodes[: math.ceil(share * len(episodes))])
    return dataset.select(np.sort(np.concatenate(kept)))


def _collector_of(task: str, field: str) -> str:
    """What collects a task's data. Raises `InputError`, which names the field, where nothing does."""
    suite = suite_of(task)
    if suite.collector is None:
        raise InputError(
            f"there is nothing that collects data of {suite.name}",
            field=field,
            found="no data set",
            expected=f"a data set of {task}",
            hint=f"give one by --{field.replace('_', '-')}",
        )
    return suite.collector


def _sac_data(data: DataConfig, tasks: tuple[str, ...], check: Check) -> tuple[TrajectoryDataset, str]:
    """A medium-replay of each task, collected by SAC or found where it was, and its description."""
    out = Path(data.root) / f"sac-seed{data.seed}-{data.sac_steps}steps"
    wanted = MediumReplayConfig(tasks=tasks, steps=data.sac_steps, out=out, seed=data.seed)
    with ProgressBar("SAC collects the training data", "steps", check=check) as bar:
        collected = collect_sac(wanted, lambda task, done, total, words: bar.update(done, total, f"{task}: {words}"))
    for part in collected:
        if not (part.reached or part.reused):
            console.print(f"{part.task}: SAC did not reach the medium level in {data.sac_steps} steps")
    dataset = join_datasets([part.dataset for part in collected])
    made = ", ".join(f"{part.path}{_collector(str(part.path))}" for part in collected)
    return dataset, f"{made}, {dataset.num_episodes} episodes"


def _collector(spec: str) -> str:
    """Who made an HDF5 file, in brackets, where it says so: a score on such data is not D4RL's."""
    path = Path(spec)
    if kind_of(path) != "hdf5":
        return ""
    from llmdpd.data.d4rl import collector_of

    words = collector_of(path)
    return f" ({words}; not D4RL's own)" if words else ""


def demonstrations(
    data: DataConfig, tasks: TaskConfig, check: Check = lambda: None, judged: tuple[str, ...] = ()
) -> TrajectoryDataset:
    """What the evaluation's demonstrations are taken from, of seen and unseen tasks alike.

    Of a task that another one shows it is that one's episodes, and its own only where it is among the `judged` tasks,
    whose recorded episodes an evaluation without an environment needs as well.

    Without `data.demonstrations` they come from the tasks' own data, where the suite says where these are, else from a
    suite's scripted experts; one that has none to drive takes them from the training data.
    """
    suite, needed = suite_of(tasks.all[0]), tuple(dict.fromkeys((*shown_tasks(tasks.all), *judged)))
    own = data.demonstrations is None and all(suite.data(task) for task in needed)
    source = data.demonstrations or (None if suite.collector == "scripted" else data.path)
    if own or source is not None:
        return load_tasks(None if own else source, needed, tasks.goal_visible)
    if _collector_of(tasks.all[0], "data.demonstrations") == "sac":
        return _sac_data(data, needed, check)[0]
    clean = _demonstrating(data, "clean", data.demonstration_episodes)
    return _collect(clean, tasks, needed, "example", "demonstrations", check)


def offline_data(data: DataConfig, tasks: TaskConfig, reads: bool, check: Check = lambda: None) -> OfflineData:
    """What a run without an environment learns from and is judged by; `reads`: whether it reads demonstrations.

    Raises:
        InputError: as `training_data`, `demonstrations` and `hold_out`.
    """
    dataset, _ = training_data(data, tasks, check)
    shown = demonstrations(data, tasks, check, tasks.all) if reads else None
    return hold_out(dataset, shown, tasks.all, data.seed, keep_failed=data.keep_failed)


def behaviour_demonstrations(
    data: DataConfig, protocol: TaskConfig, tasks: tuple[str, ...], behaviour: str, count: int, check: Check
) -> TrajectoryDataset:
    """Episodes of these tasks by one behaviour policy, most of which succeed `count` times or more.

    They are collected, or found again. Goals and starts are those of the run's own demonstrations, the same for every
    behaviour policy.
    """
    wanted = _demonstrating(data, behaviour, _EPISODES_A_DEMONSTRATION * count)
    return _collect(wanted, protocol, tasks, f"{behaviour}-example", f"{behaviour} demonstrations", check)


def _demonstrating(data: DataConfig, behaviour: str, episodes: int) -> DataConfig:
    return replace(data, noise=behaviour, episodes=episodes, seed=data.seed + _DEMONSTRATION_SEED)


@dataclass(frozen=True)
class Embeddings:
    """The LLM's embeddings [D] of rendered texts, their size D, and what made them; empty where text is off."""

    vectors: dict[str, torch.Tensor]
    width: int
    llm: LLMIdentity | None


def embed_texts(llm: str, device: str, tasks: Sequence[str]) -> Embeddings:
    """The LLM's embedding of each task's rendered text; nothing where there is no task."""
    if not tasks:
        return Embeddings({}, 0, None)
    encoder = LLMEncoder(llm, device=device)
    texts = [task_prompt(task).render() for task in tasks]
    return Embeddings(dict(zip(texts, encoder.encode(texts), strict=True)), encoder.dim, encoder.identity)


def _collect(
    data: DataConfig, protocol: TaskConfig, tasks: tuple[str, ...], prefix: str, kind: str, check: Check
) -> TrajectoryDataset:
    """Collected episodes of these tasks, in their order; tasks of earlier collections of the same settings are found.

    Their folders' names begin with `prefix`; messages call them `kind`.
    """
    shared = ("episodes", "noise", "seed", "post_success_steps", "workers")
    options = {name: getattr(data, name) for name in shared}
    wanted = resolved(CollectConfig(tasks=tasks, goal_visible=protocol.goal_visible, **options))
    watch, root = Stopwatch(), Path(data.root)
    parts = _found(wanted, root, prefix)
    # One run at a time collects with these settings: the others then find what it did.
    lock = root / f".{_folder_name(replace(wanted, tasks=()), prefix)}.lock"
    # A run that was killed left its lock: it is taken here, so that it is removed.
    left = lock.exists() and os.access(root, os.W_OK)
    if _missing(tasks, parts) or left:
        bar = ProgressBar(f"collecting {kind}", "episodes", check=check)
        total = wanted.episodes * len(tasks)
        with bar, process_lock(lock, lambda _: bar.update(0, total, "another run collects")):
            parts = _found(wanted, root, prefix)
            parts += _collected(replace(wanted, tasks=_missing(tasks, parts)), root, prefix, bar)
            remove_superseded(wanted, root / _folder_name(wanted, prefix), _folders(prefix))
    dataset = in_order(join_datasets(parts), tasks)
    success = float(np.mean(dataset.successes == 1))
    console.print(
        f"{kind}: {dataset.num_episodes} episodes, {dataset.num_transitions} transitions, {success:.0%} succeeded"
        f"; {', '.join(part.source for part in parts)} ({watch.seconds:.0f} s)"
    )
    return dataset


def _found(wanted: CollectConfig, root: Path, prefix: str) -> list[TrajectoryDataset]:
    """What finished collections have of the wanted tasks, each task once."""
    own = root / _folder_name(wanted, prefix)
    if partial_folder(own).exists():  # it goes on, with all of its tasks
        return []
    parts: list[TrajectoryDataset] = []
    folders = [own] if own.exists() else sorted(root.glob(_folders(prefix)))
    for folder in folders:
        missing = _missing(wanted.tasks, parts)
        part = found_tasks(replace(wanted, tasks=missing), folder) if missing else None
        parts += [] if part is None else [part]
    return parts


def _collected(wanted: CollectConfig, root: Path, prefix: str, bar: ProgressBar) -> list[TrajectoryDataset]:
    """The wanted tasks, collected now into a folder of their own; nothing where none is wanted."""
    if not wanted.tasks:
        return []
    wanted = replace(wanted, out=root / _folder_name(wanted, prefix))
    take_over(wanted, root / _folder_name(wanted, prefix), _folders(prefix))
    return [collect_scripted(wanted, lambda done, total, steps: bar.update(done, total, f"{steps:,} steps")).dataset]


def _folders(prefix: str) -> str:
    """Pattern of the names of collections of one kind."""
    return f"{prefix}-*tasks-*"


def _folder_name(wanted: CollectConfig, prefix: str) -> str:
    parts = (wanted.tasks, wanted.noise, wanted.goal_visible, wanted.post_success_steps, wanted.max_steps)
    name = f"{prefix}-{len(wanted.tasks)}tasks-{wanted.episodes}episodes-seed{wanted.seed}"
    return f"{name}-{zlib.crc32(repr(parts).encode()):08x}"


def _missing(tasks: tuple[str, ...], parts: Sequence[TrajectoryDataset]) -> tuple[str, ...]:
    """The tasks that none of the parts has."""
    there = {task for part in parts for task in part.tasks}
    return tuple(task for task in tasks if task not in there)
