"""State features: what the networks see of an observation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.nn import device_features
from llmdpd.nn.statistics import QUANTILE, Observations, in_blocks, robust_statistics
from llmdpd.tasks.layout import Layout, columns_of

FeatureKind = Literal["normalised", "combined", "relative", "raw", "metaworld"]
"""See `StateFeatures`; "metaworld" is version 0.1's name of "combined"."""

_ANY_LAYOUT = ("normalised", "raw")
# In metres: a difference is given in units of 25 cm, and as tanh in units of 4 cm; a velocity in centimetres a step.
FAR, NEAR, VELOCITY = 4.0, 25.0, 100.0
_CLIP = 10.0


class StateFeatures(nn.Module):
    """Observations [..., S] → features [..., F].

    `normalised`: (s - mean) / std, clipped to ±10, with the statistics of the TRAINING tasks alone. A dimension that is
    constant there keeps its scale; the others are not widened for it. `combined` adds, from the layout, the differences
    between its points, once in units of 25 cm and once as tanh in units of 4 cm (how near is near), and the velocities
    of those whose previous position the observation carries. `relative` is those alone, with the gripper, the points'
    heights and the layout's scalars (normalised) beside: where something lies, how it is turned, and what the layout
    does not name is left out, and an absent point (all zeros) is at no distance. `raw` is the observation itself.

    Args:
        state_dim: S.
        kind: see above.
        layout: what the numbers are; `combined` and `relative` need it.

    Raises:
        InputError: no layout, or one that does not fit the observations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state_dim: int, kind: FeatureKind = "normalised", layout: Layout | None = None) -> None:
        super().__init__()
        if kind not in _ANY_LAYOUT and layout is None:
            raise InputError(
                "these features are read from the layout of the observations, and none is declared",
                field="features",
                found=kind,
                expected="a layout of the tasks' suite, or of the task file",
                hint="use features 'normalised'",
            )
        self.kind, self.layout = kind, layout
        self.state_dim = state_dim
        self._relations = None if layout is None else _Relations(layout)
        if kind == "relative" and not self.output_dim:
            raise InputError(
                "the layout leaves nothing that these features read",
                field="features",
                found=f"{kind}, of the one point {layout.body.name!r}" if layout is not None else kind,
                expected="two points, a gripper, scalars or an axis that is up",
                hint="use features 'normalised', or name more of the numbers in the layout",
            )
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))

    @property
    def output_dim(self) -> int:
        """F."""
        if self.kind in _ANY_LAYOUT:
            return self.state_dim
        relations = self._layout
        return relations.output_dim + (relations.own_dim if self.kind == "relative" else self.state_dim)

    @property
    def geometry_dim(self) -> int:
        """G, of `geometry`."""
        return self.state_dim if self.kind in _ANY_LAYOUT else self._layout.geometry_dim

    @property
    def _layout(self) -> _Relations:
        assert self._relations is not None, "checked at construction"
        return self._relations

    def fit(self, observations: Observations) -> None:
        """Take mean and std [S] from the training tasks' observations [N, S], a tensor or blocks of its rows.

        Where a thousandth of the data at either end makes a dimension's range more than 20 times wider (a sensor's
        glitches), it counts as the quantile that it lies beyond.
        """
        found = robust_statistics(observations)
        # Compared exactly: rounding gives many equal numbers a mean beside them, and so a deviation.
        constant = found.low == found.high
        self.mean.copy_(torch.where(constant, found.low, found.mean))
        self.std.copy_(torch.where(constant | (found.std <= 1e-6), 1.0, found.std))

    def fit_beyond(self, observations: Observations) -> list[int]:
        """Take mean and std anew of those numbers of which more than a thousandth of [N, S] would be clipped.

        Of numbers that these features don't normalise nothing is clipped. Returns the numbers' indices.
        """
        own, spread = self.mean.cpu(), self.std.cpu()
        counts = [(((block - own) / spread).abs() > _CLIP).sum(0) for block in in_blocks(observations)]
        beyond = torch.stack(counts).sum(0).double() / len(observations) > QUANTILE
        chosen = [index for index in self._normalises if bool(beyond[index])]
        if chosen:
            mean, std = self.mean.clone(), self.std.clone()
            self.fit(observations)
            kept = torch.ones(self.state_dim, dtype=torch.bool, device=mean.device)
            kept[chosen] = False
            self.mean.copy_(torch.where(kept, mean, self.mean))
            self.std.copy_(torch.where(kept, std, self.std))
        return chosen

    @property
    def _normalises(self) -> Sequence[int]:
        """Indices of the numbers that are given in units of their standard deviations."""
        if self.kind == "raw":
            return ()
        return self._layout.layout.scalars if self.kind == "relative" else range(self.state_dim)

    def forward(self, state: Tensor) -> Tensor:
        if self.kind == "raw":
            return state
        if device_features.reads(self, state):
            return device_features.read(self, state)[0]
        if self.kind == "relative":
            relations = self._layout
            own = relations.own(state, self._scalars(state))
            return torch.cat([own, *relations(state, present_only=True)], dim=-1)
        normalised = self._normalised(state)
        return normalised if self.kind == "normalised" else torch.cat([normalised, *self._layout(state)], dim=-1)

    def geometry(self, state: Tensor) -> Tensor:
        """Where things are, as two moments can be compared by: [..., S] → [..., G].

        With a layout the differences that the body or the goal has part in (all, where there is no goal), in units of
        25 cm, the gripper and the scalars; else all numbers, normalised or raw.
        """
        if self.kind in _ANY_LAYOUT:
            return self(state)
        relations = self._layout
        return relations.geometry(state, self._scalars(state))

    def _normalised(self, state: Tensor) -> Tensor:
        """All numbers of a state in units of their standard deviations."""
        return ((state - self.mean) / self.std).clamp(-_CLIP, _CLIP)

    def _scalars(self, state: Tensor) -> Tensor:
        """The layout's scalars of a state in units of their standard deviations."""
        of = self._layout.scalars
        return ((of(state) - of(self.mean)) / of(self.std)).clamp(-_CLIP, _CLIP)


