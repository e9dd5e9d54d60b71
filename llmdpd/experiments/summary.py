"""From an experiment's results to the rows of its table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmdpd.evaluation.results import CHECKPOINTS, SPLITS, TaskResult
from llmdpd.experiments.cell import Cell, Evaluation
from llmdpd.experiments.plan import Plan
from llmdpd.reporting.estimate import Estimate, best_is_last, mean_estimate, task_estimates
from llmdpd.reporting.paper import PaperTable, Reported, find_row


@dataclass(frozen=True)
class Row:
    """Results of one method, or of another evaluation of it, with one checkpoint; non-learned baselines have no label.

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
        figures = reported_figures(plan.grid.paper, methods[0].reported, [record.task for record in records])
        for checkpoint in CHECKPOINTS[:1] if best_is_last(records) else CHECKPOINTS:
            rows += _row(label, "", checkpoint, records, figures)
        for variant in {variant.label: variant for method in methods for variant in method.variants}.values():
            own = "" if variant.once else label
            rows += _row(own, variant.label, "last", _records(cells, variant.evaluation), {})
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


def _records(cells: Iterable[Cell], evaluation: Evaluation | None) -> list[TaskResult]:
    return [record for cell in cells for record in cell.records(evaluation)]


def _row(
    label: str, variant: str, checkpoint: str, records: Sequence[TaskResult], reported: dict[str, Reported]
) -> list[Row]:
    own = _held_out_once([record for record in records if record.checkpoint == checkpoint])
    if not own:
        return []
    means = {split: mean_estimate(r for r in own if r.split == split) for split in SPLITS}
    known = {split: mean for split, mean in means.items() if mean is not None}
    return [Row(label, variant, checkpoint, task_estimates(own), known, tuple(own), reported)]


def _held_out_once(records: Sequence[TaskResult]) -> list[TaskResult]:
    """Of a row of folds, whose runs hold out each other's seen tasks, the records of held-out tasks alone.

    A task that several of them have seen has as many records of one seed, which are no spread over seeds.
    """
    seen, held_out = ({record.task for record in records if record.split == split} for split in SPLITS)
    return [record for record in records if record.split == SPLITS[1]] if seen & held_out else list(records)
