"""Behaviour policies made from Meta-World's scripted experts: the general ones, and those of its hand and table.

Demonstrations and data are collected with them, since users' demonstrators differ as well. Imports no environment.
"""

from __future__ import annotations

import numpy as np

from llmdpd.tasks import behaviours
from llmdpd.tasks.behaviours import KINDS, FloatArray

_KINDS: dict[str, tuple[tuple[float, float], str]] = {
    **{kind: KINDS[kind] for kind in ("clean", "gaussian", "bursts", "random")},
    "slow": ((0.3, 0.7), "the expert at 0.3 … 0.7 of its speed, its gripper delayed in proportion; level = 1 - speed"),
    "pauses": KINDS["pauses"],
    "cut": ((0.0, 0.0), "the expert; the episode ends with the first success; level 0"),
    "overrun": ((0.0, 0.0), "the expert, which continues for 100 … 200 steps after the first success; level 0"),
    "wander": (
        (0.0, 0.0),
        "the expert, and for 100 … 400 steps after the first success random actions, each held for 5 … 30 steps, "
        "by which it may undo what it did; level 0",
    ),
    "detour": (
        (0.2, 0.5),
        "the expert, which first passes a random point above the table, and lifts the hand high once a new gripper "
        "command has held; level = the point's sideways distance in units of 0.5 m, 0.2 … 0.5",
    ),
    "jerky": ((0.5, 0.5), "each component of the movement is 0 or ±1 at random, equal to the expert's on average"),
}
BEHAVIOURS: dict[str, str] = {kind: description for kind, (_, description) in _KINDS.items()}
"""Descriptions by name."""

_OVERRUN_STEPS = (100, 200)
_WANDER_STEPS = (100, 400)
_WANDER_HOLD = (5, 30)
_GRIP_STEPS = 10  # that the fingers take to close
_DETOUR_METRES = 0.5  # of level 1
_DETOUR_RISE = (0.05, 0.15)
# Where every task's hand can go.
_DETOUR_LOW, _DETOUR_HIGH = np.array([-0.35, 0.45, 0.12]), np.array([0.35, 0.8, 0.35])
_DETOUR_GAIN = 10.0
_DETOUR_NEAR = 0.03
_DETOUR_STEPS = 60  # at most, where the point can't be reached
_DETOURS = 3  # per episode: with a flickering gripper the expert would otherwise never progress
_SETTLED_STEPS = 15  # a new gripper command has taken hold


class Behaviour(behaviours.Behaviour):
    """A behaviour policy for one episode; observations begin with the hand's place [3], in metres.

    Args:
        kind: a name in `BEHAVIOURS`.
        rng: the source of all random numbers: first the level, then those of each step.
    """

    kinds = _KINDS

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        super().__init__(kind, rng, grip=3)
        self._post_success: int | None = 0 if kind == "cut" else None
        if kind in ("overrun", "wander"):
            least, most = _OVERRUN_STEPS if kind == "overrun" else _WANDER_STEPS
            self._post_success = int(rng.integers(least, most + 1))
        self._succeeded = False
        self._commands: list[float] = []  # the expert's gripper commands
        self._settling = 1
        self._detours = 0
        self._via: FloatArray | None = None

    def post_success_steps(self, default: int) -> int:
        self._succeeded = True  # it is asked when the success flag is up
        return default if self._post_success is None else self._post_success

    def _slow(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        # The fingers close at their own speed: commanded as early as by the expert, they would close before a slow
        # hand arrives.
        speed = 1.0 - self.level
        self._commands.append(float(expert[3]))
        delay = round(_GRIP_STEPS * (1.0 / speed - 1.0))
        return np.append(expert[:3] * speed, self._commands[max(0, len(self._commands) - 1 - delay)])

    def _wander(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        if not self._succeeded:
            return expert
        if self._held is None or self._held_for == 0:
            self._held, self._held_for = self._uniform(expert), int(self._rng.integers(*_WANDER_HOLD, endpoint=True))
        self._held_for -= 1
        return self._held

    def _jerky(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        moved = self._rng.random(3) < np.abs(expert[:3])
        return np.append(np.sign(expert[:3]) * moved, expert[3])

    def _detour(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        hand = observation[:3]
        if self._via is None:
            if self._commands and expert[3] != self._commands[-1]:
                self._settling = _SETTLED_STEPS
            self._commands.append(float(expert[3]))
            # Counts down to the moment after the last command has settled, and stays below it.
            self._settling -= self._settling >= 0
            if self._settling != 0 or self._detours == _DETOURS:
                return expert
            self._detours += 1
            self._held_for = _DETOUR_STEPS
            self._via = self._via_point(hand)
        self._held_for -= 1
        way = self._via - hand
        if way[2] > _DETOUR_NEAR:
            way = way * (0.0, 0.0, 1.0)  # rises first: there may be walls around the hand
        if self._held_for == 0 or np.linalg.norm(way) < _DETOUR_NEAR:
            self._via = None
        return np.append(_DETOUR_GAIN * way, self._held_grip(expert))

    def _via_point(self, hand: FloatArray) -> FloatArray:
        direction, rise = self._rng.uniform(0.0, 2 * np.pi), self._rng.uniform(*_DETOUR_RISE)
        # Sideways only with a free hand: at an unexpected place the experts drop what they hold.
        metres = self.level * _DETOUR_METRES if self._detours == 1 else 0.0
        aside = metres * np.array([np.cos(direction), np.sin(direction)])
        point = np.clip(hand + np.append(aside, rise), _DETOUR_LOW, _DETOUR_HIGH)
        return point.astype(np.float32)
