"""Turns, repetitions and percentiles, on a clock that the test moves."""

from __future__ import annotations

import types
from collections.abc import Callable

import numpy as np
import pytest
import timing
from timing import Budget, HostClock, Timing, rounds_within, time_alternating


class FakeTime:
    """A clock that stands still but for what calls and sleeps take."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, list[str]()

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes so long, the last one for ever on."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def sleep(self, seconds: float) -> None:
        self.log.append("sleep")
        self.now += seconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.now, sleep=clock.sleep))
    return clock


def test_implementations_take_turns_and_every_second_round_runs_backwards(fake: FakeTime) -> None:
    budget = Budget(seconds=1.0, warmup=2, least=4, most=4)
    calls = {name: fake.call(name, 0.1) for name in ("a", "b", "c")}
    found = time_alternating(calls, budget, HostClock(lambda: fake.now))
    turns = [name for name in fake.log if name != "sleep"]
    assert "".join(turns) == "aabbcc" + "abc" + "cba" + "abc" + "cba"
    assert {name: t.calls for name, t in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_each_turn_is_prepared(fake: FakeTime) -> None:
    budget = Budget(warmup=1, least=1, most=1)
    calls = {name: fake.call(name, 5.0) for name in "ab"}
    time_alternating(calls, budget, HostClock(lambda: fake.now), {"b": lambda: fake.log.append("set up")})
    assert fake.log == ["a", "set up", "b", "a", "set up", "b"]


def test_short_calls_begin_their_turn_after_a_rest_with_one_that_does_not_count(fake: FakeTime) -> None:
    budget = Budget(warmup=1, least=1, most=1, turn=0.03, settle=0.001)
    time_alternating({"a": fake.call("a", 0.01), "b": fake.call("b", 0.01)}, budget, HostClock(lambda: fake.now))
    turn = ["sleep", *["a"] * 4]
    assert fake.log == ["a", "b", *turn, *[name.replace("a", "b") if name == "a" else name for name in turn]]


def test_long_calls_rest_before_their_turn_and_very_long_ones_do_not(fake: FakeTime) -> None:
    budget = Budget(warmup=1, least=1, most=1)
    time_alternating({"a": fake.call("a", 0.1), "b": fake.call("b", 5.0)}, budget, HostClock(lambda: fake.now))
    assert fake.log == ["a", "b", "sleep", "a", "b"]


def test_warm_up_does_not_count(fake: FakeTime) -> None:
    budget = Budget(warmup=3, least=3, most=3)
    found = time_alternating({"a": fake.call("a", 9.0, 0.5, 0.5, 0.5)}, budget, HostClock(lambda: fake.now))
    assert found["a"].seconds == pytest.approx((0.5, 0.5, 0.5))


def test_a_drift_hits_all_alike(fake: FakeTime) -> None:
    """A machine that gets slower and slower shows in the medians, not in their ratio."""
    speed = 1.0

    def call(work: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal speed
            speed *= 1.002
            fake.now += work * speed

        return run

    budget = Budget(seconds=1e9, warmup=1, least=2, most=200)
    found = time_alternating({"a": call(1.5), "b": call(3.0)}, budget, HostClock(lambda: fake.now))
    assert found["a"].median > 1.8
    assert found["b"].median / found["a"].median == pytest.approx(2.0, rel=0.01)


def test_slow_calls_get_fewer_repetitions_and_at_least_so_many() -> None:
    budget = Budget(seconds=2.0, least=4, most=400, settle=0.0)
    assert rounds_within(budget, {"a": 0.1, "b": 0.3}) == 10
    assert rounds_within(budget, {"a": 5.0, "b": 60.0}) == 4
    assert rounds_within(budget, {"a": 1e-6}) == 400


def test_a_call_of_a_second_is_warmed_up_once(fake: FakeTime) -> None:
    time_alternating({"a": fake.call("a", 2.0)}, Budget(warmup=3, least=1, most=1), HostClock(lambda: fake.now))
    assert fake.log == ["a", "a"]


def test_percentiles(rng: np.random.Generator) -> None:
    values = rng.permutation(np.arange(1, 102)).astype(float)
    summary = Timing(tuple(values), 101).summary()
    expected = {"fastest": 1.0, "median": 51.0, "p20": 21.0, "p80": 81.0, "p99": 100.0, "samples": 101, "calls": 101}
    assert summary == expected
    assert Timing(tuple(values), 101).median == 51.0
