"""Collecting data sets with behaviour policies made from a suite's scripted experts (`llmdpd.collect`).

Each episode depends only on the configuration, its task and its number, so the content is the same for any number of
workers, and an interrupted collection continues where it stopped: finished episodes lie in `OUT.partial` until all are
there, then the Minari data sets appear in OUT at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from llmdpd.data import (
    EpisodeRecord,
    TrajectoryDataset,
    join_datasets,
    join_episodes,
    load_dataset,
    save_minari,
    save_shards,
)
from llmdpd.data.columns import StoredColumn
from llmdpd.data.content import read_npz
from llmdpd.errors import InputError, nearest_names
from llmdpd.prompts import task_prompt
from llmdpd.tasks import COLLECTION_SEED_END, SUITES
from llmdpd.tasks.base import TaskSuite
from llmdpd.tasks.demonstrators import ScriptedEpisode, ScriptedRequest
from llmdpd.tasks.simulation.processes import map_unordered
from llmdpd.tasks.specs import canonical_task, common_spec, known_behaviours, suite_of, task_spec
from llmdpd.utils.bounds import Bounds, Episodes, WholeNumber, Workers, check_config
from llmdpd.utils.files import (
    atomic_directory,
    atomic_write_json,
    atomic_writer,
    process_lock,
    read_json,
    recover_directory,
)

MANIFEST = "collect.json"
_FORMAT = 1
_EPISODE_ARRAYS = ("observations", "actions", "expert_actions", "rewards")
_DEMONSTRATORS = "llmdpd.tasks.demonstrators:Demonstrators"
_OTHER_OUT = "choose another --out, or remove this folder"
_LOOK = 1000  # finished episodes that are looked through between two looks at stop signals
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectConfig:
    """Collect episodes of a suite's scripted experts, with a new start and goal every episode and a mix of behaviours.

    Writes Minari data sets, or shards. The same command continues a collection that was stopped at any moment.
    """

    tasks: tuple[str, ...] = ("sweep-into",)
    """Tasks of one suite that has scripted experts: names ("sweep-into", "box-close-v3", "scene-drawer-open"), or
    groups: of Meta-World "all" (50) and "ml45-train" (45), of OGBench "ogbench-scene"."""
    episodes: Episodes = 100
    """Episodes for each task."""
    noise: str = "clean:0.5,gaussian:0.25,bursts:0.15,random:0.1"
    """Behaviours of the suite and their shares of the episodes, as KIND:SHARE,… Of all: clean (the expert itself),
    gaussian (noise of sigma 0.1 … 0.5 on every executed action), bursts (one random action held for 5 … 15 steps now
    and then), pauses (stands still now and then). Of Meta-World also: random (mostly random actions), slow (0.3 … 0.7
    of the speed), cut (ends with the first success), overrun (continues for 100 … 200 steps after it), wander (for 100
    … 400 steps after it with random actions), detour (by a random point above the table), jerky (components of the
    movement are 0 or ±1). Each episode records its behaviour and a level, from 0 for the expert itself to 1 for random
    actions."""
    out: Path | None = None
    """Folder of the data, by default data/SUITE, such as data/metaworld. Until all is collected, episodes
    lie in OUT.partial."""
    seed: WholeNumber = 0
    """Decides goals and noise of all episodes."""
    workers: Workers = None
    """Worker processes; one a core by default. The content does not depend on it."""
    post_success_steps: WholeNumber = 20
    """Steps kept after the first success, where an episode is truncated; cut, overrun and wander have their own."""
    max_steps: Annotated[int | None, Bounds(1)] = None
    """Steps after which an episode ends without success; by default, and at most, the tasks' own limit."""
    goal_visible: bool = True
    """Whether the observations hold the goal or zeros in its place, where the suite can hide it (as ML45 does)."""
    keep_failed: bool = True
    """Keep episodes without success, marked as failed. The summary counts them either way."""
    format: Literal["minari", "shards"] = "minari"
    """How they are written: a Minari data set for each task, or shards, for more than the memory holds."""


@dataclass(frozen=True)
class TaskSummary:
    """What was collected of one task."""

    task: str
    episodes: int
    kept: int
    transitions: int
    successes: dict[str, tuple[int, int]]  # behaviour → (successes, episodes)
    mean_length: float


