"""An experiment's page, figure and tables, written beside its cells."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.evaluation.intervals import BOOTSTRAP_SAMPLES, BOOTSTRAP_SEED
from llmdpd.evaluation.results import SPLITS
from llmdpd.experiments.cell import Cell
from llmdpd.experiments.pictures import draw_rows
from llmdpd.experiments.plan import Plan
from llmdpd.experiments.scheduler import Outcome
from llmdpd.experiments.summary import Row, make_rows, reported_figures, reported_mean
from llmdpd.reporting.compare import Arm, flatten
from llmdpd.reporting.estimate import Estimate
from llmdpd.reporting.page import measure, metadata, render_template
from llmdpd.reporting.paper import Reported
from llmdpd.tasks import base_name
from llmdpd.utils.files import atomic_write_bytes, atomic_write_json, atomic_write_text, read_json

SCHEMA = 1
_SPLIT_WORDS = {"seen": "Tasks that were trained on", "unseen": "Tasks that were never trained on"}
_PAPERS = "the paper's"
_WIDE = 8  # tasks that a table has columns for; of more it has the mean, and a table of their own is folded away


def write_page(plan: Plan, outcomes: Sequence[Outcome], command: Sequence[str]) -> Path:
    """Write NAME.html, NAME.md, NAME.json and, where there are results, NAME.png into the experiment's folder.

    `outcomes`: how the cells ended that were just run. Returns the page's path.

    Raises:
        InputError: results that can't be read.
    """
    rows = make_rows(plan)
    scores = any(record.successes is None for row in rows for record in row.records)
    unit = "normalised score" if scores else "success, % of episodes"
    page = plan.out / f"{plan.settings.experiment}.html"
    tables = [table for split in reversed(SPLITS) if (table := _table(plan, rows, split))]
    cells = [_cell_view(cell, plan, outcomes) for group in plan.cells.values() for cell in group]
    conditions = {
        "title": plan.grid.title,
        "protocol": plan.protocol,
        "budget": plan.settings.budget,
        "episodes": plan.episodes,
        "seen_episodes": plan.settings.seen_episodes or plan.episodes,
        "seeds": plan.settings.seeds,
        "command": shlex.join(command),
    }
    drawn = draw_rows(rows, unit)
    if drawn is not None:
        atomic_write_bytes(page.with_suffix(".png"), drawn[1])
    described = {
        "schema": SCHEMA,
        "experiment": plan.settings.experiment,
        **conditions,
        "bootstrap": {"draws": BOOTSTRAP_SAMPLES, "seed": BOOTSTRAP_SEED},
        "skipped": plan.skipped,
        "rows": [_row_json(row, _metadata(plan, row)) for row in rows],
        "cells": [{name: value for name, value in view.items() if name != "times"} for view in cells],
    }
    atomic_write_json(page.with_suffix(".json"), described)
    atomic_write_text(page.with_suffix(".md"), _markdown(tables))
    html = render_template(
        "experiment.html.j2",
        **conditions,
        about=plan.grid.about,
        cells=cells,
        done=sum(view["state"] == "done" for view in cells),
        skipped=[(m.label, plan.skipped[m.key]) for m in plan.grid.methods if m.key in plan.skipped],
        metadata=[(f"{row.title}, {row.checkpoint} checkpoint", _metadata(plan, row)) for row in rows],
        resamples=BOOTSTRAP_SAMPLES,
        resample_seed=BOOTSTRAP_SEED,
        wide=True,
        unit=unit,
        tables=tables,
        figure=None if drawn is None else drawn[0],
    )
    atomic_write_text(page, html)
    return page


def _metadata(plan: Plan, row: Row) -> dict[str, str]:
    """What a row's results were obtained with; a non-learned baseline's have no method."""
    methods = [plan.cells[method.key][0].config.method for method in plan.grid.methods if method.label == row.label]
    found = metadata(Arm(row.title, row.records)) | (methods[0].details() if methods else {})
    del found["results of"]
    return found


def _cell_view(cell: Cell, plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    failed = next((o for o in outcomes if o.cell.name == cell.name and o.failed_step), None)
    meta = _meta(cell)
    times, acting = meta.get("times", {}), meta.get("acting", {})
    training = times.get("training_seconds")
    iterations = cell.config.training.iterations
    return {
        "name": cell.name,
        "method": cell.method,
        "seed": cell.config.seed,
        "state": "failed" if failed else "skipped" if cell.method in plan.skipped else _state(cell, plan),
        "failure": failed.log_tail if failed else "",
        "iterations": iterations,
        "times": {name: measure(name, value) for name, value in times.items()},
        "seconds": times,
        "parameters": acting.get("parameters"),  # of the acting network
        "iteration_ms": None if training is None else round(1e3 * training / iterations, 2),
        "action_ms": acting.get("milliseconds_an_action"),
        "machine": _line(meta.get("machine", {})),
        "versions": _line(meta.get("versions", {})),
        "command": shlex.join(map(str, meta.get("command", {}).get("argv", []))),
        "report": f"{cell.name}/report.html" if (cell.folder / "report.html").is_file() else "",
    }


def _state(cell: Cell, plan: Plan) -> str:
    """The cell's state; the folder of a cell that was not asked for now may have been made with other options."""
    try:
        return cell.state
    except InputError:
        if cell.method in plan.chosen:
            raise
        return "other options"


