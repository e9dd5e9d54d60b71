from __future__ import annotations

import itertools
import math

import pytest

from llmdpd.errors import InputError
from llmdpd.prompts import task_prompt
from llmdpd.tasks.ogbench import suite as suite_module
from llmdpd.tasks.ogbench.layout import ACTION_DIM, LAYOUT, STATE_DIM
from llmdpd.tasks.ogbench.suite import MAX_STEPS, SUITE
from llmdpd.tasks.ogbench.tasks import DESIGN, SEEN, TASKS, UNSEEN
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.tasks.specs import common_spec, suite_of


def test_the_protocols_split_the_tasks() -> None:
    protocol, design = PROTOCOLS["ogbench-scene"], PROTOCOLS["ogbench-scene-design"]
    assert len(protocol.seen) >= 8
    assert len(protocol.unseen) >= 3
    assert sorted(protocol.all) == sorted(TASKS)
    assert sorted(design.all) == sorted(SEEN)
    assert design.unseen == DESIGN
    assert not set(UNSEEN) & set(design.all)


def test_all_tasks_have_one_spec_that_the_layout_fits() -> None:
    spec = common_spec(tuple(TASKS))
    assert (spec.state_dim, spec.action_dim, spec.max_steps) == (STATE_DIM, ACTION_DIM, MAX_STEPS)
    assert spec.layout is LAYOUT
    LAYOUT.check(STATE_DIM, ACTION_DIM)
    assert LAYOUT.rotatable


def test_the_places_of_the_cube_are_apart() -> None:
    places = [task.place for task in TASKS.values() if task.place is not None]
    assert len(places) == 10
    assert min(math.dist(one, other) for one, other in itertools.combinations(places, 2)) > 0.07


def test_every_task_has_a_text_of_its_own() -> None:
    prompts = [task_prompt(task) for task in TASKS]
    assert len({prompt.objective for prompt in prompts}) == len({prompt.task for prompt in prompts}) == len(TASKS)
    for task, prompt in zip(TASKS, prompts, strict=True):
        assert prompt.render() == SUITE.description(task)


def test_names_are_taken_as_they_stand() -> None:
    assert suite_of(" scene-drawer-open ") is SUITE
    with pytest.raises(InputError, match="unknown task") as caught:
        suite_of("scene-drawer-opne")
    assert "scene-drawer-open" in str(caught.value.hint)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module, "find_spec", lambda name: None)
    for use in (
        lambda: SUITE.make("scene-drawer-open", goal_visible=True, render=False),
        lambda: SUITE.demonstrator("scene-drawer-open", goal_visible=True),
    ):
        with pytest.raises(InputError, match="not installed") as caught:
            use()
        assert "llmdpd[ogbench]" in str(caught.value.hint)
