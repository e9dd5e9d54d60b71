"""Joining episodes into a data set, and data sets into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmdpd.data import columns
from llmdpd.data.trajectories import EpisodeRecord, TrajectoryDataset, offsets_of
from llmdpd.errors import InputError, abridged

_WIDE = ("observations", "next_observations", "actions", "expert_actions")
_ARRAYS = (*_WIDE, "rewards")
_EPISODE = ("terminated", "noise_level", "success", "seed", "behaviour", "success_step")


def as_float32(value: ArrayLike, field: str, path: str | None, *, ndim: int) -> NDArray[np.float32]:
    """Real numbers of any type as a float32 array of `ndim` dimensions; [T, 1] becomes [T] where that is 1.

    Raises InputError for anything else (text, objects, complex numbers, another number of dimensions).
    """
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError("not an array", path=path, field=field, found="rows of unequal length") from None
    if array.dtype.kind not in "fiub":
        raise InputError("not numbers", path=path, field=field, found=f"type {array.dtype}", expected="real numbers")
    if ndim == 1 and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != ndim:
        found, expected = f"shape {list(array.shape)}", f"{ndim} dimensions"
        raise InputError("wrong number of dimensions", path=path, field=field, found=found, expected=expected)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, which the data set then refuses by name
        return array.astype(np.float32, copy=False)


def join_episodes(
    episodes: Iterable[EpisodeRecord],
    *,
    texts: Mapping[str, str] | None = None,
    goal_visible: bool | None = None,
    source: str = "",
    environments: Mapping[str, str] | None = None,
    success_from: str = "",
) -> TrajectoryDataset:
    """Join episodes; numbers of any real type become float32. Tasks are numbered as they first appear.

    `episodes` may be a generator that reads a file as it goes; `environments` are ids by task. Raises InputError naming
    `source` and the episode where shapes don't fit, and what the data set's constructor raises.
    """
    texts = texts or {}
    parts: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
    rows: list[tuple[Any, ...]] = []
    tasks: dict[str, int] = {}
    for number, record in enumerate(episodes):
        arrays = _checked(record, number, source)
        if rows:
            first = {name: values[0] for name, values in parts.items()}
            _same_widths(first, arrays, f"episode {number}", "the first episode", source)
        for name, values in parts.items():
            values.append(arrays[name])
        task, length = tasks.setdefault(record.task, len(tasks)), len(parts["rewards"][-1])
        rows.append((task, length, *(getattr(record, name) for name in _EPISODE)))
    if not rows:
        raise InputError("the data set is empty", path=source or None, found="no episode", expected="one or more")
    task_ids, lengths, terminated, noise_levels, successes, seeds, behaviours, steps = zip(*rows, strict=True)
    offsets = offsets_of(lengths)
    terminals = np.zeros(offsets[-1], np.bool_)
    terminals[offsets[1:] - 1] = terminated
    # Each list is emptied once joined, so that a large data set is never held twice as a whole.
    return TrajectoryDataset(
        **{name: np.concatenate(parts.pop(name)) for name in _ARRAYS if parts[name][0] is not None},
        terminals=terminals,
        offsets=offsets,
        task_ids=np.array(task_ids, np.int32),
        tasks=tuple(tasks),
        texts=tuple(texts.get(task, "") for task in tasks),
        noise_levels=np.array(noise_levels, np.float32),
        successes=np.array(successes, np.int8),
        seeds=np.array(seeds, np.int64),
        goal_visible=goal_visible,
        source=source,
        behaviours=behaviours if any(behaviours) else (),
        success_steps=np.array(steps, np.int64),
        environments=_environments(tuple(tasks), environments or {}),
        success_from=success_from,
    )


def _environments(tasks: Sequence[str], known: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(known.get(task, "") for task in tasks) if any(known.get(task) for task in tasks) else ()


def _checked(record: EpisodeRecord, number: int, source: str) -> dict[str, NDArray[np.float32] | None]:
    path, label = source or None, f" of episode {number}"
    arrays: dict[str, Any] = {name: getattr(record, name) for name in _ARRAYS}
    for name, value in arrays.items():
        if value is not None:
            arrays[name] = as_float32(value, name + label, path, ndim=1 if name == "rewards" else 2)
    steps = len(arrays["actions"])
    if steps == 0:
        raise InputError("an episode without steps", path=path, field="actions" + label, found=0, expected="1 or more")
    if record.next_observations is None:
        check_rows({"observations": arrays["observations"]}, steps + 1, path, label)
        arrays |= {"observations": arrays["observations"][:-1], "next_observations": arrays["observations"][1:]}
    check_rows(arrays, steps, path, label)
    return arrays


def check_rows(arrays: Mapping[str, Any], rows: int, path: str | Path | None, label: str = "") -> None:
    """Raise InputError unless every array has this number of rows; `label` follows its name in the message."""
    for name, array in arrays.items():
        if array is not None and len(array) != rows:
            found, expected = f"{len(array)} rows", f"{rows} rows"
            raise InputError("unequal lengths", path=path, field=name + label, found=found, expected=expected)


def _same_widths(
    first: Mapping[str, NDArray[Any] | None], other: Mapping[str, NDArray[Any] | None], who: str, than: str, source: str
) -> None:
    for name in _WIDE:
        a, b = first[name], other[name]
        if (a is None) != (b is None):
            found, expected = "present in one, absent in the other", "present in all or in none"
        elif a is not None and b is not None and a.shape[1] != b.shape[1]:
            found, expected = f"{b.shape[1]} numbers a step", f"{a.shape[1]} numbers a step"
        else:
            continue
        problem = f"{who} and {than} don't fit together"
        raise InputError(problem, path=source or None, field=name, found=found, expected=expected)


def join_datasets(datasets: Sequence[TrajectoryDataset]) -> TrajectoryDataset:
    """Join data sets; tasks of the same name become one, episodes keep their order.

    Raises InputError for none at all, for different widths, for different texts of one task, where only some have
    expert actions, and where some show the goal and others hide it.
    """
    if not datasets:
        raise InputError("no data set to join", found="none", expected="at least one")
    first = datasets[0]
    if len(datasets) == 1:
        return first
    texts: dict[str, str] = {}
    for dataset in datasets:
        one, other = ({name: getattr(d, name) for name in _WIDE} for d in (first, dataset))
        who, than = dataset.source or "a data set", first.source or "the first"
        _same_widths(one, other, who, than, dataset.source)
        _merge_texts(texts, dataset)
    index = {task: number for number, task in enumerate(texts)}
    task_ids = [np.array([index[t] for t in d.tasks], np.int32)[d.task_ids] for d in datasets]
    names = ("terminals", "noise_levels", "successes", "seeds", "success_steps")
    joined: dict[str, Any] = {name: np.concatenate([getattr(d, name) for d in datasets]) for name in names}
    joined |= _join_numbers(datasets)
    behaviours = [name for d in datasets for name in d.behaviours or ("",) * d.num_episodes]
    sources = list(dict.fromkeys(d.source for d in datasets))
    return TrajectoryDataset(
        **joined,
        offsets=offsets_of(np.concatenate([d.lengths for d in datasets])),
        task_ids=np.concatenate(task_ids),
        tasks=tuple(texts),
        texts=tuple(texts.values()),
        goal_visible=_merge_goal_visible(datasets),
        source=abridged(sources, 1),
        behaviours=tuple(behaviours) if any(behaviours) else (),
        environments=_environments(tuple(texts), _merge_environments(datasets)),
        success_from=", ".join(dict.fromkeys(d.success_from for d in datasets if d.success_from)),
    )


def _join_numbers(datasets: Sequence[TrajectoryDataset]) -> dict[str, Any]:
    """The arrays [N, …] of all; where some are on the disk they stay there, and the others are joined with them."""
    parts = [{name: a for name, a in dataset.numbers().items() if a is not None} for dataset in datasets]
    if not any(dataset.stored for dataset in datasets):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return dict(
        columns.join([p if d.stored else columns.in_memory(p, d.offsets) for p, d in zip(parts, datasets, strict=True)])
    )


def rename_tasks(dataset: TrajectoryDataset, names: Sequence[str]) -> TrajectoryDataset:
    """The data set with task i called `names[i]`; tasks that get the same name become one, in the place of the first.

    Raises:
        InputError: tasks of different texts get the same name.
    """
    if tuple(names) == dataset.tasks:
        return dataset
    tasks = tuple(dict.fromkeys(names))
    texts: dict[str, str] = {}
    environments: dict[str, list[str]] = {task: [] for task in tasks}
    for number, name in enumerate(names):
        _merge_text(texts, name, dataset.texts[number], dataset.source)
        environments[name] += dataset.environments[number : number + 1]
    places = {task: place for place, task in enumerate(tasks)}
    ids = np.array([places[name] for name in names], np.int32)
    return dataclasses.replace(
        dataset,
        tasks=tasks,
        texts=tuple(texts[task] for task in tasks),
        task_ids=ids[dataset.task_ids],
        environments=_environments(tasks, {task: _joined(ids) for task, ids in environments.items()}),
    )


def _joined(ids: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(each for each in ids if each))


def _merge_environments(datasets: Sequence[TrajectoryDataset]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for dataset in datasets:
        for task, environment in zip(dataset.tasks, dataset.environments, strict=False):
            found.setdefault(task, []).append(environment)
    return {task: _joined(ids) for task, ids in found.items()}


def _merge_texts(texts: dict[str, str], dataset: TrajectoryDataset) -> None:
    for task, text in zip(dataset.tasks, dataset.texts, strict=True):
        _merge_text(texts, task, text, dataset.source)


def _merge_text(texts: dict[str, str], task: str, text: str, source: str) -> None:
    known = texts.setdefault(task, text)
    if known and text and known != text:
        problem, found, expected = "two data sets give one task different texts", repr(text[:80]), repr(known[:80])
        raise InputError(problem, path=source or None, field=f"text of {task}", found=found, expected=expected)
    texts[task] = known or text


def _merge_goal_visible(datasets: Sequence[TrajectoryDataset]) -> bool | None:
    values = {d.goal_visible for d in datasets}
    if {True, False} <= values:
        path = next(d.source for d in datasets if d.goal_visible is False) or None
        problem, expected = "some data sets show the goal and others hide it", "the same in all"
        raise InputError(problem, path=path, field="goal_visible", found="both", expected=expected)
    return values.pop() if len(values) == 1 else None