@dataclass(frozen=True)
class Collected:
    """A finished collection: the data, where it lies, and a summary.

    `content` is `content_hash(dataset)`; `seconds` is what the call took; `reused` says that all was there before.
    """

    dataset: TrajectoryDataset
    out: Path
    summaries: tuple[TaskSummary, ...]
    content: str
    seconds: float
    reused: bool = False


OnEpisode = Callable[[int, int, int], None]
"""(finished episodes, all episodes, transitions in the finished ones); zeros while what is there is looked through."""


def resolve_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Canonical names of tasks given by name or by group ("all", "ml45-train"), each once, in the order given.

    Raises InputError for an unknown name, or none at all.
    """
    groups = {name: tasks for suite in SUITES.values() for name, tasks in suite.groups.items()}
    tasks = tuple(dict.fromkeys(task for name in names for task in groups.get(name) or (canonical_task(name),)))
    if not tasks:
        raise InputError("no tasks to collect", field="tasks", found="none", expected="one or more tasks")
    suites = {suite.name: suite for suite in map(suite_of, tasks)}
    for suite in suites.values():
        if suite.collector != "scripted":
            hint = "collect with --policy sac" if suite.collector == "sac" else "record data of your own"
            raise InputError(f"{suite.name} has no scripted experts", field="tasks", found=", ".join(tasks), hint=hint)
    common_spec(tasks)
    return tasks


def parse_noise(text: str, suite: TaskSuite | None = None) -> dict[str, float]:
    """ "clean:1,gaussian:3" → {"clean": 0.25, "gaussian": 0.75}; a kind without a share counts 1.

    The kinds are behaviours of the suite, or without one of any suite.

    Raises InputError for an unknown or repeated kind, and a share that is not a positive number.
    """
    shares: dict[str, float] = {}
    behaviours = known_behaviours() if suite is None else suite.behaviours
    for part in text.split(","):
        kind, _, number = part.strip().partition(":")
        if kind not in behaviours:
            hint = "nearest: " + nearest_names(kind, tuple(behaviours))
            raise InputError("unknown behaviour", field="noise", found=part, expected=", ".join(behaviours), hint=hint)
        if kind in shares:
            raise InputError("a behaviour given twice", field="noise", found=text, expected="each kind once")
        try:
            shares[kind] = float(number or 1)
        except ValueError:
            shares[kind] = math.nan
        if not (math.isfinite(shares[kind]) and shares[kind] > 0):
            raise InputError("a share that is no positive number", field="noise", found=part, expected="KIND:SHARE")
    total = sum(shares.values())
    return {kind: share / total for kind, share in shares.items()}


def resolved(config: CollectConfig) -> CollectConfig:
    """The configuration with canonical names and explicit steps, checked. Raises InputError for a wrong setting."""
    check_config(config)
    tasks = resolve_tasks(config.tasks)
    parse_noise(config.noise, suite_of(tasks[0]))
    for task in tasks:
        task_spec(task).check_max_steps(config.max_steps, "max_steps")
    steps = max(task_spec(task).steps(config.max_steps) for task in tasks)
    return dataclasses.replace(config, tasks=tasks, max_steps=steps)


def folder_of(config: CollectConfig) -> Path:
    """Where the data sets lie."""
    if config.out is not None:
        if not Path(config.out).name.strip("."):
            problem = "the data sets need a folder of their own"
            raise InputError(problem, field="out", found=config.out, expected="the name of a new folder")
        return Path(config.out)
    return Path("data") / _registered(suite_of(resolve_tasks(config.tasks)[0]))


def _registered(suite: TaskSuite) -> str:
    """The name that a suite is registered by."""
    return next(name for name, value in SUITES.items() if value is suite)


def noise_schedule(shares: Mapping[str, float], episodes: int) -> list[str]:
    """The behaviour of each episode: always the kind that is furthest below its share.

    So any first n episodes hold the mixture as exactly as n allows, and don't depend on how many follow.
    """
    counts = dict.fromkeys(shares, 0)
    kinds = []
    for number in range(1, episodes + 1):
        kind = max(shares, key=lambda name: shares[name] * number - counts[name])
        counts[kind] += 1
        kinds.append(kind)
    return kinds


def partial_folder(out: Path) -> Path:
    """Where finished episodes lie until all are there."""
    return out.with_name(out.name + ".partial")


def content_hash(dataset: TrajectoryDataset) -> str:
    """SHA-256 over a data set's contents, but for its source and the behaviours' names.

    The steps of success are left out too: collections of version 0.1 have none, and are found again by their hash.
    Of columns that stay on the disk it is over their files' hashes, which were checked as they were loaded: data in
    memory have another hash than the same in shards.
    """
    digest = hashlib.sha256(repr((dataset.tasks, dataset.texts, dataset.goal_visible)).encode())
    for item in dataclasses.fields(dataset):
        value = getattr(dataset, item.name)
        if isinstance(value, np.ndarray) and item.name != "success_steps":
            digest.update(f"{item.name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, StoredColumn):
            digest.update(value.identity())
    return digest.hexdigest()


def collect_scripted(config: CollectConfig, progress: OnEpisode | None = None) -> Collected:
    """Collect, continue a collection, or read one that is complete.

    If another process is collecting into OUT, this waits for it and reads its result.

    Args:
        config: what to collect.
        progress: called at the start, after every episode and about every second between; and while another process
            is waited for. May raise to stop.

    Raises:
        InputError: a wrong setting; OUT or its partial holds a collection of another configuration.
    """
    start = time.perf_counter()
    config = resolved(config)
    content = content_of(config)
    out = folder_of(config)
    lock = out.with_name(f".{out.name}.lock")
    # What a killed one left beside it is removed below, where that may be.
    left = (partial_folder(out).exists() or lock.exists()) and os.access(out.parent, os.W_OK)
    if (out / MANIFEST).exists() and not left:
        return _read_finished(config, content, start)  # without a lock: it may lie where only reading is allowed
    report, announced = progress or (lambda *_: None), set[int | None]()

    def wait(holder: int | None) -> None:
        if holder not in announced:
            announced.add(holder)
            _log.info("waiting for process %s, which is collecting into %s", holder or "(unknown)", out)
        report(0, config.episodes * len(config.tasks), 0)

    with process_lock(lock, wait):
        return _collect(config, content, start, report)


def _collect(config: CollectConfig, content: dict[str, Any], start: float, progress: OnEpisode) -> Collected:
    """See `collect_scripted`; the caller holds the lock."""
    out = folder_of(config)
    partial = partial_folder(out)
    recover_directory(out)
    if (out / MANIFEST).exists():
        collected = _read_finished(config, content, start)
        shutil.rmtree(partial, ignore_errors=True)
        return collected
    if out.exists() and any(out.iterdir()):
        found = ", ".join(sorted(path.name for path in out.iterdir())[:4])
        problem, expected = "the output folder holds something else", "no such folder yet"
        raise InputError(problem, path=out, field="out", found=found, expected=expected)
    if (partial / MANIFEST).exists():
        hint = "remove this folder to start again, or choose another --out"
        _check_same(read_json(partial / MANIFEST), content, partial, hint)
    else:
        atomic_write_json(partial / MANIFEST, content)
    requests = _requests(config)
    paths = [partial / each.task / f"{index % config.episodes:06d}.npz" for index, each in enumerate(requests)]
    _collect_missing(config, paths, requests, progress)
    collected = _finish(config, content, requests, paths, start)
    shutil.rmtree(partial, ignore_errors=True)
    return collected


def content_of(config: CollectConfig) -> dict[str, Any]:
    """The settings that decide the content, as JSON."""
    same = ("episodes", "seed", "max_steps", "goal_visible", "keep_failed")
    return {
        "format": _FORMAT,
        "tasks": list(config.tasks),
        "noise": parse_noise(config.noise),
        "tail": config.post_success_steps,
        **{name: getattr(config, name) for name in same},
    }


def _check_same(found: Any, wanted: Mapping[str, Any], path: Path, hint: str) -> None:
    if not isinstance(found, dict):
        raise InputError("not the configuration of a collection", path=path / MANIFEST, found=type(found).__name__)
    for field, value in wanted.items():
        if found.get(field) != value:
            problem = "this folder belongs to a collection of another configuration"
            raise InputError(problem, path=path, field=field, found=found.get(field), expected=value, hint=hint)


def _requests(config: CollectConfig) -> list[ScriptedRequest]:
    """All episodes, task by task; each is decided by the seed, its task's name and its number."""
    kinds = noise_schedule(parse_noise(config.noise), config.episodes)
    requests = []
    for task in config.tasks:
        own = task_spec(task).max_steps
        limits = {"max_steps": min(config.max_steps or own, own), "post_success_steps": config.post_success_steps}
        for number, kind in enumerate(kinds):
            # crc32, not hash(): Python salts the hash of a string differently in every process.
            sequence = np.random.SeedSequence([config.seed, zlib.crc32(task.encode()), number])
            first, *noise = (int(word) for word in sequence.generate_state(3, np.uint32))
            seed, noise_seed = first % COLLECTION_SEED_END, noise[0] << 32 | noise[1]
            requests.append(ScriptedRequest(task, seed, noise_seed, kind, **limits))
    return requests