def _meta(cell: Cell) -> dict[str, Any]:
    if not cell.run.meta.is_file():
        return {}
    meta = read_json(cell.run.meta)
    if not isinstance(meta, dict):
        raise InputError("not an object", path=cell.run.meta, found=type(meta).__name__, expected="a JSON object")
    return meta


def _line(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in flatten(values).items() if name)


def _table(plan: Plan, rows: Sequence[Row], split: str) -> dict[str, Any] | None:
    """A split's table: a line a method, then the paper's other methods.

    The cells of a line are, for each task and for their mean, our estimate (None: not evaluated, "": not ours) and,
    where the paper has a figure in that column, the paper's.
    """
    # A method that was trained on a task and another that was not do not share a column.
    found = [(row, {r.task: row.tasks[r.task] for r in row.records if r.split == split}) for row in rows]
    own = [(row, estimates) for row, estimates in found if estimates]
    tasks = list(dict.fromkeys(task for _, estimates in own for task in estimates))
    if not tasks:
        return None
    columns = tasks if len(tasks) <= _WIDE else []
    others = {name: reported_figures(plan.grid.paper, name, columns) for name in plan.grid.others}
    figures = {name: figures for name, figures in others.items() if figures}
    reported = [{task: figure for task, figure in row.reported.items() if task in estimates} for row, estimates in own]
    known = {task for row in (*figures.values(), *reported) for task in row}
    with_mean = bool(known) and known >= set(columns) and len(columns) > 1

    def line(title: str, checkpoint: str, ours: Sequence[object], paper: dict[str, Reported]) -> dict[str, Any]:
        cells = []
        for task, value in zip((*columns, None), ours, strict=True):
            cells.append((True, value))
            if task is None and with_mean:
                mean = reported_mean(paper, columns)
                cells.append((False, "" if mean is None else f"{mean:.1f}"))
            elif task in known:
                cells.append((False, paper.get(task or "", "")))
        return {"title": title, "checkpoint": checkpoint, "cells": cells}

    lines = [
        line(row.title, row.checkpoint, [*map(estimates.get, columns), row.means.get(split)], paper)
        for (row, estimates), paper in zip(own, reported, strict=True)
    ]
    lines += [line(name, _PAPERS, [""] * (len(columns) + 1), paper) for name, paper in figures.items()]
    return {
        "name": _SPLIT_WORDS[split],
        "split": split,
        "columns": [*((base_name(task), task in known) for task in columns), (f"mean of {len(tasks)}", with_mean)],
        "lines": lines,
        "count": len(tasks),
        "folded": [] if columns else [(base_name(t), [estimates.get(t) for _, estimates in own]) for t in tasks],
        "folded_names": [f"{row.title}, {row.checkpoint}" for row, _ in own],
    }


def _row_json(row: Row, conditions: dict[str, str]) -> dict[str, Any]:
    return {
        "method": row.label or None,
        "variant": row.variant or None,
        "checkpoint": row.checkpoint,
        "seeds": list(row.seeds),
        "tasks": {task: estimate.to_json() for task, estimate in row.tasks.items()},
        "means": {split: estimate.to_json() for split, estimate in row.means.items()},
        "reported_by_the_paper": {task: {"mean": paper.mean, "std": paper.std} for task, paper in row.reported.items()},
        "conditions": conditions,
    }


def _markdown(tables: Sequence[dict[str, Any]]) -> str:
    """The tables for a text page: mean ± std over seeds (95 % Wilson interval over all episodes)."""
    lines = []
    for table in tables:
        names = [word for name, reported in table["columns"] for word in (name, *(["reported"] if reported else []))]
        head = [f"{table['split']} tasks", "checkpoint", *names]
        lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for line in table["lines"]:
            title, checkpoint = line["title"], line["checkpoint"]
            first = [f"{title} ({checkpoint})", ""] if checkpoint == _PAPERS else [title, checkpoint]
            lines.append(f"| {' | '.join((*first, *(_text(value) for _, value in line['cells'])))} |")
        lines.append("")
    return "\n".join(lines)


def _text(value: object) -> str:
    if not isinstance(value, Estimate):
        return "" if value is None else str(value)
    return value.text + ("" if value.wilson is None else f" ({value.wilson[0]:.1f} to {value.wilson[1]:.1f})")