class _Columns(nn.Module):
    """Columns of states [..., S] by their indices, which lie where the network does.

    Indexing by a list would copy it to the device at every call, and wait for that: no CUDA graph holds it.
    """

    index: Tensor | None

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__()
        found = columns_of(tuple(indices))
        self._neighbours = found if isinstance(found, slice) else None
        index = torch.tensor(found, dtype=torch.int64) if isinstance(found, list) else None
        self.register_buffer("index", index, persistent=False)

    def forward(self, state: Tensor) -> Tensor:
        return state[..., self._neighbours if self.index is None else self.index]


class _Relations(nn.Module):
    """What a layout says of an observation [..., S]: differences of points, velocities, heights."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self._names = [point.name for point in layout.points]
        self._points = nn.ModuleList(_Columns(point.at) for point in layout.points)
        self._pairs, dimensions = layout.differences, layout.dimensions
        self._now = nn.ModuleList(_Columns(point.at) for point in layout.moving)
        self._before = nn.ModuleList(_Columns(point.previous) for point in layout.moving)
        self._gripper, self.scalars = _Columns(layout.gripper), _Columns(layout.scalars)
        self._unit = layout.unit
        kept = compared_pairs(layout)
        compared = [
            place * dimensions + axis
            for place, pair in enumerate(self._pairs)
            if pair in kept
            for axis in range(dimensions)
        ]
        self._compared = _Columns(compared)
        heights = len(layout.points) if layout.up is not None else 0
        self.own_dim = len(layout.gripper) + heights + len(layout.scalars)
        self.output_dim = dimensions * (2 * len(self._pairs) + len(self._now))
        self.geometry_dim = len(compared) + len(layout.gripper) + len(layout.scalars)

    def forward(self, state: Tensor, present_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Differences in two units, and velocities."""
        differences, unit = self._differences(state, present_only), self._unit
        steps = [now(state) - before(state) for now, before in zip(self._now, self._before, strict=True)]
        velocity = torch.cat(steps, dim=-1) if steps else state[..., :0]
        return FAR * unit * differences, torch.tanh(NEAR * unit * differences), VELOCITY * unit * velocity

    def own(self, state: Tensor, scalars: Tensor) -> Tensor:
        """The gripper, the points' heights, and the layout's scalars as they are given."""
        heights, up = [], self.layout.up
        if up is not None:
            heights = [FAR * self._unit * at(state)[..., up : up + 1] for at in self._points]
        return torch.cat([self._gripper(state), *heights, scalars], dim=-1)

    def geometry(self, state: Tensor, scalars: Tensor) -> Tensor:
        """See `StateFeatures.geometry`."""
        differences = FAR * self._unit * self._compared(self._differences(state, present_only=True))
        return torch.cat([differences, self._gripper(state), scalars], dim=-1)

    def _differences(self, state: Tensor, present_only: bool) -> Tensor:
        points = {name: at(state) for name, at in zip(self._names, self._points, strict=True)}
        body = self.layout.body.name
        known = {name: (point != 0).any(-1, keepdim=True) for name, point in points.items() if name != body}
        parts = []
        for one, other in self._pairs:
            part = points[other] - points[one]
            for name in (one, other) if present_only else ():
                part = part * known[name] if name in known else part
            parts.append(part)
        return torch.cat(parts, dim=-1) if parts else state[..., :0]


def compared_pairs(layout: Layout) -> list[tuple[str, str]]:
    """The pairs of points whose differences moments are compared by: see `StateFeatures.geometry`."""
    return [pair for pair in layout.differences if layout.goal is None or {layout.body.name, layout.goal} & {*pair}]
