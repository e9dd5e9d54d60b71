"""An experiment's picture: bars by task, or by method where these are many, with the spread over seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from llmdpd.evaluation.results import SPLITS
from llmdpd.experiments.summary import Estimate, Row, reported_mean
from llmdpd.reporting.figures import LIGHT, PAGE, SERIES, Drawing, Palette, style, to_svg
from llmdpd.tasks import base_name

_DOTS_PER_INCH = 150
_MANY_TASKS = 12
_PAPER = "reported by the paper"


def picture(rows: Sequence[Row], unit: str) -> Drawing | None:
    """The page's figure of the last checkpoints; None without results. `unit`: what the values are, with their unit."""
    with rc_context(style(PAGE)):
        figure = _draw(rows, unit, PAGE)
        return None if figure is None else Drawing(to_svg(figure, "experiment"), _description(rows, unit))


def picture_png(rows: Sequence[Row], unit: str) -> bytes | None:
    """The same as a PNG file's bytes."""
    with rc_context(style(LIGHT)):
        figure = _draw(rows, unit, LIGHT)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.set_dpi(_DOTS_PER_INCH)
        FigureCanvasAgg(figure).print_png(buffer)
        return buffer.getvalue()


def _description(rows: Sequence[Row], unit: str) -> str:
    return f"{unit} of the last checkpoints: {', '.join(row.title for row in _last(rows))}. The table has the numbers."


def _last(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.checkpoint == "last"]


def _draw(rows: Sequence[Row], unit: str, palette: Palette) -> Figure | None:
    shown = _last(rows)
    if not shown:
        return None
    methods = [row for row in shown if not row.variant]
    if len(methods) <= SERIES and len(shown) <= SERIES + 4:
        return _by_task(methods, unit, palette)
    return _by_method(shown, unit, palette)


def _groups(rows: Sequence[Row]) -> list[tuple[str, str, str | None]]:
    """What stands on the axis: (split, words, task), unseen first as in the paper; of many seen tasks their mean."""
    tasks: dict[str, list[str]] = {split: [] for split in reversed(SPLITS)}
    for row in rows:
        for record in row.records:
            if record.task not in tasks[record.split]:
                tasks[record.split].append(record.task)
    groups: list[tuple[str, str, str | None]] = []
    for split, names in tasks.items():
        if len(names) > _MANY_TASKS:
            groups.append((split, f"mean of\n{len(names)} tasks", None))
        else:
            groups += [(split, base_name(task), task) for task in names]
    return groups


def _by_task(rows: Sequence[Row], unit: str, palette: Palette) -> Figure:
    """Figure 2's manner: a group of bars a task, a bar a method."""
    groups = _groups(rows)
    figure = Figure(figsize=(max(6.0, 1.2 + len(groups) * (0.5 + 0.28 * len(rows))), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(rows)
    places = [index + 0.5 * (split != groups[0][0]) for index, (split, _, _) in enumerate(groups)]
    paper = False
    for number, row in enumerate(rows):
        colour = palette.series[number % SERIES]
        for (split, _, task), place in zip(groups, places, strict=True):
            x = place + (number - (len(rows) - 1) / 2) * width
            estimate = row.means.get(split) if task is None else row.tasks.get(task)
            if estimate is not None:
                _bar(axes, x, estimate, width * 0.9, colour, palette)
            reported = None if task is None else row.reported.get(task)
            if reported is not None:
                paper = True
                axes.errorbar(x, reported.mean, yerr=reported.std, color=palette.muted, linewidth=1, capsize=2)
                axes.plot(x, reported.mean, marker="D", markersize=6, markerfacecolor="none", color=palette.ink)
    axes.set_xticks(places, [f"{words}\n({split})" for split, words, _ in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(unit)
    axes.set_ylim(*_limits(axes.get_ylim(), unit))
    handles = [Patch(facecolor=palette.series[i % SERIES], label=row.title) for i, row in enumerate(rows)]
    mark = Line2D([], [], marker="D", markerfacecolor="none", color=palette.ink, linestyle="none", label=_PAPER)
    figure.legend(handles=[*handles, *([mark] if paper else [])], loc="outside upper left", ncols=2)
    return figure


def _limits(drawn: tuple[float, float], unit: str) -> tuple[float, float]:
    """All of 0 to 100 where it is a share of episodes; else from zero to what was drawn."""
    return (0.0, 101.0) if "%" in unit else (min(0.0, drawn[0]), drawn[1])


def _bar(axes: Axes, x: float, estimate: Estimate, width: float, colour: str, palette: Palette) -> None:
    axes.bar(x, estimate.mean, width, color=colour, linewidth=0)
    if estimate.std is not None:
        axes.errorbar(x, estimate.mean, yerr=estimate.std, color=palette.ink, capsize=3, linewidth=1.2)


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
        told = reported_mean(row.reported, sorted({r.task for r in row.records if r.split == split}))
        if told is not None:
            paper = True
            axes.plot(told, place, marker="D", markersize=6, markerfacecolor="none", color=palette.ink)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(*_limits(axes.get_xlim(), unit))
    marks = f"dots: seeds; diamonds: {_PAPER}" if paper else "dots: seeds"
    # The labels beside the bars leave little width for it.
    axes.set_xlabel(f"{unit}, mean over the {split} tasks\n{marks}")
    return figure
