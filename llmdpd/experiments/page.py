"""An experiment's page, picture and tables, written beside its cells."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.evaluation.results import SPLITS
from llmdpd.experiments.cell import Cell
from llmdpd.experiments.pictures import picture, picture_png
from llmdpd.experiments.plan import Plan
from llmdpd.experiments.schedule import Outcome
from llmdpd.experiments.summary import (
    BOOTSTRAP_DRAWS,
    BOOTSTRAP_SEED,
    Estimate,
    Row,
    make_rows,
    reported_figures,
    reported_mean,
)
from llmdpd.methods.lamo.checks import language_words
from llmdpd.reporting.compare import Arm, flatten
from llmdpd.reporting.page import drawing_values, facts, measure, render_template
from llmdpd.reporting.paper import Reported
from llmdpd.reporting.run import Run
from llmdpd.tasks import base_name
from llmdpd.utils.files import atomic_write_bytes, atomic_write_json, atomic_write_text, read_json

SCHEMA = 1
_SPLIT_WORDS = {"seen": "Tasks that were trained on", "unseen": "Tasks that were never trained on"}
_WIDE = 8  # tasks that a table has columns for; of more it has the mean, and a table of their own is folded away


def write_page(plan: Plan, outcomes: Sequence[Outcome], command: Sequence[str]) -> Path:
    """Write NAME.html, NAME.md, NAME.json and, where there are results, NAME.png into the experiment's folder.

    `outcomes`: what became of the cells that were just run. Returns the page's path.

    Raises:
        InputError: results that can't be read.
    """
    rows = make_rows(plan)
    unit = _unit(rows)
    page = plan.out / f"{plan.settings.experiment}.html"
    values = _values(plan, rows, outcomes, command)
    png = picture_png(rows, unit)
    if png is not None:
        atomic_write_bytes(page.with_suffix(".png"), png)
    atomic_write_json(page.with_suffix(".json"), _to_json(plan, rows, values))
    atomic_write_text(page.with_suffix(".md"), markdown(plan, rows))
    drawing = drawing_values(picture(rows, unit))
    atomic_write_text(page, render_template("experiment.html.j2", wide=True, figure=drawing, unit=unit, **values))
    return page


def _unit(rows: Sequence[Row]) -> str:
    scores = any(record.successes is None for row in rows for record in row.records)
    return "normalised score" if scores else "success, % of episodes"


def _values(plan: Plan, rows: Sequence[Row], outcomes: Sequence[Outcome], command: Sequence[str]) -> dict[str, Any]:
    cells = [_cell_view(cell, plan, outcomes) for group in plan.cells.values() for cell in group]
    machines = list(dict.fromkeys(view["machine"] for view in cells if view["machine"]))
    versions = list(dict.fromkeys(view["versions"] for view in cells if view["versions"]))
    return {
        "title": plan.grid.title,
        "about": plan.grid.about,
        "protocol": plan.protocol,
        "budget": plan.settings.budget,
        "episodes": plan.episodes,
        "seen_episodes": plan.settings.seen_episodes or plan.episodes,
        "seeds": plan.settings.seeds,
        "done": sum(view["state"] == "done" for view in cells),
        "cells": cells,
        "skipped": [(_label(plan, key), reason) for key, reason in plan.skipped.items()],
        "tables": [table for split in reversed(SPLITS) if (table := _table(plan, rows, split))],
        "facts": [_facts(plan, row) for row in rows],
        "machines": machines,
        "versions": versions,
        "command": shlex.join(command),
        "draws": BOOTSTRAP_DRAWS,
        "draw_seed": BOOTSTRAP_SEED,
    }


def _label(plan: Plan, key: str) -> str:
    return next(method.label for method in plan.grid.methods if method.key == key)


def _facts(plan: Plan, row: Row) -> tuple[str, dict[str, str]]:
    """What a row's results were obtained with."""
    arm = Arm(row.title, ((Run(Path(row.title), row.records), row.records),))
    told = facts(arm)
    del told["results of"]
    if row.records[0].method == "lamo":
        key = next(method.key for method in plan.grid.methods if method.label == row.label)
        told["language model"] = language_words(plan.cells[key][0].config)
    return f"{row.title}, {row.checkpoint} checkpoint", told


