"""Behaviour policies made from a scripted expert: which action replaces the expert's, and when an episode ends.

Demonstrations and data are collected with them, since users' demonstrators differ as well. Imports no environment.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

_KINDS: dict[str, tuple[tuple[float, float], str]] = {
    "clean": ((0.0, 0.0), "the expert's action; level 0"),
    "gaussian": ((0.1, 0.5), "expert + sigma * N(0, 1) in every step, clipped; level = sigma, 0.1 … 0.5"),
    "bursts": ((0.1, 0.4), "the expert; now and then one random action for 5 … 15 steps; level = share of such steps"),
    "random": ((0.8, 1.0), "a new random action in most steps, otherwise the expert; level = share of them, 0.8 … 1"),
    "slow": ((0.3, 0.7), "the expert at 0.3 … 0.7 of its speed, its gripper delayed in proportion; level = 1 - speed"),
    "pauses": ((0.1, 0.4), "the expert, now and then still for 5 … 20 steps, gripper held; level = share of these"),
    "cut": ((0.0, 0.0), "the expert; the episode ends with the first success; level 0"),
    "overrun": ((0.0, 0.0), "the expert, which continues for 100 … 200 steps after the first success; level 0"),
    "detour": (
        (0.2, 0.5),
        "the expert, which first passes a random point above the table, and lifts the hand high once a new gripper "
        "command has held; level = the point's sideways distance in units of 0.5 m, 0.2 … 0.5",
    ),
    "jerky": ((0.5, 0.5), "each component of the movement is 0 or ±1 at random, equal to the expert's on average"),
}
BEHAVIOURS: dict[str, str] = {kind: description for kind, (_, description) in _KINDS.items()}
"""Descriptions by name. An episode's level, sampled uniformly, says how far it is from the expert: 0 is the expert
itself, 1 is wholly random."""

_BURST_STEPS = (5, 15)
_PAUSE_STEPS = (5, 20)
_OVERRUN_STEPS = (100, 200)
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


class Behaviour:
    """A behaviour policy for one episode.

    Args:
        kind: a name in `BEHAVIOURS`.
        rng: the source of all random numbers: first the level, then those of each step.
    """

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        # Each kind's method is called as it is; those that only end elsewhere have none.
        self._apply: Callable[[FloatArray, FloatArray], FloatArray] = getattr(self, f"_{kind}", self._expert)
        self._rng = rng
        self.level = float(rng.uniform(*_KINDS[kind][0]))
        self._post_success: int | None = 0 if kind == "cut" else None
        if kind == "overrun":
            self._post_success = int(rng.integers(_OVERRUN_STEPS[0], _OVERRUN_STEPS[1] + 1))
        self._held: FloatArray | None = None
        self._held_for = 0
        self._grip: float | None = None  # the last executed gripper command
        self._commands: list[float] = []  # the expert's gripper commands
        self._settling = 1
        self._detours = 0
        self._via: FloatArray | None = None

    def __call__(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        """The action f32 [4] to execute where the expert's is `expert`; `observation` begins with the hand's place."""
        action = np.clip(self._apply(expert, observation[:3]), -1.0, 1.0).astype(np.float32)
        self._grip = float(action[3])
        return action

    def post_success_steps(self, default: int) -> int:
        """Steps after the first success: `default`, except for the kinds that define their own number."""
        return default if self._post_success is None else self._post_success

    def _expert(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
        return expert

    def _gaussian(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
        return (expert + self.level * self._rng.standard_normal(expert.shape)).astype(np.float32)

    def _uniform(self, like: FloatArray) -> FloatArray:
        return self._rng.uniform(-1.0, 1.0, like.shape).astype(np.float32)

    def _random(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
        return self._uniform(expert) if self._rng.random() < self.level else expert

    def _bursts(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
        return self._now_and_then(expert, _BURST_STEPS, lambda: self._uniform(expert))

    def _pauses(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
        grip = float(expert[3]) if self._grip is None else self._grip
        return self._now_and_then(expert, _PAUSE_STEPS, lambda: np.array([0.0, 0.0, 0.0, grip], np.float32))

    def _now_and_then(self, expert: FloatArray, steps: tuple[int, int], other: Callable[[], FloatArray]) -> FloatArray:
        """The expert's action, or `other()` held for a while; over time the share `level` of the steps."""
        if self._held_for == 0:
            # A burst of mean length L, begun with probability p after each step outside, covers the share
            # L / (L + (1 - p) / p) of the steps; solved for p.
            mean = sum(steps) / 2
            if self._rng.random() >= 1.0 / (1.0 + mean * (1.0 - self.level) / self.level):
                return expert
            self._held = other()
            self._held_for = int(self._rng.integers(steps[0], steps[1] + 1))
        self._held_for -= 1
        assert self._held is not None
        return self._held

    def _slow(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
        # The fingers close at their own speed: commanded as early as by the expert, they would close before a slow
        # hand arrives.
        speed = 1.0 - self.level
        self._commands.append(float(expert[3]))
        delay = round(_GRIP_STEPS * (1.0 / speed - 1.0))
        return np.append(expert[:3] * speed, self._commands[max(0, len(self._commands) - 1 - delay)])

    def _jerky(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
        moved = self._rng.random(3) < np.abs(expert[:3])
        return np.append(np.sign(expert[:3]) * moved, expert[3])

    def _detour(self, expert: FloatArray, hand: FloatArray) -> FloatArray:
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
        grip = float(expert[3]) if self._grip is None else self._grip
        return np.append(_DETOUR_GAIN * way, grip)

    def _via_point(self, hand: FloatArray) -> FloatArray:
        direction, rise = self._rng.uniform(0.0, 2 * np.pi), self._rng.uniform(*_DETOUR_RISE)
        # Sideways only with a free hand: at an unexpected place the experts drop what they hold.
        metres = self.level * _DETOUR_METRES if self._detours == 1 else 0.0
        aside = metres * np.array([np.cos(direction), np.sin(direction)])
        point = np.clip(hand + np.append(aside, rise), _DETOUR_LOW, _DETOUR_HIGH)
        return point.astype(np.float32)