def _collect_missing(
    config: CollectConfig, paths: Sequence[Path], requests: Sequence[ScriptedRequest], progress: OnEpisode
) -> None:
    """Run the requests whose episodes are not at their `paths` yet."""
    missing, transitions = list[int](), 0
    for index, path in enumerate(paths):
        length = _length_of(path)
        transitions += length
        missing += [] if length else [index]
        if index % _LOOK == _LOOK - 1:
            progress(0, 0, 0)
    finished = len(paths) - len(missing)

    def tell() -> None:
        progress(finished, len(paths), transitions)

    tell()
    items = [(requests[index],) for index in missing]
    episodes = map_unordered(
        _DEMONSTRATORS, (config.goal_visible,), "episode", items, workers=config.workers, waiting=tell
    )
    for position, episode in episodes:
        with atomic_writer(paths[missing[position]]) as temporary, temporary.open("wb") as file:
            np.savez(file, **dataclasses.asdict(episode))
        finished, transitions = finished + 1, transitions + len(episode.actions)
        tell()


def _read_episode(path: Path) -> ScriptedEpisode:
    arrays = read_npz(path)
    parts = {name: arrays[name] for name in _EPISODE_ARRAYS}
    success, level = bool(arrays["success"]), float(arrays["noise_level"])
    # An episode that an earlier version collected lacks it.
    step = int(arrays["success_step"]) if "success_step" in arrays else -1
    return ScriptedEpisode(**parts, success=success, noise_level=level, success_step=step)


