"""How long cells take, from what finished runs recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from llmdpd.experiments.plan import Plan
from llmdpd.experiments.scheduler import seconds_left

MakePlan = Callable[..., Plan]
Finish = Callable[..., None]

COUNTS = {"reach-v3": 4, "push-v3": 2, "door-lock-v3": 1}


def test_a_run_takes_as_long_as_finished_ones_of_its_method_or_else_its_preset(
    make_test_plan: MakePlan, finish: Finish
) -> None:
    plan = make_test_plan()
    full, plain = plan.cells["full"], plan.cells["plain"]
    cells = [*full, *plain]
    assert seconds_left(full[1], cells) is None
    finish(full[0], COUNTS)  # in 150 s
    assert seconds_left(full[1], cells) == seconds_left(plain[0], cells) == 150
    assert seconds_left(dataclasses.replace(plain[0], preset="metaworld"), cells) is None
    (full[1].folder / "checkpoint" / "step-00000050").mkdir(parents=True)
    assert seconds_left(full[1], cells) == pytest.approx(0.75 * 150), "50 of 200 iterations are done"
    finish(plain[1], COUNTS)
    plain[1].run.note(times={"total_seconds": 50.0})
    assert seconds_left(plain[0], cells) == 50
