"""Timing that a ratio can be trusted by: the implementations take turns in one process, every call is timed by itself.

A machine's speed drifts (clocks, neighbours, temperature). Taking turns lets a drift hit all implementations alike, and
medians with 20th and 80th percentile show how much there was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
PERCENTILES = {"fastest": 0.0, "median": 50.0, "p20": 20.0, "p80": 80.0, "p99": 99.0}
# Calls longer than this are not repeated untimed at the start of a turn: cold caches don't show in them.
_LONG = 0.02
# Nor does a turn of calls longer than this begin with a rest: ten milliseconds of another's threads don't show.
_VERY_LONG = 1.0


@dataclass(frozen=True)
class Budget:
    """How long a group of calls is measured."""

    seconds: float = 2.0
    """For each call of the group, warm-up apart; slow calls get fewer repetitions, at least `least`."""
    warmup: int = 3
    """Calls before anything counts; one for those that take a second."""
    least: int = 4
    """Turns at least."""
    most: int = 400
    """Turns at most."""
    turn: float = 20e-3
    """Seconds a turn of one implementation: microsecond calls are repeated within it."""
    settle: float = 15e-3
    """Seconds of sleep before a turn, so that no implementation runs beside the spinning threads of the one before:
    torch's OpenMP threads were seen to spin for 4 to 11 ms after an operation."""


QUICK = Budget(seconds=0.02, warmup=1, least=2, most=3, turn=2e-4, settle=0.0)


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a call (on CUDA the mean of a turn)."""

    seconds: tuple[float, ...]
    calls: int
    """How many calls those are the times of."""

    def summary(self) -> dict[str, float | int]:
        """`fastest`, `median`, `p20`, `p80`, `p99` in seconds; `samples` and `calls`."""
        values = np.percentile(self.seconds, list(PERCENTILES.values()))
        return {
            **dict(zip(PERCENTILES, values.tolist(), strict=True)),
            "samples": len(self.seconds),
            "calls": self.calls,
        }

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


class HostClock:
    """Times each call on the host. For calls that return when they are done: the CPU's, and numpy to numpy ones."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def turn(self, call: Call, count: int) -> list[float]:
        """Seconds of each of `count` calls."""
        seconds = []
        for _ in range(count):
            start = self._now()
            call()
            seconds.append(self._now() - start)
        return seconds


class CudaClock:
    """Times a row of calls with CUDA events: what a call costs where calls follow each other, as in training."""

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def turn(self, call: Call, count: int) -> list[float]:
        """The mean seconds of `count` calls, one number."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 / count]


Clock = HostClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock for calls that run on this device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def time_alternating(
    calls: Mapping[str, Call], budget: Budget, clock: Clock, prepare: Mapping[str, Call] | None = None
) -> dict[str, Timing]:
    """Time every call, the implementations in turn.

    Every second round runs backwards, so that each implementation follows each of its neighbours equally often.
    `prepare` has what must be done before a turn of an implementation, such as setting threads; it isn't timed.
    """
    prepare = {name: (prepare or {}).get(name, _nothing) for name in calls}
    expected = {}
    for name, call in calls.items():
        prepare[name]()
        expected[name] = _warm_up(call, budget, clock)
    counts = {name: max(1, min(1000, math.ceil(budget.turn / expected[name]))) for name in calls}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds = rounds_within(budget, {name: expected[name] * counts[name] for name in calls})
    for index in range(rounds):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            prepare[name]()
            if expected[name] < _VERY_LONG:
                time.sleep(budget.settle)
            if expected[name] < _LONG:
                calls[name]()
            seconds[name] += clock.turn(calls[name], counts[name])
    return {name: Timing(tuple(values), rounds * counts[name]) for name, values in seconds.items()}


def _nothing() -> None:
    pass


def rounds_within(budget: Budget, turns: Mapping[str, float]) -> int:
    """How many rounds of turns, each of so many seconds, the budget has room for."""
    one_round = sum(turns.values()) + budget.settle * len(turns)
    return max(budget.least, min(budget.most, int(budget.seconds * len(turns) / max(one_round, 1e-9))))


def _warm_up(call: Call, budget: Budget, clock: Clock) -> float:
    """Seconds that a call is expected to take."""
    fastest = math.inf
    for _ in range(max(1, budget.warmup)):
        clock.synchronize()
        start = time.perf_counter()
        call()
        clock.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > 1.0:
            break
    return max(fastest, 1e-7)