def _length_of(path: Path) -> int:
    """Steps of a finished episode; 0 where it is not there or damaged, so that it is run again."""
    try:
        return len(_read_episode(path).actions)
    except (KeyError, TypeError, ValueError):  # InputError is one; an array of another shape is no number
        return 0


def _finish(
    config: CollectConfig,
    content: dict[str, Any],
    requests: Sequence[ScriptedRequest],
    paths: Sequence[Path],
    start: float,
) -> Collected:
    """Join the episodes and write the data sets; as shards, a task's episodes are in memory at a time."""
    out, summaries, stored = folder_of(config), list[TaskSummary](), config.format == "shards"
    with atomic_directory(out) as temporary:
        parts = _by_task(config, requests, paths, summaries)
        if stored:
            save_shards(parts, temporary / "data")
            dataset = in_order(load_dataset(temporary), config.tasks)
        else:
            dataset = join_datasets(list(parts))
            save_minari(dataset, temporary, namespace=_registered(suite_of(config.tasks[0])))
        digest, seconds = content_hash(dataset), time.perf_counter() - start
        rows = [dataclasses.asdict(summary) for summary in summaries]
        manifest = {"config": content, "content": digest, "seconds": seconds, "summaries": rows}
        atomic_write_json(temporary / MANIFEST, manifest)
    if stored:
        dataset = _read_finished(config, content, start).dataset
    return Collected(dataset, out, tuple(summaries), digest, seconds)


