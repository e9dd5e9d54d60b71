"""What networks are built for: the sizes, the layout and the bounds of observations and actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmdpd.data.columns import extent
from llmdpd.errors import InputError
from llmdpd.tasks.layout import Layout

FloatArray = NDArray[np.float32]
_Bounds = tuple[float, ...] | None

# Of an environment's range, below which data fill so little of it that their own range is used.
_FILLED = 0.1
_MARGIN = 0.25


@dataclass(frozen=True)
class Spaces:
    """What networks are built for.

    Raises:
        InputError: a layout, or bounds of actions, that do not fit the sizes.
    """

    state_dim: int
    """S, numbers of an observation."""
    action_dim: int
    """A, numbers of an action."""
    embedding_dim: int
    """D, of the LLM's embeddings."""
    layout: Layout | None = None
    """What the numbers are, where it is known."""
    action_low: _Bounds = None
    """The action [A] that the networks' -1 stand for; None: actions are -1 to 1 as they are."""
    action_high: _Bounds = None
    """The action [A] that the networks' 1 stand for."""
    lowest: _Bounds = None
    """The lowest action [A] that the environment takes, where that is above `action_low` in some dimension."""
    highest: _Bounds = None
    """The highest action [A] that the environment takes, likewise."""
    remembered: tuple[int, ...] = ()
    """Indices of those numbers of the environment's observation whose values one step before stand at the end of the S
    numbers (see `Layout.completed`)."""

    def __post_init__(self) -> None:
        if self.layout is not None:
            self.layout.check(self.state_dim, self.action_dim)
        if any(not 0 <= index < self.observed_dim for index in self.remembered):
            found, expected = list(self.remembered), f"indices of {self.observed_dim} numbers"
            raise InputError("wrong remembered numbers", field="spaces.remembered", found=found, expected=expected)
        ActionScaling(self)

    @property
    def observed_dim(self) -> int:
        """Numbers of an observation as the environment gives it."""
        return self.state_dim - len(self.remembered)

    def with_remembered(self, observations: FloatArray, before: FloatArray) -> FloatArray:
        """Observations [B, observed_dim] with what is remembered of those one step `before`: [B, S]."""
        if not self.remembered:
            return observations
        return np.concatenate([observations, before[:, list(self.remembered)]], axis=1)

    def episode(self, observations: FloatArray) -> FloatArray:
        """The observations [T, observed_dim] of an episode, with what is remembered at each step: [T, S].

        At the first step it is what is observed there: nothing has moved yet.
        """
        return self.with_remembered(observations, np.concatenate([observations[:1], observations[:-1]]))


class ActionScaling:
    """Between actions [..., A] and the numbers within ±1 that the networks know them by, linear in each dimension.

    Raises:
        InputError: bounds of another number than A, that are not finite, or of which the lower is above the higher.
    """

    def __init__(self, spaces: Spaces) -> None:
        width = spaces.action_dim
        low = _bound(spaces.action_low, -1.0, width)
        high = _bound(spaces.action_high, 1.0, width)
        if (low > high).any():
            place = int(np.argmax(low > high))
            raise _wrong(f"{low[place]} to {high[place]} in dimension {place}", "the lower one first")
        self._centre, self._half = (high + low) / 2, (high - low) / 2
        lowest, highest = _bound(spaces.lowest, -np.inf, width), _bound(spaces.highest, np.inf, width)
        self._low, self._high = np.fmax(low, lowest).astype(np.float32), np.fmin(high, highest).astype(np.float32)
        plain = (self._centre == 0).all() and (self._half == 1).all()
        self.identity = bool(plain and (self._low == -1).all() and (self._high == 1).all())

    def parts(self) -> NDArray[np.float64]:
        """What `from_unit` computes by, [4, A]: centre, half the range, lowest and highest action."""
        return np.stack([self._centre, self._half, self._low, self._high])

    def to_unit(self, actions: FloatArray) -> tuple[FloatArray, int]:
        """Actions within ±1, and how many rows were beyond the bounds and are cut to them."""
        clipped = actions.clip(self._low, self._high)
        beyond = int((clipped != actions).any(-1).sum())
        if self.identity:
            return (clipped if beyond else actions), beyond
        divisor = np.where(self._half > 0, self._half, 1.0)
        return ((clipped - self._centre) / divisor).astype(np.float32).clip(-1, 1), beyond

    def from_unit(self, actions: FloatArray) -> FloatArray:
        """Actions within their bounds from the networks' numbers."""
        if self.identity:
            return actions
        scaled: FloatArray = (self._centre + self._half * actions).astype(np.float32)
        return scaled.clip(self._low, self._high)


def action_range(
    actions: FloatArray, low: _Bounds, high: _Bounds, layout: Layout | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The actions [A] that ±1 is to stand for, from training data [N, A] and the environment's bounds if it has any.

    In each dimension the environment's bounds. Where those are not known or not finite, or where the data vary but
    fill less than a tenth of them, it is the data's range, in the latter case with a quarter of it on either side.
    The dimensions that move a layout's body share one range around zero, so that directions stay what they are.
    """
    least, most = (side.astype(np.float64) for side in extent(actions))
    unknown = np.full(len(least), np.nan)
    lower = unknown if low is None else np.array(low, np.float64)
    upper = unknown if high is None else np.array(high, np.float64)
    known = np.isfinite(lower) & np.isfinite(upper)
    span = most - least
    small = known & (span > 0) & (span < _FILLED * (upper - lower))
    margin = np.where(small, _MARGIN * span, 0.0)
    lower = np.where(known & ~small, lower, np.fmax(least - margin, lower))
    upper = np.where(known & ~small, upper, np.fmin(most + margin, upper))
    move = [] if layout is None else list(layout.move)
    if move:
        reach = max(np.abs(lower[move]).max(), np.abs(upper[move]).max())
        lower[move], upper[move] = -reach, reach
    return tuple(lower.tolist()), tuple(upper.tolist())


def limits(
    low: _Bounds, high: _Bounds, scaled: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The lowest and the highest action [A]: the environment's bounds, and those of the scale where it has none."""

    def known(bound: _Bounds, other: tuple[float, ...]) -> tuple[float, ...]:
        pairs = zip(bound or other, other, strict=True)
        return tuple(own if np.isfinite(own) else scale for own, scale in pairs)

    return known(low, scaled[0]), known(high, scaled[1])


def _bound(bound: _Bounds, default: float, width: int) -> NDArray[np.float64]:
    if bound is None:
        return np.full(width, default)
    if len(bound) != width or not np.isfinite(bound).all():
        raise _wrong(list(bound), f"{width} finite numbers")
    return np.array(bound, np.float64)


def _wrong(found: object, expected: object) -> InputError:
    return InputError("wrong bounds of actions", field="spaces.action_low", found=found, expected=expected)
