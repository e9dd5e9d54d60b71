"""How long cells take: worked out from what finished runs recorded, or from a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from llmdpd.errors import InputError
from llmdpd.experiments.cell import Evaluation, Share
from llmdpd.experiments.grids import Grid, Method
from llmdpd.experiments.plan import Plan
from llmdpd.experiments.rates import Rate, calibrate, known_rates, rate_for, seconds_left

MakePlan = Callable[..., Plan]
COUNTS = {"reach-v3": 4, "push-v3": 2, "door-lock-v3": 1}


def test_rates_of_finished_runs(make_test_plan: MakePlan, finish: Callable[..., None]) -> None:
    plan = make_test_plan()
    full, plain = plan.cells["full"], plan.cells["plain"]
    finish(full[0], COUNTS, iterations=200)
    rates = known_rates([*full, *plain])
    # 100 s for 200 iterations; 30 s for 40 episodes of 3 tasks, once: both checkpoints are the same.
    assert rate_for(full[1], rates) == Rate(0.5, 0.25, "full-seed0")
    assert rate_for(plain[0], rates) == Rate(0.5, 0.25, "full-seed0, of the same preset")
    assert rate_for(dataclasses.replace(plain[0], preset="metaworld"), rates) is None


def test_seconds_left(make_test_plan: MakePlan, finish: Callable[..., None]) -> None:
    cell = make_test_plan().cells["full"][0]
    rate = Rate(0.5, 0.25, "")
    # 200 iterations; two checkpoints, three tasks, two episodes each.
    assert seconds_left(cell, rate) == pytest.approx(100 + 3)
    (cell.folder / "checkpoint" / "step-00000150").mkdir(parents=True)
    assert seconds_left(cell, rate) == pytest.approx(25 + 3)
    finish(cell, COUNTS)
    assert seconds_left(cell, rate) == 0
    assert seconds_left(dataclasses.replace(cell, episodes=80), rate) == pytest.approx(2 * 3 * 80 * 0.25)
    apart = dataclasses.replace(cell, episodes=80, seen_episodes=50)
    assert seconds_left(apart, rate) == pytest.approx(2 * (2 * 50 + 80) * 0.25)
    further = dataclasses.replace(cell, evaluations=(Evaluation("x", ("--samples", "3")),))
    assert seconds_left(further, rate) == pytest.approx(2 * 0.25)


def test_a_measurement_of_this_machine(make_test_plan: MakePlan, cache_home: object, torch_settings: None) -> None:
    cell = make_test_plan().cells["full"][0]
    rate = calibrate(cell, Share(1))
    assert rate.source == "measured now"
    assert 1e-5 < rate.iteration < 10
    # An episode is 15 steps here.
    assert 15 * 1e-5 < rate.episode < 15 * 10
    assert cell.state == "missing"


def test_a_policy_that_looks_back_can_be_measured(
    make_test_plan: MakePlan, cache_home: object, torch_settings: None
) -> None:
    method = Method("dt", "Decision Transformer", "smoke", ("--agent", "dt", "--policy.sequence.width", "16"))
    grid = Grid("a test", "of one method", (method,), protocols=("paper",))
    cell = make_test_plan(grid, options=()).cells["dt"][0]
    assert 1e-5 < calibrate(cell, Share(1)).iteration < 10


def test_a_method_without_data_is_measured_in_its_environment(
    make_test_plan: MakePlan, cache_home: object, torch_settings: None
) -> None:
    pytest.importorskip("stable_baselines3")
    method = Method("sac", "SAC, online", "smoke", ("--agent", "sac", "--policy.hidden-dim", "16"))
    grid = Grid("a test", "of one method", (method,), protocols=("paper",))
    cell = make_test_plan(grid, options=()).cells["sac"][0]
    assert 1e-5 < calibrate(cell, Share(1)).iteration < 10
    assert cell.state == "missing"


def test_what_cannot_be_measured_is_told(make_test_plan: MakePlan) -> None:
    cell = make_test_plan().cells["full"][0]
    wrong = dataclasses.replace(cell, options=(*cell.options, "--llm", "no/such-model"))
    with pytest.raises(InputError, match="such-model"):
        calibrate(wrong, Share(1))