def _by_task(
    config: CollectConfig, requests: Sequence[ScriptedRequest], paths: Sequence[Path], summaries: list[TaskSummary]
) -> Iterator[TrajectoryDataset]:
    """Each task's episodes as a data set, and its summary into `summaries`."""
    for number, task in enumerate(config.tasks):
        rows = slice(number * config.episodes, (number + 1) * config.episodes)
        mine = [(request, _read_episode(path)) for request, path in zip(requests[rows], paths[rows], strict=True)]
        summaries.append(_summary(config, task, mine))
        kept = [
            EpisodeRecord(
                **{name: getattr(episode, name) for name in (*_EPISODE_ARRAYS, "noise_level", "success_step")},
                **{name: getattr(request, name) for name in ("task", "seed", "behaviour")},
                success=int(episode.success),
            )
            for request, episode in mine
            if episode.success or config.keep_failed
        ]
        if kept:
            texts, source = {task: task_prompt(task).render()}, str(folder_of(config))
            yield join_episodes(kept, texts=texts, goal_visible=config.goal_visible, source=source)
    without = [summary.task for summary in summaries if not summary.kept]
    if without:
        hint = "keep failed episodes (--keep-failed), or choose less noise"
        raise InputError("no episode of a task succeeded", field="keep_failed", found=", ".join(without), hint=hint)


def _summary(config: CollectConfig, task: str, mine: Sequence[tuple[ScriptedRequest, ScriptedEpisode]]) -> TaskSummary:
    kept = [len(episode.actions) for _, episode in mine if episode.success or config.keep_failed]
    successes = {}
    for kind in parse_noise(config.noise):
        flags = [episode.success for request, episode in mine if request.behaviour == kind]
        if flags:
            successes[kind] = (sum(flags), len(flags))
    mean_length = float(np.mean([len(episode.actions) for _, episode in mine]))
    return TaskSummary(task, len(mine), len(kept), sum(kept), successes, mean_length)


def found_tasks(config: CollectConfig, folder: Path) -> TrajectoryDataset | None:
    """The episodes of those wanted tasks that a finished collection has, of the same settings but for its tasks.

    An episode does not depend on what else was collected. None where it is no finished collection, has other settings,
    none of the tasks, or no steps of success, which a collection of version 0.1 lacks; and, with a line in the log,
    where it is damaged.
    """
    config = resolved(config)
    try:
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
        settings = manifest.get("config") if isinstance(manifest, dict) else None
        own = settings.get("tasks") if isinstance(settings, dict) else None
        if not isinstance(own, list) or settings != {**content_of(config), "tasks": own}:
            return None
        shared = [task for task in config.tasks if task in own]
        if not shared:
            return None
        there = dataclasses.replace(config, tasks=tuple(own), out=folder, format="minari")  # or shards
        part = in_order(_read_finished(there, content_of(there), time.perf_counter()).dataset, shared)
    except InputError as error:
        _log.warning("a collection that is damaged is left out: %s", error)
        return None
    return None if ((part.successes == 1) & (part.success_steps < 0)).any() else part


def in_order(dataset: TrajectoryDataset, tasks: Sequence[str]) -> TrajectoryDataset:
    """The episodes of these tasks, task by task, as a collection of them has them."""
    # Files are found by name; training samples by index, so a data set read again must be in the order of a new one.
    chosen = dataset.select_tasks(tasks)
    return chosen.select(np.concatenate([chosen.episodes_of(task) for task in tasks]))


def _read_finished(config: CollectConfig, content: Mapping[str, Any], start: float) -> Collected:
    """A collection that is finished already, in the order in which it was collected.

    Shards are taken for Minari data sets, which hold the same; not the other way round.
    """
    out = folder_of(config)
    manifest = read_json(out / MANIFEST)
    _check_same(manifest.get("config"), content, out, _OTHER_OUT)
    dataset = dataclasses.replace(in_order(load_dataset(out), config.tasks), source=str(out))
    if config.format == "shards" and not dataset.stored:
        problem, hint = "what was collected here is not in shards", "llmdpd data convert, or choose another --out"
        raise InputError(problem, path=out, field="format", found="Minari data sets", expected="shards", hint=hint)
    found, expected = content_hash(dataset), manifest.get("content")
    if found != expected:
        problem = "the data sets in this folder are not those that were collected here"
        raise InputError(problem, path=out, field="content", found=found, expected=expected, hint=_OTHER_OUT)
    summaries = tuple(
        TaskSummary(**{**row, "successes": {kind: tuple(counts) for kind, counts in row["successes"].items()}})
        for row in manifest["summaries"]
    )
    return Collected(dataset, out, summaries, manifest["content"], time.perf_counter() - start, reused=True)
