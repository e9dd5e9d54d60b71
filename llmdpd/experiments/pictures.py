"""An experiment's figure: bars by task, or by method where these are many, with the spread over seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from llmdpd.evaluation.results import SPLITS
from llmdpd.experiments.summary import Row, reported_mean
from llmdpd.reporting.figures import LIGHT, PAGE, SERIES, Drawing, Palette, axis_rows, positions, style, to_svg
from llmdpd.tasks import base_name
from llmdpd.utils.extras import extra

with extra("report"):
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

_DOTS_PER_INCH = 150
_LETTERS, _INCHES_A_LETTER = 12, 0.085  # of a line of a task's name
_PAPER = "reported by the paper"
_DIAMOND: dict[str, Any] = {"marker": "D", "markersize": 6, "markerfacecolor": "none", "linestyle": ""}


def draw_rows(rows: Sequence[Row], unit: str) -> tuple[Drawing, bytes] | None:
    """The figure of the last checkpoints, for the page and as a PNG file's bytes; None without results.

    `unit`: what the values are, with their unit.
    """
    figure, light = _draw(rows, unit, PAGE), _draw(rows, unit, LIGHT)
    if figure is None or light is None:
        return None
    titles = ", ".join(row.title for row in rows if row.checkpoint == "last")
    description = f"{unit} of the last checkpoints: {titles}. The table has the numbers."
    with rc_context(style(PAGE)):
        svg = to_svg(figure, "experiment")
    buffer = io.BytesIO()
    with rc_context(style(LIGHT)):
        light.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return Drawing(svg, description), buffer.getvalue()


def _draw(rows: Sequence[Row], unit: str, palette: Palette) -> Figure | None:
    shown = [row for row in rows if row.checkpoint == "last"]
    if not shown:
        return None
    methods = [row for row in shown if not row.variant]
    few = len(methods) <= SERIES and len(shown) <= SERIES + 4
    with rc_context(style(palette)):
        return _by_task(methods, unit, palette) if few else _by_method(shown, unit, palette)


def _by_task(rows: Sequence[Row], unit: str, palette: Palette) -> Figure:
    """As the paper's figure 2: a group of bars a task, a bar a method."""
    groups = axis_rows(record for row in rows for record in row.records)
    names = [
        group.words.replace(" of ", " of\n") if group.task is None else fill(base_name(group.task), _LETTERS)
        for group in groups
    ]
    labels = [f"{name}\n({group.split})" for name, group in zip(names, groups, strict=True)]
    longest = max(len(line) for label in labels for line in label.splitlines())
    share = max(0.5 + 0.28 * len(rows), 0.1 + _INCHES_A_LETTER * longest)  # of the bars, of the words below them
    figure = Figure(figsize=(max(6.0, 1.2 + len(groups) * share), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width, places, paper = 0.8 / len(rows), positions(groups), False
    for number, row in enumerate(rows):
        for (split, _, task), place in zip(groups, places, strict=True):
            x = place + (number - (len(rows) - 1) / 2) * width
            estimate = row.means.get(split) if task is None else row.tasks.get(task)
            if estimate is not None:
                axes.bar(x, estimate.mean, width * 0.9, color=palette.series[number % SERIES], linewidth=0)
                if estimate.std is not None:
                    axes.errorbar(x, estimate.mean, estimate.std, color=palette.ink, capsize=3, linewidth=1.2)
            reported = row.reported.get(task or "")
            if reported is not None:
                paper = True
                axes.errorbar(x, reported.mean, yerr=reported.std, color=palette.muted, linewidth=1, capsize=2)
                axes.plot(x, reported.mean, color=palette.ink, **_DIAMOND)
    axes.set_xticks(places, labels)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(unit)
    axes.set_ylim(*_limits(axes.get_ylim(), unit))
    handles = [Patch(facecolor=palette.series[i % SERIES], label=row.title) for i, row in enumerate(rows)]
    mark = Line2D([], [], color=palette.ink, label=_PAPER, **_DIAMOND)
    figure.legend(handles=[*handles, *([mark] if paper else [])], loc="outside upper left", ncols=2)
    return figure


def _limits(drawn: tuple[float, float], unit: str) -> tuple[float, float]:
    """All of 0 to 100 where it is a share of episodes; else from zero to what was drawn."""
    return (0.0, 101.0) if "%" in unit else (min(0.0, drawn[0]), drawn[1])


def _by_method(rows: Sequence[Row], unit: str, palette: Palette) -> Figure:
    """A line a method: the mean over the unseen tasks (where there are none, the seen ones), and every seed a dot."""
    split = next(name for name in reversed(SPLITS) if any(name in row.means for row in rows))
    figure = Figure(figsize=(9, 0.9 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    paper = False
    for place, row in enumerate(rows):
        estimate = row.means.get(split)
        if estimate is None:
            continue
        colour = palette.series[1 if row.variant else 0]
        axes.barh(place, estimate.mean, 0.7, color=colour, alpha=0.75, linewidth=0)
        axes.plot(estimate.by_seed, [place] * len(estimate.by_seed), "o", markersize=4, color=palette.ink, alpha=0.7)
        reported = reported_mean(row.reported, sorted({r.task for r in row.records if r.split == split}))
        if reported is not None:
            paper = True
            axes.plot(reported, place, color=palette.ink, **_DIAMOND)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(*_limits(axes.get_xlim(), unit))
    marks = f"dots: seeds; diamonds: {_PAPER}" if paper else "dots: seeds"
    # The labels beside the bars leave little width for it.
    axes.set_xlabel(f"{unit}, mean over the {split} tasks\n{marks}")
    return figure
