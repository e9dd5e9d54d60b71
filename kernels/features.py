"""What the networks see of states, by tables, in one launch: features, geometry, and the time beside both.

`llmdpd.nn.features` and `llmdpd.nn.context.retrieval` define them. There is no gradient.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import bounded
from .launch import Launch
from .philox import cosine_and_sine
from .reading import tanh

_ROWS = 8
VALUE, NORMALISED, NEAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)
"""Kinds of `llmdpd.nn.feature_table`; what is left are differences."""


class Tables(NamedTuple):
    """Tables on a device, of features and of geometry, and the points that they ask for."""

    own: Tensor
    """int32 [F, 5]: kind, one, other, two points. Beside it own_scale [F]; alike of geometry."""
    own_scale: Tensor
    geometry: Tensor
    geometry_scale: Tensor
    points: Tensor
    """Columns of each point, int32 [points, D]."""


@triton.jit
def _present(state, points, number, local, live, held, S: tl.constexpr, D: tl.constexpr):
    """1 where point number [FP] of a state is there, 0 where all of its numbers are; 1 where the number is -1."""
    found = (number < 0)[None, :] & held
    for axis in tl.static_range(D):
        column = tl.load(points + number * D + axis, mask=number >= 0, other=0)
        place = state + local[:, None] * S + column[None, :]
        found = found | (tl.load(place, mask=held & (number >= 0)[None, :], other=0.0) != 0.0)
    return found.to(tl.float32)


@triton.jit
def _numbers(
    state, table, scales, mean, std, points, local, live,
    S: tl.constexpr, COUNT: tl.constexpr, FP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What a table of COUNT numbers makes of rows of states [BM, S]: [BM, FP]."""
    number = tl.arange(0, FP)
    inside = number < COUNT
    held = live[:, None] & inside[None, :]
    kind = tl.load(table + 5 * number, mask=inside, other=0)
    one, other = (
        tl.load(table + 5 * number + 1, mask=inside, other=0),
        tl.load(table + 5 * number + 2, mask=inside, other=0),
    )
    scale = tl.load(scales + number, mask=inside, other=0.0)
    first = tl.load(state + local[:, None] * S + one[None, :], mask=held, other=0.0)
    second = tl.load(state + local[:, None] * S + other[None, :], mask=held, other=0.0)
    centre, spread = tl.load(mean + one, mask=inside, other=0.0), tl.load(std + one, mask=inside, other=1.0)
    found = scale[None, :] * (second - first)
    if D > 0:
        for which in tl.static_range(2):
            point = tl.load(table + 5 * number + 3 + which, mask=inside, other=-1)
            found *= _present(state, points, point, local, live, held, S, D)
    found = tl.where((kind == NEAR)[None, :], tanh(found), found)
    found = tl.where((kind == NORMALISED)[None, :], bounded((first - centre[None, :]) / spread[None, :], 10.0), found)
    return tl.where((kind == VALUE)[None, :], scale[None, :] * first, found)


@triton.jit(do_not_specialize=["rows"])
def features_kernel(
    state, time, periods, mean, std, own_table, own_scale, geometry_table, geometry_scale, points, own, here,
    rows, unit,
    S: tl.constexpr, F: tl.constexpr, G: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, FP: tl.constexpr,
    GP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0) * BM and on of own and here; `launch` says what they are."""
    begin, local = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM)
    live = local < rows - begin
    OWN: tl.constexpr = F + 2 * P
    C: tl.constexpr = G + (1 if P > 0 else 0)
    state, own = state + begin * S, own + begin * OWN
    number = tl.arange(0, FP)
    found = _numbers(state, own_table, own_scale, mean, std, points, local, live, S, F, FP, D)
    tl.store(own + local[:, None] * OWN + number[None, :], found, mask=live[:, None] & (number < F)[None, :])
    if here is not None:
        here += begin * C
        number = tl.arange(0, GP)
        found = _numbers(state, geometry_table, geometry_scale, mean, std, points, local, live, S, G, GP, D)
        tl.store(here + local[:, None] * C + number[None, :], found, mask=live[:, None] & (number < G)[None, :])
    if P > 0:
        now = tl.load(time + begin + local, mask=live, other=0).to(tl.float32)
        if here is not None:
            tl.store(here + local * C + G, now / unit, mask=live)
        wave = tl.arange(0, PP)
        # In quarters of a turn, of which whole ones are taken away: what is left is small, and its sine exact.
        turn = 4.0 * now[:, None] / tl.load(periods + wave, mask=wave < P, other=1.0)[None, :]
        quarter = tl.floor(turn + 0.5)
        cosine, sine = cosine_and_sine(quarter.to(tl.int32), (turn - quarter) * 1.5707963267948966)
        place, held = own + local[:, None] * OWN + F + wave[None, :], live[:, None] & (wave < P)[None, :]
        tl.store(place, sine, mask=held)
        tl.store(place + P, cosine, mask=held)


def launch(
    state: Tensor,
    statistics: tuple[Tensor, Tensor],
    tables: Tables,
    own: Tensor,
    here: Tensor | None = None,
    times: tuple[Tensor, Tensor, float] | None = None,
) -> Launch:
    """The launch that fills own, what the networks see of states, and here, what moments are compared by.

    Args:
        state: [N, S]. statistics: mean and std [S]. tables: of F features and G numbers of geometry.
        own: [N, F], and with times 2 P waves beside. here: [N, G], and with times the time in their unit beside.
        times: time steps [N], periods [P] of the waves, and the unit.
    """
    time, periods, unit = (None, None, 1.0) if times is None else times
    (rows, S), F, G = state.shape, len(tables.own), len(tables.geometry)
    waves = 0 if periods is None else len(periods)
    mean, std = statistics
    arguments: dict[str, Any] = {
        "state": state, "time": time, "periods": periods, "mean": mean, "std": std, "own_table": tables.own,
        "own_scale": tables.own_scale, "geometry_table": tables.geometry, "geometry_scale": tables.geometry_scale,
        "points": tables.points, "own": own, "here": here, "rows": rows, "unit": float(unit),
    }  # fmt: skip
    FP, GP, PP = (triton.next_power_of_2(max(1, count)) for count in (F, G, waves))
    D = tables.points.shape[1]
    constants = {"S": S, "F": F, "G": G, "P": waves, "PP": PP, "FP": FP, "GP": GP, "D": D, "BM": _ROWS}
    return Launch(features_kernel, math.ceil(rows / _ROWS), arguments, constants, 4, 1)
