"""What the retrieval context keeps of demonstrations as they are: which steps there are, and the waypoints' values.

`llmdpd.nn.context.retrieval` defines it in PyTorch, by two dozen launches. A program takes one step of one prompt.
Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch


class Raw(NamedTuple):
    """What is filled, of P prompts of T steps, one more for the step that says nothing."""

    bias: Tensor
    """[P, T + 1]: 0 where there is a step that is given, and at the last; else -inf."""
    waypoint_bias: Tensor
    """[P, T + 1]: the same, and at the last 0 only where no step is given."""
    waypoints: Tensor
    """[P, T + 1, A + L G]: the action, and the geometry so many steps later, at most at the demonstration's end."""
    there: Tensor | None
    """[P, T + 1, C]: the places, zeros at the last."""


@triton.jit(do_not_specialize=["T"])
def memory_kernel(
    mask, given, actions, places, ahead, bias, waypoint_bias, waypoints, there, T,
    TP: tl.constexpr, A: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, FOUND: tl.constexpr,
    FP: tl.constexpr,
):  # fmt: skip
    """Step program_id(0) % (T + 1) of prompt program_id(0) // (T + 1)."""
    at = tl.program_id(0)
    prompt, step = at // (T + 1), at % (T + 1)
    beyond = step == T
    place = tl.arange(0, TP)
    seen = tl.load(mask + prompt * T + place, mask=place < T, other=0).to(tl.int32)
    last = tl.maximum(tl.sum(seen, 0) - 1, 0)
    if given is not None:
        seen *= (tl.load(given + prompt) > 0).to(tl.int32)
    none = tl.sum(seen, 0) == 0
    own = tl.sum(tl.where(place == step, seen, 0), 0) > 0
    tl.store(bias + at, tl.where(own | beyond, 0.0, -float("inf")))
    tl.store(waypoint_bias + at, tl.where(own | (beyond & none), 0.0, -float("inf")))
    column = tl.arange(0, FP)
    raw = tl.maximum(column - A, 0)
    found = (column >= A) & (column < FOUND)
    later = tl.minimum(step + tl.load(ahead + raw // G, mask=found, other=0), last)
    place_of = (prompt * T + later) * C + raw % G
    action = tl.load(actions + (prompt * T + step) * A + column, mask=(column < A) & (step < T), other=0.0)
    value = tl.load(places + place_of, mask=found & (step < T), other=0.0)
    tl.store(waypoints + at * FOUND + column, tl.where(column < A, action, value), mask=column < FOUND)
    if there is not None:
        number = tl.arange(0, CP)
        value = tl.load(places + (prompt * T + step) * C + number, mask=(number < C) & (step < T), other=0.0)
        tl.store(there + at * C + number, value, mask=number < C)


def launch(
    mask: Tensor, given: Tensor | None, actions: Tensor, places: Tensor, ahead: Tensor, geometry: int, raw: Raw
) -> Launch:
    """The launch that fills `raw`.

    mask bool [P, T]; given float [P, 1], above 0 where the demonstration is; actions [P, T, A]; places [P, T, C], the
    first `geometry` numbers of which are found; ahead int32 [L], steps.
    """
    (P, T), A, C, found = mask.shape, actions.shape[2], places.shape[2], raw.waypoints.shape[2]
    arguments = {
        "mask": mask.view(torch.uint8), "given": given, "actions": actions, "places": places, "ahead": ahead,
        **raw._asdict(), "T": T,
    }  # fmt: skip
    TP, CP, FP = (triton.next_power_of_2(size) for size in (T, C, found))
    constants = {"TP": TP, "A": A, "G": max(1, geometry), "C": C, "CP": CP, "FOUND": found, "FP": FP}
    return Launch(memory_kernel, P * (T + 1), arguments, constants, 1, 1)
