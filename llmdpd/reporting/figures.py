"""Figures as inline SVG whose colours are the page's CSS variables, so that they follow its light and dark design."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmdpd.evaluation.results import TaskResult
from llmdpd.reporting.compare import Arm
from llmdpd.reporting.estimate import Estimate, tasks_by_split
from llmdpd.reporting.paper import TABLE_1, find_row
from llmdpd.reporting.run import Run
from llmdpd.utils.extras import extra

with extra("report"):
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

SERIES = 6  # colours that report.css.j2 defines as --s0 ... --s5; more arms than that repeat them
_PANELS = 12
_MANY = 12  # tasks of a split, from which on the figure has their mean alone
_THIN = 600  # points of one drawn curve (more cannot be told apart), fewer where many runs share the page


@dataclass(frozen=True)
class Palette:
    """Colours of a figure: of text, of what stands back, of the grid, and of the series."""

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    background: str


# Colours that matplotlib writes and nothing else does, each replaced by a CSS variable.
PAGE = Palette("#010203", "#010204", "#010205", tuple(f"#0102{16 + index:02x}" for index in range(SERIES)), "none")
# For pictures, which follow no page: the light ones of report.css.
_LIGHT_SERIES = ("#1f6fb2", "#c2570c", "#23804a", "#8a4fb0", "#a8770a", "#b03060")
LIGHT = Palette("#1a2027", "#5a6572", "#dde2e8", _LIGHT_SERIES, "#ffffff")
_INK, _MUTED, _SERIES_COLOURS = PAGE.ink, PAGE.muted, PAGE.series
_VARIABLES = {PAGE.ink: "--ink", PAGE.muted: "--muted", PAGE.grid: "--line"} | {
    colour: f"--s{index}" for index, colour in enumerate(PAGE.series)
}
_SUCCESS = "success rate in training's own evaluations"
_SCORE = "normalised score in training's own evaluations"


def style(palette: Palette) -> dict[Any, Any]:
    """matplotlib's settings for a figure in these colours."""
    return {
        "text.parse_math": False,  # a $ in a name is a $
        "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and takes the page's font
        "svg.hashsalt": "llmdpd",
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), palette.background),
        "font.size": 11.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": palette.muted,
        "axes.titlesize": 11.0,
        "axes.titlelocation": "left",
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), palette.ink),
        **dict.fromkeys(("xtick.color", "ytick.color"), palette.muted),
        "grid.color": palette.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }


@dataclass(frozen=True)
class Drawing:
    """One figure: SVG markup for the page, and a sentence that says what it shows to who cannot see it."""

    svg: Markup
    description: str


def success_figure(arms: Sequence[Arm]) -> Drawing | None:
    """Bars of success by task with intervals, unseen above seen, and marks at the paper's figures.

    Of a split with many tasks their mean alone is drawn: the table has each.
    """
    rows = axis_rows(record for arm in arms for record in arm.select())
    if not rows:
        return None
    series = [(index, arm, checkpoint) for index, arm in enumerate(arms) for checkpoint in arm.checkpoints]
    thickness = 0.8 / len(series)
    with rc_context(style(PAGE)):
        legend_rows, splits = math.ceil((len(series) + 2) / 2), len({row.split for row in rows})
        height = 0.55 + 0.3 * legend_rows + len(rows) * max(0.62, 0.2 * len(series)) + 0.35 * splits
        figure = Figure(figsize=(10, height), layout="constrained")
        axes = figure.add_subplot()
        places = positions(rows)
        for place, (index, arm, checkpoint) in enumerate(series):
            offset = (place - (len(series) - 1) / 2) * thickness
            for row, y in zip(rows, places, strict=True):
                split, task = row.split, row.task
                value = arm.estimates(split, checkpoint).get(task) if task else arm.mean(split, checkpoint)
                if value is not None:
                    _bar(axes, value, y + offset, thickness * 0.86, _SERIES_COLOURS[index % SERIES], checkpoint)
        marked = _paper_marks(axes, rows, places)
        _success_axes(axes, rows, places)
        handles = [
            Patch(
                facecolor=_SERIES_COLOURS[index % SERIES],
                alpha=_alpha(checkpoint),
                label=f"{checkpoint} checkpoint" if len(arms) == 1 else _label(f"{arm.label}: {checkpoint}"),
            )
            for index, arm, checkpoint in series
        ]
        figure.legend(handles=handles + marked, loc="outside upper left", ncols=2)
        shown = ", ".join(row.words for row in rows)
        description = f"Success in percent by task with intervals: {shown}. The table has the numbers."
        return Drawing(to_svg(figure, "success"), description)


