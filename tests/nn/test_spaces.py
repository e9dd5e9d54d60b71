"""Actions as the networks know them: linear in each dimension, within ±1, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmdpd.errors import InputError
from llmdpd.nn.spaces import ActionScaling, Spaces, action_range, limits
from llmdpd.tasks.layout import Layout, Point

PLANE = Layout((Point("hand", (0, 1)), Point("goal", (2, 3))), move=(0, 2))


def scaling(low: Any, high: Any, width: int = 3) -> ActionScaling:
    return ActionScaling(Spaces(5, width, 0, None, low, high))


def test_there_and_back_within_the_bounds(rng: np.random.Generator) -> None:
    low = rng.uniform(-50, 5, 3)
    high = low + rng.uniform(1e-3, 100, 3)
    actions = rng.uniform(low, high, (40, 3)).astype(np.float32).clip(low, high).astype(np.float32)
    both = scaling(tuple(low), tuple(high))
    unit, beyond = both.to_unit(actions)
    assert beyond == 0
    assert np.abs(unit).max() <= 1
    np.testing.assert_allclose(both.from_unit(unit), actions, atol=1e-5 * np.abs(actions).max())
    np.testing.assert_allclose(unit, 2 * (actions - low) / (high - low) - 1, atol=1e-3)
    back = both.from_unit(np.array([[-1] * 3, [1] * 3], np.float32))
    assert (back >= low.astype(np.float32)).all()
    assert (back <= high.astype(np.float32)).all()


def test_actions_of_one_are_not_touched(rng: np.random.Generator) -> None:
    actions = rng.uniform(-1, 1, (9, 3)).astype(np.float32)
    for bounds in ((None, None), ((-1.0,) * 3, (1.0,) * 3)):
        assert scaling(*bounds).to_unit(actions)[0] is actions
        assert scaling(*bounds).from_unit(actions) is actions


@pytest.mark.parametrize("bounds", [(None, None), ((-3.0, 0.0, 2.0), (4.0, 10.0, 3.0))])
def test_what_lies_beyond_is_cut_and_counted(rng: np.random.Generator, bounds: Any) -> None:
    low, high = (np.array(b or d, np.float32) for b, d in zip(bounds, ([-1.0] * 3, [1.0] * 3), strict=True))
    actions = rng.uniform(low, high, (20, 3)).astype(np.float32).clip(low, high)
    rows = rng.choice(20, 4, replace=False)
    actions[rows, rng.integers(3, size=4)] += 50
    unit, beyond = scaling(*bounds).to_unit(actions)
    assert beyond == 4
    assert np.abs(unit).max() <= 1


def test_a_dimension_without_a_range_is_always_the_same() -> None:
    both = scaling((-1.0, 0.3, -1.0), (1.0, 0.3, 1.0))
    unit, beyond = both.to_unit(np.array([[0.5, 0.3, 0.5]], np.float32))
    np.testing.assert_allclose(unit, [[0.5, 0, 0.5]], atol=1e-6)
    assert beyond == 0
    assert both.from_unit(np.ones((1, 3), np.float32))[0, 1] == np.float32(0.3)


@pytest.mark.parametrize(
    ("low", "high"), [((0.0,), (1.0,)), ((2.0, 0.0, 0.0), (1.0,) * 3), ((0.0,) * 3, (float("inf"), 1.0, 1.0))]
)
def test_bounds_that_are_refused(low: Any, high: Any) -> None:
    with pytest.raises(InputError, match="bounds of actions"):
        scaling(low, high)


def test_the_environments_bounds_or_else_the_datas_range(rng: np.random.Generator) -> None:
    data = rng.uniform([-0.5, 2, -7, 0], [0.5, 3, 9, 0], (200, 4)).astype(np.float32)
    least, most = data.min(0), data.max(0)
    assert action_range(data, (-1.0, 0.0, -20.0, -1.0), (1.0, 4.0, 20.0, 1.0), None) == (
        (-1.0, 0.0, -20.0, -1.0),
        (1.0, 4.0, 20.0, 1.0),
    )
    low, high = action_range(data, None, None, None)
    np.testing.assert_array_equal([low, high], [least, most])
    unknown = (-np.inf, 0.0, -20.0, -1.0), (np.inf, 4.0, 20.0, 1.0)
    low, high = action_range(data, *unknown, None)
    assert (low[0], high[0], low[1]) == (least[0], most[0], 0.0)


def test_bounds_that_the_data_hardly_fill_give_way_to_their_range(rng: np.random.Generator) -> None:
    data = np.stack([rng.uniform(-0.2, 0.2, 500), np.zeros(500)], 1).astype(np.float32)
    low, high = action_range(data, (-100.0, -100.0), (100.0, 100.0), None)
    assert -0.4 < low[0] < data[:, 0].min()
    assert data[:, 0].max() < high[0] < 0.4
    assert (low[1], high[1]) == (-100.0, 100.0), "a number that never varies says nothing of its range"


def test_the_bodys_axes_share_one_range() -> None:
    data = np.array([[-0.5, 3.0, 0.1], [0.2, 4.0, -2.0]], np.float32)
    low, high = action_range(data, None, None, PLANE)
    assert (low[0], high[0]) == (low[2], high[2]) == (-2.0, 2.0)
    assert (low[1], high[1]) == (3.0, 4.0)


def test_actions_never_leave_the_environments_bounds(rng: np.random.Generator) -> None:
    """Also where the body's axes share a range that is wider than one of them."""
    low, high = (-1.0, -5.0, -0.1), (1.0, float("inf"), 0.1)
    data = rng.uniform([-1, 0, -0.1], [1, 7, 0.1], (50, 3)).astype(np.float32)
    scale = action_range(data, low, high, PLANE)
    assert (scale[0][0], scale[1][2]) == (-1.0, 1.0)
    lowest, highest = limits(low, high, scale)
    assert (lowest, highest[0], highest[2]) == (low, 1.0, 0.1)
    both = ActionScaling(Spaces(5, 3, 0, None, *scale, lowest, highest))
    acted = both.from_unit(rng.uniform(-1, 1, (80, 3)).astype(np.float32))
    assert (acted >= np.float32(low)).all()
    assert (acted <= np.float32(high)).all()
    unit, beyond = both.to_unit(data)
    assert beyond == 0
    np.testing.assert_allclose(both.from_unit(unit), data, atol=1e-5)
    assert not ActionScaling(Spaces(1, 1, 0, None, (-5.0,), (5.0,), (-1.0,), (1.0,))).identity
    with pytest.raises(InputError, match="remembered"):
        Spaces(5, 3, 0, remembered=(4,))
