"""The experiment's picture: what is drawn is what the rows say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from llmdpd.experiments.pictures import _by_method, _by_task
from llmdpd.experiments.plan import Plan
from llmdpd.experiments.summary import make_rows
from llmdpd.reporting.figures import LIGHT


def test_a_line_a_method_has_its_seeds_and_the_papers_mean(
    make_test_plan: Callable[..., Plan], finish: Callable[..., None]
) -> None:
    plan = make_test_plan()
    for seed, count in enumerate((10, 31)):
        finish(plan.cells["full"][seed], {"reach-v3": 40, "door-lock-v3": count}, iterations=200)
    finish(plan.cells["plain"][0], {"reach-v3": 40, "door-lock-v3": 20}, iterations=200)
    axes = _by_method(make_rows(plan), "success, % of episodes", LIGHT).axes[0]
    drawn = [(line.get_marker(), list(line.get_xdata())) for line in axes.lines]
    assert drawn == [("o", [25.0, 77.5]), ("D", [70.0]), ("o", [50.0])], "the paper has no figure of the second"
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([51.25, 50.0])
    assert "diamonds: reported by the paper" in axes.get_xlabel()


def test_names_below_the_bars_do_not_overlap(make_test_plan: Callable[..., Plan], finish: Callable[..., None]) -> None:
    """Of a single method, whose bars need less room than the names of their tasks."""
    plan = make_test_plan()
    names = ("box-close", "hand-insert", "disassemble", "handle-press-side", "coffee-push", "peg-unplug-side")
    finish(plan.cells["full"][0], {f"{name}-v3": 20 for name in names}, iterations=200)
    figure = _by_task(make_rows(plan)[:1], "success, % of episodes", LIGHT)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
    assert len(boxes) >= len(names)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