def _cell_view(cell: Cell, plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    failed = next((o for o in outcomes if o.cell.name == cell.name and o.failed_step), None)
    meta = _meta(cell)
    report = cell.folder / "report.html"
    command = meta.get("command", {}).get("argv", [])
    return {
        "name": cell.name,
        "method": cell.method,
        "seed": cell.config.seed,
        "state": "failed" if failed else "skipped" if cell.method in plan.skipped else _state(cell, plan),
        "failure": failed.log_tail if failed else "",
        "iterations": cell.config.training.iterations,
        "times": {name: measure(name, value) for name, value in meta.get("times", {}).items()},
        "seconds": meta.get("times", {}),
        **_costs(cell, meta),
        "machine": _line(meta.get("machine", {})),
        "versions": _line(meta.get("versions", {})),
        "command": shlex.join(map(str, command)),
        "report": f"{cell.name}/report.html" if report.is_file() else "",
    }


def _costs(cell: Cell, meta: dict[str, Any]) -> dict[str, float | None]:
    """The acting network's parameters; milliseconds of an iteration of training, and of an action."""
    acting, seconds = meta.get("acting", {}), meta.get("times", {}).get("training_seconds")
    return {
        "parameters": acting.get("parameters"),
        "iteration_ms": None if seconds is None else round(1e3 * seconds / cell.config.training.iterations, 2),
        "action_ms": acting.get("milliseconds_an_action"),
    }


def _state(cell: Cell, plan: Plan) -> str:
    """The cell's state; of a cell that was not asked for now, the folder may have been made with other options."""
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
    """A split's table: methods in rows; for each task our estimate and, where the paper has one, its figure."""
    tasks = list(dict.fromkeys(r.task for row in rows for r in row.records if r.split == split))
    if not tasks:
        return None
    columns = tasks if len(tasks) <= _WIDE else []
    # A method that was trained on a task and another that was not do not share a column.
    own = [_only(row, split) for row in rows]
    others = {name: reported_figures(plan.grid.paper, name, columns) for name in plan.grid.others}
    told = {task for figures in (*others.values(), *(row.reported for row in own)) for task in figures}
    return {
        "name": _SPLIT_WORDS[split],
        "split": split,
        "columns": [(base_name(task), task, task in told) for task in columns],
        "reported_mean": bool(told) and told >= set(columns) and len(columns) > 1,
        "rows": [(row, row.means.get(split), _paper_mean(row.reported, columns)) for row in own if row.tasks],
        "others": [(name, figures, _paper_mean(figures, columns)) for name, figures in others.items() if figures],
        "folded": [] if columns else [(base_name(task), [row.tasks.get(task) for row in own]) for task in tasks],
        "folded_names": [] if columns else [f"{row.title}, {row.checkpoint}" for row in own],
        "count": len(tasks),
    }


def _only(row: Row, split: str) -> Row:
    """The row with the tasks of a split alone."""
    tasks = {record.task for record in row.records if record.split == split}
    return Row(
        row.label,
        row.variant,
        row.checkpoint,
        {task: estimate for task, estimate in row.tasks.items() if task in tasks},
        row.means,
        row.records,
        {task: figure for task, figure in row.reported.items() if task in tasks},
    )


def _paper_mean(figures: dict[str, Reported], tasks: Sequence[str]) -> str:
    mean = reported_mean(figures, tasks)
    return "" if mean is None else f"{mean:.1f}"


def _to_json(plan: Plan, rows: Sequence[Row], values: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "experiment": plan.settings.experiment,
        **{
            name: values[name]
            for name in ("title", "protocol", "budget", "episodes", "seen_episodes", "seeds", "command")
        },
        "bootstrap": {"draws": BOOTSTRAP_DRAWS, "seed": BOOTSTRAP_SEED},
        "skipped": plan.skipped,
        "rows": [
            {
                "method": row.label or None,
                "variant": row.variant or None,
                "checkpoint": row.checkpoint,
                "seeds": list(row.seeds),
                "tasks": {task: estimate.to_json() for task, estimate in row.tasks.items()},
                "means": {split: estimate.to_json() for split, estimate in row.means.items()},
                "reported_by_the_paper": {
                    task: {"mean": figure.mean, "std": figure.std} for task, figure in row.reported.items()
                },
                "facts": told,
            }
            for row, (_, told) in zip(rows, values["facts"], strict=True)
        ],
        "cells": [{name: value for name, value in view.items() if name != "times"} for view in values["cells"]],
    }


def markdown(plan: Plan, rows: Sequence[Row]) -> str:
    """The tables for a text page: mean ± std over seeds (95 % Wilson interval over all episodes)."""
    lines = []
    for split in reversed(SPLITS):
        table = _table(plan, rows, split)
        if table is None:
            continue
        names = [word for title, _, told in table["columns"] for word in (title, *(["reported"] if told else []))]
        mean = [f"mean of {table['count']}", *(["reported"] if table["reported_mean"] else [])]
        head = [f"{split} tasks", "checkpoint", *names, *mean]
        lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for row, own_mean, paper_mean in table["rows"]:
            words = [row.title, row.checkpoint]
            for _, task, told in table["columns"]:
                words += [_brief(row.tasks.get(task)), *([str(row.reported.get(task, ""))] if told else [])]
            words += [_brief(own_mean), *([paper_mean] if table["reported_mean"] else [])]
            lines.append(f"| {' | '.join(words)} |")
        for name, figures, paper_mean in table["others"]:
            words = [f"{name} (the paper's)", ""]
            for _, task, told in table["columns"]:
                words += ["", *([str(figures.get(task, ""))] if told else [])]
            words += ["", *([paper_mean] if table["reported_mean"] else [])]
            lines.append(f"| {' | '.join(words)} |")
        lines.append("")
    return "\n".join(lines)


def _brief(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    interval = estimate.wilson
    return estimate.text + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")
