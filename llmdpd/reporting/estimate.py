"""From results to the figures of a table: means, spreads and intervals over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmdpd.evaluation.intervals import bootstrap_interval, wilson_interval
from llmdpd.evaluation.results import CHECKPOINTS, SPLITS, TaskResult


@dataclass(frozen=True)
class Estimate:
    """Success in percent, or a normalised score, of one task or the mean over tasks.

    by_seed    one value a seed
    episodes   of all seeds together
    successes  the same; None for scores and for means over tasks, whose tasks may differ in difficulty
    tracked    episodes that a policy had handed over to its demonstration's tracker
    """

    by_seed: tuple[float, ...]
    episodes: int
    successes: int | None = None
    tracked: int = 0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None

    @property
    def wilson(self) -> tuple[float, float] | None:
        """95 % interval in percent over the episodes of all seeds together; it knows nothing of the seeds' spread."""
        if self.successes is None:
            return None
        low, high = wilson_interval(self.successes, self.episodes)
        return 100 * low, 100 * high

    @property
    def bootstrap(self) -> tuple[float, float] | None:
        return bootstrap_interval(self.by_seed)

    @property
    def bar(self) -> tuple[float, float] | None:
        """What a figure shows of the uncertainty: mean ∓ std within 0…100, of one seed the Wilson interval."""
        if self.std is None:
            return self.wilson
        return max(0.0, self.mean - self.std), min(100.0, self.mean + self.std)

    @property
    def text(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"

    @property
    def seeds(self) -> str:
        """Every seed's own figure, where there are several: a spread over three says less than the three."""
        return "" if self.std is None else ", ".join(f"{value:.1f}" for value in self.by_seed)

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "std": self.std,
            "by_seed": list(self.by_seed),
            "episodes": self.episodes,
            "successes": self.successes,
            "tracked": self.tracked,
            "wilson95": self.wilson,
            "bootstrap95": self.bootstrap,
        }


def task_estimates(records: Iterable[TaskResult]) -> dict[str, Estimate]:
    """Of each task, a record a seed."""
    by_task: dict[str, list[TaskResult]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    return {task: _estimate(own) for task, own in by_task.items()}


def _estimate(records: Sequence[TaskResult]) -> Estimate:
    counts = [record.successes for record in records if record.successes is not None]
    total = sum(counts) if len(counts) == len(records) else None
    episodes, tracked = (sum(getattr(record, name) for record in records) for name in ("episodes", "tracked"))
    return Estimate(tuple(map(_value, records)), episodes, total, tracked)


def mean_estimate(records: Iterable[TaskResult]) -> Estimate | None:
    """The mean over tasks, seed by seed, of the seeds that were evaluated on all of them; None where none was."""
    by_seed: dict[int, dict[str, TaskResult]] = {}
    for record in records:
        by_seed.setdefault(record.seed, {})[record.task] = record
    tasks = {task for own in by_seed.values() for task in own}
    whole = [own.values() for own in by_seed.values() if own.keys() == tasks]
    if not whole:
        return None
    means = tuple(statistics.fmean(map(_value, own)) for own in whole)
    counted = [record for own in whole for record in own]
    episodes, tracked = (sum(getattr(record, name) for record in counted) for name in ("episodes", "tracked"))
    return Estimate(means, episodes, tracked=tracked)


def _value(record: TaskResult) -> float:
    """Success in percent, or the normalised score (where there is none, the return)."""
    if record.success_rate is not None:
        return 100 * record.success_rate
    value = record.returns_mean if record.normalised_score is None else record.normalised_score
    assert value is not None  # a record holds successes or returns
    return value


def best_is_last(records: Iterable[TaskResult]) -> bool:
    """Whether the selection chose the last iteration in every run that has results of both checkpoints."""
    found: dict[str, set[tuple[int, int]]] = {name: set() for name in CHECKPOINTS}
    for record in records:
        found[record.checkpoint].add((record.seed, record.iterations))
    return found["best"] <= found["last"]


def tasks_by_split(records: Iterable[TaskResult]) -> dict[str, list[str]]:
    """Split → its task names in order of appearance; unseen tasks first, as in the paper."""
    tasks: dict[str, dict[str, None]] = {split: {} for split in reversed(SPLITS)}
    for record in records:
        tasks[record.split][record.task] = None
    return {split: list(names) for split, names in tasks.items() if names}
