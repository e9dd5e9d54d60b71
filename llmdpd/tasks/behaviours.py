"""Behaviour policies made from any scripted expert: which action replaces the expert's. Imports no environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

KINDS: dict[str, tuple[tuple[float, float], str]] = {
    "clean": ((0.0, 0.0), "the expert's action; level 0"),
    "gaussian": ((0.1, 0.5), "expert + sigma * N(0, 1) in every step, clipped; level = sigma, 0.1 … 0.5"),
    "bursts": ((0.1, 0.4), "the expert; now and then one random action for 5 … 15 steps; level = share of such steps"),
    "random": ((0.8, 1.0), "a new random action in most steps, otherwise the expert; level = share of them, 0.8 … 1"),
    "pauses": ((0.1, 0.4), "the expert, now and then still for 5 … 20 steps, gripper held; level = share of these"),
}
"""Behaviours that every expert can have: the range of their level, and a description. An episode's level, sampled
uniformly, says how far it is from the expert: 0 is the expert itself, 1 is wholly random."""

_BURST_STEPS = (5, 15)
_PAUSE_STEPS = (5, 20)


class Behaviour:
    """A behaviour policy for one episode; a `BehaviourPolicy` of `llmdpd.tasks.demonstrators`.

    Args:
        kind: a name in `kinds`.
        rng: the source of all random numbers: first the level, then those of each step.
        grip: index of the action's number that commands the gripper, which is held while nothing moves.
        kinds: behaviours by name, as `KINDS`; each is done by the method `_NAME`, or is the expert's action.
    """

    kinds: Mapping[str, tuple[tuple[float, float], str]] = KINDS

    def __init__(self, kind: str, rng: np.random.Generator, grip: int) -> None:
        # Each kind's method is called as it is; those that only end elsewhere have none.
        self._apply: Callable[[FloatArray, FloatArray], FloatArray] = getattr(self, f"_{kind}", self._expert)
        self._rng, self._gripper = rng, grip
        self.level = float(rng.uniform(*self.kinds[kind][0]))
        self._held: FloatArray | None = None
        self._held_for = 0
        self._grip: float | None = None  # the last executed gripper command

    def __call__(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        """The action f32 [A] to execute where the expert's is `expert`."""
        action = np.clip(self._apply(expert, observation), -1.0, 1.0).astype(np.float32)
        self._grip = float(action[self._gripper])
        return action

    def post_success_steps(self, default: int) -> int:
        """Steps after the first success: `default`, except for the kinds that define their own number."""
        return default

    def _expert(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        return expert

    def _gaussian(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        return (expert + self.level * self._rng.standard_normal(expert.shape)).astype(np.float32)

    def _uniform(self, like: FloatArray) -> FloatArray:
        return self._rng.uniform(-1.0, 1.0, like.shape).astype(np.float32)

    def _random(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        return self._uniform(expert) if self._rng.random() < self.level else expert

    def _bursts(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        return self._now_and_then(expert, _BURST_STEPS, lambda: self._uniform(expert))

    def _pauses(self, expert: FloatArray, observation: FloatArray) -> FloatArray:
        return self._now_and_then(expert, _PAUSE_STEPS, lambda: self._still(expert))

    def _still(self, expert: FloatArray) -> FloatArray:
        still = np.zeros_like(expert)
        still[self._gripper] = self._held_grip(expert)
        return still

    def _held_grip(self, expert: FloatArray) -> float:
        """The gripper's last command, or at the start the expert's."""
        return float(expert[self._gripper]) if self._grip is None else self._grip

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
