"""A picture of a task file's tasks: where the layout's points are over one episode of each, to see a wrong index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmdpd.reporting.figures import LIGHT, style
from llmdpd.tasks.layout import Layout
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_writer

with extra("report"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Episode = NDArray[np.float32]
"""Observations [T, S] of an episode."""

_AXES = ("x", "y", "z")
_NUMBERS = 8
_MADE_BY = "llmdpd tasks check"
# Bytes of a PNG within which its texts are.
_HEAD = 4096
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def save_task_picture(path: Path, episodes: Mapping[str, Episode], layout: Layout | None) -> None:
    """Write a PNG with a row for each task of `episodes`.

    With a layout: the paths of its points seen from above (a dot where one begins, lines thin where it rests), their
    heights, and the gripper with the scalars over time. Without one: the first numbers of the observations over time.
    """
    names = list(episodes)
    columns = 1 if layout is None else 3
    with rc_context(style(LIGHT)):
        figure = Figure(figsize=(4.4 * columns + 1.6, 2.9 * len(names) + 0.4), dpi=90, layout="constrained")
        panels = figure.subplots(len(names), columns, squeeze=False)
        for row, name in zip(panels, names, strict=True):
            if layout is None:
                _numbers(row[0], episodes[name], dict.fromkeys(range(min(episodes[name].shape[1], _NUMBERS)), "number"))
            else:
                _above(row[0], episodes[name], layout)
                _heights(row[1], episodes[name], layout)
                names_of = dict.fromkeys(layout.gripper, "gripper") | dict.fromkeys(layout.scalars, "scalar")
                _numbers(row[2], episodes[name], names_of)
            row[0].set_title(name, fontweight="bold")
        for axes in panels[:, 1 if layout is not None else 0 :].ravel():
            axes.set_xlabel("step of the episode")
        with atomic_writer(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": _MADE_BY})


def is_task_picture(path: Path) -> bool:
    """Whether a file is a picture that `save_task_picture` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f"Software\0{_MADE_BY}".encode() in file.read(_HEAD)


def _colour(number: int) -> str:
    return LIGHT.series[number % len(LIGHT.series)]


def _above(axes: Axes, episode: Episode, layout: Layout) -> None:
    """The points' paths over the two horizontal axes, or over the first two."""
    across, along = layout.horizontal or (0, 1)
    for number, point in enumerate(layout.points):
        places = episode[:, list(point.at)]
        places = places[(places != 0).any(axis=1)]  # all zeros: the point is absent
        marker = _MARKERS[number % len(_MARKERS)]
        label = point.name if len(places) else f"{point.name} (absent)"
        axes.plot(places[:, across], places[:, along], color=_colour(number), linewidth=1.6, label=label)
        axes.plot(places[:1, across], places[:1, along], marker, color=_colour(number), markersize=6)
    axes.set_xlabel(_AXES[across])
    axes.set_ylabel(_AXES[along])
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _heights(axes: Axes, episode: Episode, layout: Layout) -> None:
    """The points' vertical coordinate over time; where nothing says what is vertical, the last one."""
    axis = layout.dimensions - 1 if layout.up is None else layout.up
    for number, point in enumerate(layout.points):
        axes.plot(episode[:, point.at[axis]], color=_colour(number), linewidth=1.6)
    axes.set_ylabel(_AXES[axis])


def _numbers(axes: Axes, episode: Episode, places: Mapping[int, str]) -> None:
    """Numbers of the observations over time, by their index and what they are."""
    for number, (place, what) in enumerate(places.items()):
        dashes = "-" if number < len(LIGHT.series) else "--"
        axes.plot(episode[:, place], dashes, color=_colour(number), linewidth=1.6, label=f"{what} {place}")
    if places:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    else:
        axes.set_axis_off()