class AxisRow(NamedTuple):
    """One entry on a figure's axis of tasks; no task for the mean of a split."""

    split: str
    words: str
    task: str | None = None


def axis_rows(records: Iterable[TaskResult]) -> list[AxisRow]:
    """The tasks of these results, unseen first; of a split with many tasks their mean alone."""
    rows = []
    for split, names in tasks_by_split(records).items():
        mean = [AxisRow(split, f"mean of {len(names)} tasks")]
        rows += mean if len(names) > _MANY else [AxisRow(split, name, name) for name in names]
    return rows


def positions(rows: Sequence[AxisRow]) -> list[float]:
    """A place on the axis for every row, in order, with a gap between the splits."""
    gaps = [0.6 * (row.split != rows[0].split) for row in rows]
    return [index + gap for index, gap in enumerate(gaps)]


def _alpha(checkpoint: str) -> float:
    return 1.0 if checkpoint == "last" else 0.45


def _bar(axes: Axes, value: Estimate, y: float, thickness: float, colour: str, checkpoint: str) -> None:
    axes.barh(y, value.mean, thickness, color=colour, alpha=_alpha(checkpoint), linewidth=0)
    if value.bar is not None:
        low, high = value.bar
        error = [[max(0.0, value.mean - low)], [max(0.0, high - value.mean)]]
        axes.errorbar(value.mean, y, xerr=error, color=_INK, capsize=3, linewidth=1.2)


def _paper_marks(axes: Axes, rows: Sequence[AxisRow], places: Sequence[float]) -> list[Line2D]:
    own: dict[str, Any] = {"marker": "D", "markersize": 7, "markerfacecolor": "none", "color": _INK, "linestyle": ""}
    other: dict[str, Any] = {"marker": "|", "markersize": 15, "markeredgewidth": 2.5, "color": _MUTED, "linestyle": ""}
    found = False
    for row, y in zip(rows, places, strict=True):
        paper = find_row(TABLE_1, row.task or "")
        if paper is not None:
            found = True
            axes.errorbar(paper.llmdpd.mean, y - 0.44, xerr=paper.llmdpd.std, color=_INK, linewidth=1)
            axes.plot(paper.llmdpd.mean, y - 0.44, **own)
            axes.plot(paper.baseline.mean, y - 0.44, **other)
    labels = ("reported by the paper: LLMDPD", "reported by the paper: MTDIFF")
    return [Line2D([], [], label=label, **style) for label, style in zip(labels, (own, other), strict=True) if found]


