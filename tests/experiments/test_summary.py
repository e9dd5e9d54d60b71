"""Means, spreads and intervals, held against numbers worked out otherwise."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest

from llmdpd.evaluation.intervals import bootstrap_interval
from llmdpd.experiments.grids import Compared, Grid
from llmdpd.experiments.plan import Plan
from llmdpd.experiments.summary import make_rows
from llmdpd.reporting.estimate import Estimate

MakePlan = Callable[..., Plan]
Finish = Callable[..., None]


def test_the_bootstrap_of_few_values_is_the_quantiles_of_all_draws(rng: np.random.Generator) -> None:
    values = rng.uniform(0, 100, 4).tolist()
    means = sorted(statistics.fmean(draw) for draw in itertools.product(values, repeat=4))
    interval = bootstrap_interval(values)
    assert interval is not None
    # 256 draws are all that there are: the quantile lies between neighbours of its place among them.
    for bound, share in zip(interval, (0.025, 0.975), strict=True):
        place = share * len(means)
        assert means[int(place) - 3] - 1e-9 <= bound <= means[min(int(place) + 3, 255)] + 1e-9
    assert interval == bootstrap_interval(values)


def test_the_bootstrap_of_many_values_is_the_normal_interval(rng: np.random.Generator) -> None:
    values = rng.normal(50, 10, 400)
    low, high = bootstrap_interval(values.tolist()) or (math.nan, math.nan)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)


def test_one_seed_has_no_spread() -> None:
    single = Estimate((40.0,), 50, 20)
    assert (single.std, single.bootstrap, single.text) == (None, None, "40.0")
    assert single.wilson == pytest.approx((27.61, 53.82), abs=0.01)


def test_rows_are_means_over_seeds_of_the_results(make_test_plan: MakePlan, finish: Finish) -> None:
    plan = make_test_plan()
    counts = {0: {"reach-v3": 40, "push-v3": 20, "door-lock-v3": 10}, 1: {"reach-v3": 36, "push-v3": 4}}
    for seed, successes in counts.items():
        finish(plan.cells["full"][seed], successes)
    last, best = make_rows(plan)
    assert (last.label, last.checkpoint, best.checkpoint) == ("full", "last", "best")
    assert last.tasks["reach-v3"].by_seed == (100.0, 90.0)
    assert last.tasks["reach-v3"].text == "95.0 ± 7.1"
    assert (last.tasks["reach-v3"].successes, last.tasks["reach-v3"].episodes) == (76, 80)
    assert last.means["seen"].by_seed == (75.0, 50.0)
    assert last.means["seen"].wilson is None
    # Seed 1 was not evaluated there.
    assert last.means["unseen"].by_seed == (25.0,)
    assert {task: str(figure) for task, figure in last.reported.items()} == {
        "reach-v3": "90.50 ± 1.25",
        "door-lock-v3": "70.00 ± 2.50",
    }


def test_a_best_checkpoint_that_is_the_last_one_has_no_row(make_test_plan: MakePlan, finish: Finish) -> None:
    plan = make_test_plan()
    finish(plan.cells["full"][0], {"reach-v3": 40}, iterations=200)
    assert [row.checkpoint for row in make_rows(plan)] == ["last"]
    finish(plan.cells["full"][1], {"reach-v3": 40})
    assert [row.checkpoint for row in make_rows(plan)] == ["last", "best"], "of one run it is another"


def test_a_seed_that_lacks_a_task_is_not_in_the_mean(make_test_plan: MakePlan, finish: Finish) -> None:
    plan = make_test_plan()
    finish(plan.cells["full"][0], {"reach-v3": 40, "push-v3": 20})
    finish(plan.cells["full"][1], {"reach-v3": 40})
    assert make_rows(plan)[0].means["seen"].by_seed == (75.0,)


def test_scores_have_no_counts(make_test_plan: MakePlan, finish: Finish) -> None:
    plan = make_test_plan()
    for seed, score in ((0, 50.0), (1, 60.0)):
        finish(
            plan.cells["full"][seed],
            {"reach-v3": 1},
            **{"successes": None, "returns_mean": 1000.0, "normalised_score": score},
        )
    estimate = make_rows(plan)[0].tasks["reach-v3"]
    assert (estimate.mean, estimate.wilson, estimate.successes) == (55.0, None, None)
    assert estimate.bootstrap == (50.0, 60.0)


def test_a_row_of_folds_has_each_task_as_it_was_held_out(
    make_test_plan: MakePlan, finish: Finish, shared_options: list[str]
) -> None:
    tasks = ("reach-v3", "push-v3")
    folds = tuple(
        Compared(f"fold-{k}", "folds", "smoke", ("--tasks.seen", tasks[1 - k], "sweep-v3", "--tasks.unseen", tasks[k]))
        for k in range(2)
    )
    options = tuple(shared_options[: shared_options.index("--tasks.seen")])
    plan = make_test_plan(Grid("Folds", "Two.", folds, protocols=("custom",)), seeds=1, options=options)
    # Both have seen the third task: two figures of one seed, which are no spread.
    finish(plan.cells["fold-0"][0], {"reach-v3": 10, "push-v3": 40, "sweep-v3": 20})
    finish(plan.cells["fold-1"][0], {"reach-v3": 40, "push-v3": 30, "sweep-v3": 40})
    row = make_rows(plan)[0]
    assert {task: estimate.by_seed for task, estimate in row.tasks.items()} == {"reach-v3": (25.0,), "push-v3": (75.0,)}
    assert row.means.keys() == {"unseen"}
    assert row.means["unseen"].by_seed == (50.0,)
