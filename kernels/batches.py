"""Batches gathered from data on the device, and changed as `llmdpd.data.augmentation` changes them: in one launch."""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import bounded
from .launch import Launch

_ROWS = 8
POINT, GRIPPER = tl.constexpr(1), tl.constexpr(2)
"""Kinds of a state's numbers: a coordinate of a point, and the gripper's; what is left is left as it is."""


@triton.jit
def _state(
    states, row, there, prompt, table, jitter, cosine, sine, side, pivot,
    S: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, PLACES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """States [BM, SP] of rows of the data [N, S], 0 where none is, under the changes of their prompts."""
    number = tl.arange(0, SP)
    inside = number < S
    held = there[:, None] & inside[None, :]
    found = tl.load(states + row[:, None] * S + number[None, :], mask=held, other=0.0)
    if D > 0:
        kind = tl.load(table + number * 6, mask=inside, other=0)
        axis, place = (
            tl.load(table + number * 6 + 1, mask=inside, other=0),
            tl.load(table + number * 6 + 2, mask=inside, other=0),
        )
        point = held & (kind == POINT)[None, :]
        present, first, second, own = point & (number < 0)[None, :], found, found, found
        for one in tl.static_range(D):
            column = tl.load(table + number * 6 + 3 + one, mask=inside, other=0)
            part = tl.load(states + row[:, None] * S + column[None, :], mask=point, other=0.0)
            present = present | (part != 0.0)
            if one == FIRST:
                first = part
            if one == SECOND:
                second = part
        if jitter is not None:
            at = jitter + prompt[:, None] * (D * PLACES) + place[None, :]
            first += tl.load(at + FIRST * PLACES, mask=present, other=0.0)
            second += tl.load(at + SECOND * PLACES, mask=present, other=0.0)
            own += tl.load(at + axis[None, :] * PLACES, mask=present, other=0.0)
        if cosine is not None:
            turn, slope, mirror = (
                tl.load(cosine + prompt)[:, None],
                tl.load(sine + prompt)[:, None],
                tl.load(side + prompt)[:, None],
            )
            centre, other = tl.load(pivot + FIRST), tl.load(pivot + SECOND)
            first, second = mirror * (first - centre), second - other
            own = tl.where(present & (axis == FIRST)[None, :], turn * first - slope * second + centre, own)
            own = tl.where(present & (axis == SECOND)[None, :], slope * first + turn * second + other, own)
        found = tl.where(point, own, found)
        found = tl.where((kind == GRIPPER)[None, :], 1.0 - (1.0 - found), found)
    return found


@triton.jit
def _action(
    actions, row, there, prompt, cosine, sine, side,
    A: tl.constexpr, AP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Actions [BM, AP] of rows of the data [N, A]; within ±1 where they are turned, or where ALL."""
    number = tl.arange(0, AP)
    held = there[:, None] & (number < A)[None, :]
    found = tl.load(actions + row[:, None] * A + number[None, :], mask=held, other=0.0)
    if cosine is not None:
        first = tl.load(side + prompt) * tl.load(actions + row * A + FIRST, mask=there, other=0.0)
        second = tl.load(actions + row * A + SECOND, mask=there, other=0.0)
        turn, slope = tl.load(cosine + prompt), tl.load(sine + prompt)
        one, other = bounded(turn * first - slope * second, 1.0), bounded(slope * first + turn * second, 1.0)
        found = tl.where((number == FIRST)[None, :], one[:, None], found)
        found = tl.where((number == SECOND)[None, :], other[:, None], found)
    return bounded(found, 1.0) if ALL else found


@triton.jit(do_not_specialize=["share", "length", "transitions", "steps"])
def batch_kernel(
    states, next_states, actions, expert, rewards, terminals, rows, shown_rows, table, jitter, cosine,
    sine, side, pivot,
    out_states, out_next, out_actions, out_expert, out_rewards, out_terminals, out_shown, out_shown_actions,
    share, length, transitions, steps,
    S: tl.constexpr, SP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, D: tl.constexpr, PLACES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, MOVE_FIRST: tl.constexpr, MOVE_SECOND: tl.constexpr,
    CHANGED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A tile of the transitions, or after them of the demonstrations' steps; `launch` says what is read and written."""
    tiles = (transitions + BM - 1) // BM
    local = tl.arange(0, BM)
    number, action = tl.arange(0, SP), tl.arange(0, AP)
    if tl.program_id(0) < tiles:
        place = tl.program_id(0) * BM + local
        live = place < transitions
        row, prompt = tl.load(rows + place, mask=live, other=0), tl.where(live, place // share, 0)
        of_states = place[:, None] * S + number[None, :]
        held, taken = live[:, None] & (number < S)[None, :], live[:, None] & (action < A)[None, :]
        found = _state(
            states, row, live, prompt, table, jitter, cosine, sine, side, pivot, S, SP, D, PLACES, FIRST, SECOND
        )
        tl.store(out_states + of_states, found, mask=held)
        found = _state(
            next_states, row, live, prompt, table, jitter, cosine, sine, side, pivot, S, SP, D, PLACES, FIRST, SECOND
        )
        tl.store(out_next + of_states, found, mask=held)
        of_actions = place[:, None] * A + action[None, :]
        found = _action(actions, row, live, prompt, cosine, sine, side, A, AP, MOVE_FIRST, MOVE_SECOND, False)
        tl.store(out_actions + of_actions, found, mask=taken)
        if expert is not None:
            found = _action(expert, row, live, prompt, cosine, sine, side, A, AP, MOVE_FIRST, MOVE_SECOND, False)
            tl.store(out_expert + of_actions, found, mask=taken)
        tl.store(out_rewards + place, tl.load(rewards + row, mask=live, other=0.0), mask=live)
        tl.store(out_terminals + place, tl.load(terminals + row, mask=live, other=0.0), mask=live)
    elif shown_rows is not None:
        place = (tl.program_id(0) - tiles) * BM + local
        live = place < steps
        row, prompt = tl.load(shown_rows + place, mask=live, other=-1), tl.where(live, place // length, 0)
        there = row >= 0
        found = _state(
            states, row, there, prompt, table, jitter, cosine, sine, side, pivot, S, SP, D, PLACES, FIRST, SECOND
        )
        held = live[:, None] & (number < S)[None, :]
        tl.store(out_shown + place[:, None] * S + number[None, :], found, mask=held)
        found = _action(actions, row, there, prompt, cosine, sine, side, A, AP, MOVE_FIRST, MOVE_SECOND, CHANGED)
        tl.store(
            out_shown_actions + place[:, None] * A + action[None, :], found, mask=live[:, None] & (action < A)[None, :]
        )


@dataclass(frozen=True)
class Scene:
    """What a layout says of states and actions: `table` of the columns on the device, and the horizontal axes."""

    table: Tensor
    """int32 [S, 6]: kind, axis, place, the place's columns."""
    pivot: Tensor
    """[D]."""
    dimensions: int
    places: int
    horizontal: tuple[int, ...] = ()
    move: tuple[int, ...] = ()
    """The actions' columns along the horizontal axes."""


def launch(
    data: Mapping[str, Tensor | None],
    rows: Tensor,
    shown: Tensor | None,
    prompts: int,
    out: Mapping[str, Tensor | None],
    scene: Scene | None,
    change: Mapping[str, Tensor | None],
) -> Launch:
    """The launch that fills a batch of B transitions, and P demonstrations of T steps.

    Args:
        data: observations, next_observations [N, S]; actions, expert_actions (or None) [N, A]; rewards, terminals [N].
        rows: which transitions, int64 [B]. shown: which steps, int64 [P, T], -1 for none; None without demonstrations.
        out: what is filled, by the data's names; and tokens.states [P, T, S], tokens.actions [P, T, A].
        scene: of the layout, where anything is changed.
        change: `jitter` [P, D, places], `cosine`, `sine`, `side` [P] of the prompts; None for what is not changed.
    """
    S, A = data["observations"].shape[1], data["actions"].shape[1]  # type: ignore[union-attr]
    steps = 0 if shown is None else shown.numel()
    turned = change.get("cosine") is not None and scene is not None
    arguments: dict[str, Any] = {
        "states": data["observations"], "next_states": data["next_observations"], "actions": data["actions"],
        "expert": data["expert_actions"], "rewards": data["rewards"], "terminals": data["terminals"], "rows": rows,
        "shown_rows": shown, "table": None if scene is None else scene.table, "jitter": change.get("jitter"),
        "cosine": change.get("cosine"), "sine": change.get("sine"), "side": change.get("side"),
        "pivot": None if scene is None else scene.pivot, "out_states": out["observations"],
        "out_next": out["next_observations"], "out_actions": out["actions"], "out_expert": out["expert_actions"],
        "out_rewards": out["rewards"], "out_terminals": out["terminals"], "out_shown": out.get("tokens.states"),
        "out_shown_actions": out.get("tokens.actions"), "share": len(rows) // prompts,
        "length": max(1, steps // prompts), "transitions": len(rows), "steps": steps,
    }  # fmt: skip
    first, second = scene.horizontal if turned and scene is not None else (0, 0)
    one, other = scene.move if turned and scene is not None else (0, 0)
    constants = {
        "S": S, "SP": triton.next_power_of_2(S), "A": A, "AP": triton.next_power_of_2(A),
        "D": 0 if scene is None else scene.dimensions, "PLACES": 1 if scene is None else scene.places, "FIRST": first,
        "SECOND": second, "MOVE_FIRST": one, "MOVE_SECOND": other, "CHANGED": scene is not None, "BM": _ROWS,
    }  # fmt: skip
    programs = triton.cdiv(len(rows), _ROWS) + triton.cdiv(steps, _ROWS)
    return Launch(batch_kernel, programs, arguments, constants, 4, 1)