def _success_axes(axes: Axes, rows: Sequence[AxisRow], places: Sequence[float]) -> None:
    axes.set_yticks(places, [f"{row.words}\n({row.split})" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 101)
    axes.set_ylim(places[-1] + 0.55, -0.65)
    axes.set_xlabel("success, % of episodes")


def curve_figure(runs: Sequence[Run]) -> tuple[Drawing | None, list[str]]:
    """Learning curves, a panel per metric, and the names of recorded metrics for which there was no panel."""
    panels = _panels({name for run in runs for name in run.curves})
    shown, left = list(panels.items())[:_PANELS], list(panels.items())[_PANELS:]
    if not shown:
        return None, []
    with rc_context(style(PAGE)):
        rows = math.ceil(len(shown) / 2)
        figure = Figure(figsize=(10, 2.7 * rows + (0.3 * len(runs) if len(runs) > 1 else 0)), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes, (title, names) in zip(grid.flat, shown, strict=False):
            _panel(axes, title, names, runs)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        if len(runs) > 1:
            entries = [(_SERIES_COLOURS[index % SERIES], _label(run.name)) for index, run in enumerate(runs)]
            handles = [Line2D([], [], color=colour, label=name) for colour, name in entries]
            figure.legend(handles=handles, loc="outside upper left", ncols=3)
        titles = ", ".join(title for title, _ in shown)
        drawing = Drawing(to_svg(figure, "curves"), f"Learning curves over training iterations: {titles}.")
        return drawing, [name for _, names in left for name in names]


def _label(text: str) -> str:
    """A legend's text; matplotlib takes a leading underscore as the wish to be left out."""
    return f"\u200b{text}" if text.startswith("_") else text


def _panels(names: set[str]) -> dict[str, list[str]]:
    """Panel title -> metrics. Success rates during training share one panel; what matters most comes first.

    Of many tasks the panel has their mean, and each task's own comes last.
    """
    found = sorted((name for name in names if name.startswith("eval/")), key=lambda name: ("seen_" not in name, name))
    scores = [name for name in found if name.endswith("_score")]
    success = [name for name in found if name not in scores]
    if len(success) > SERIES:
        success = [name for name in success if "seen_" in name]
    panels = {title: group for title, group in ((_SUCCESS, success), (_SCORE, scores)) if 0 < len(group) <= SERIES}
    order = {"loss": 0, "q": 1}
    rest = sorted(
        (name for name in names if not any(name in group for group in panels.values())),
        key=lambda name: (len(order) + 1 if name in found else order.get(name.split("/")[0], len(order)), name),
    )
    return panels | {name: [name] for name in rest}


def _panel(axes: Axes, title: str, names: Sequence[str], runs: Sequence[Run]) -> None:
    styles: list[Any] = ["-", "--", ":", "-."]
    for run_index, run in enumerate(runs):
        for index, name in enumerate(names):
            if name in run.curves:
                colour = _SERIES_COLOURS[(index if len(runs) == 1 else run_index) % SERIES]
                points = run.curves[name]
                _curve(axes, points, colour, styles[index % len(styles)], min(_THIN, 4 * _THIN // len(runs)))
    axes.set_title(title)
    axes.set_xlabel("iteration")
    if len(names) > 1:
        colours = _SERIES_COLOURS if len(runs) == 1 else [_INK] * SERIES
        looks = zip(colours, itertools.cycle(styles), (name.removeprefix("eval/") for name in names), strict=False)
        handles = [Line2D([], [], color=colour, linestyle=line, label=name) for colour, line, name in looks]
        axes.legend(handles=handles, fontsize=9)
    if title == _SUCCESS:
        axes.set_ylim(-0.03, 1.03)


def _curve(axes: Axes, points: Sequence[tuple[int, float]], colour: str, style: str, most: int) -> None:
    iterations, values = (np.asarray(column, float) for column in zip(*points, strict=True))
    if len(values) <= 60:
        axes.plot(iterations, values, color=colour, linestyle=style, marker="o", markersize=3)
        return
    # Single batches are noisy: they stay visible, faint, behind the mean of the 5 % of points around.
    width = max(3, len(values) // 20)
    padded = np.concatenate([np.repeat(values[0], width // 2), values, np.repeat(values[-1], width - 1 - width // 2)])
    smooth = np.convolve(padded, np.full(width, 1 / width), mode="valid")
    chosen = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
    axes.plot(iterations[chosen], values[chosen], color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(iterations[chosen], smooth[chosen], color=colour, linestyle=style, linewidth=1.8)


def to_svg(figure: Figure, name: str) -> Markup:
    """The figure, in PAGE's colours, as markup for an HTML page; `name` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return Markup(re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg))
