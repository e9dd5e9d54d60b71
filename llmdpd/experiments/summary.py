"""From an experiment's results to the rows of its table: means, spreads and intervals over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmdpd.evaluation.results import CHECKPOINTS, SPLITS, TaskResult, wilson_interval
from llmdpd.experiments.cell import Cell, Evaluation
from llmdpd.experiments.plan import Plan
from llmdpd.reporting.paper import PaperTable, Reported, find_row

BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 0


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean: draws of as many values with replacement. None for fewer than two.

    The draws are the same at every call. With three values there are ten different draws, so the interval lies
    between the least and the greatest value and says little more than the three do.
    """
    if len(values) < 2:
        return None
    draw = np.random.default_rng(BOOTSTRAP_SEED)
    chosen = draw.integers(0, len(values), (BOOTSTRAP_DRAWS, len(values)))
    low, high = np.quantile(np.asarray(values, float)[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """Success in percent, or a normalised score, of one task or the mean over tasks.

    by_seed    one value a seed
    episodes   of all seeds together
    successes  the same; None for scores and for means over tasks, whose tasks may differ in difficulty
    """

    by_seed: tuple[float, ...]
    episodes: int
    successes: int | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds."""
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
    def text(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "std": self.std,
            "by_seed": list(self.by_seed),
            "episodes": self.episodes,
            "successes": self.successes,
            "wilson95": self.wilson,
            "bootstrap95": self.bootstrap,
        }


@dataclass(frozen=True)
class Row:
    """What one method, or one further evaluation of it, reached with one checkpoint; a control has no method's label.

    tasks     task → its estimate
    means     split → the mean over its tasks
    reported  task → the paper's figure
    records   that the estimates are made of
    """

    label: str
    variant: str
    checkpoint: str
    tasks: dict[str, Estimate]
    means: dict[str, Estimate]
    records: tuple[TaskResult, ...]
    reported: dict[str, Reported] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return ": ".join(part for part in (self.label, self.variant) if part)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({record.seed for record in self.records}))


def make_rows(plan: Plan) -> list[Row]:
    """The rows that there are results for, method by method, each followed by its further evaluations.

    A method whose best policies are its last ones has no second row for them.
    """
    rows: list[Row] = []
    labels = dict.fromkeys(method.label for method in plan.grid.methods)
    for label in labels:
        methods = [method for method in plan.grid.methods if method.label == label]
        cells = [cell for method in methods for cell in plan.cells[method.key]]
        records = _records(cells, None)
        figures = reported_figures(plan.grid.paper, methods[0].reported, {record.task for record in records})
        for checkpoint in CHECKPOINTS[:1] if _best_is_last(records) else CHECKPOINTS:
            rows += _row(label, "", checkpoint, records, figures)
        for variant in {variant.label: variant for method in methods for variant in method.variants}.values():
            # A control is nobody's policy.
            rows += _row("" if variant.once else label, variant.label, "last", _records(cells, variant.evaluation), {})
    return rows


def reported_figures(table: PaperTable | None, column: str | None, tasks: Iterable[str]) -> dict[str, Reported]:
    """Task → a column's figure in a table of the paper, for the tasks that it has."""
    rows = {task: find_row(table or {}, task) for task in tasks}
    return {task: row.columns[column] for task, row in rows.items() if row is not None and column in row.columns}


def reported_mean(figures: Mapping[str, Reported], tasks: Sequence[str]) -> float | None:
    """The mean of the paper's figures over tasks, where it has one of each."""
    if not tasks or not figures.keys() >= set(tasks):
        return None
    return statistics.fmean(figures[task].mean for task in tasks)


def _best_is_last(records: Sequence[TaskResult]) -> bool:
    """Whether the selection chose the last iteration in every run that has results of both checkpoints."""
    found = {name: {(r.seed, r.iterations) for r in records if r.checkpoint == name} for name in CHECKPOINTS}
    return found["best"] <= found["last"]


def _records(cells: Iterable[Cell], evaluation: Evaluation | None) -> list[TaskResult]:
    return [record for cell in cells for record in cell.records(evaluation)]


def _row(
    label: str, variant: str, checkpoint: str, records: Sequence[TaskResult], reported: dict[str, Reported]
) -> list[Row]:
    own = [record for record in records if record.checkpoint == checkpoint]
    if not own:
        return []
    tasks = {task: _estimate([r for r in own if r.task == task]) for task in dict.fromkeys(r.task for r in own)}
    means = {}
    for split in SPLITS:
        estimate = _mean([record for record in own if record.split == split])
        if estimate is not None:
            means[split] = estimate
    return [Row(label, variant, checkpoint, tasks, means, tuple(own), reported)]


def value_of(record: TaskResult) -> float:
    """Success in percent, or the normalised score (where there is none, the return)."""
    if record.success_rate is not None:
        return 100 * record.success_rate
    value = record.returns_mean if record.normalised_score is None else record.normalised_score
    assert value is not None  # a record holds successes or returns
    return value


def _estimate(records: Sequence[TaskResult]) -> Estimate:
    counts = [record.successes for record in records]
    total = None if None in counts else sum(count or 0 for count in counts)
    return Estimate(tuple(map(value_of, records)), sum(record.episodes for record in records), total)


def _mean(records: Sequence[TaskResult]) -> Estimate | None:
    """The mean over tasks, seed by seed; only of the seeds that were evaluated on all of them."""
    tasks = {record.task for record in records}
    by_seed: dict[int, dict[str, float]] = {}
    for record in records:
        by_seed.setdefault(record.seed, {})[record.task] = value_of(record)
    whole = {seed: values for seed, values in by_seed.items() if values.keys() == tasks}
    if not whole:
        return None
    means = tuple(statistics.fmean(values.values()) for values in whole.values())
    return Estimate(means, sum(record.episodes for record in records if record.seed in whole))
