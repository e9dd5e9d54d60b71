from __future__ import annotations

import itertools
import math

import pytest

from llmdpd.errors import InputError
from llmdpd.prompts import task_prompt
from llmdpd.tasks.layout import Layout, Point
from llmdpd.tasks.ogbench.layout import ACTION_DIM, SPACES
from llmdpd.tasks.ogbench.suite import SUITE
from llmdpd.tasks.ogbench.tasks import DESIGN, GROUPS, MAX_STEPS, TASKS
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.tasks.specs import common_spec, suite_of


@pytest.mark.parametrize("group", GROUPS)
def test_the_protocols_split_the_tasks_of_a_kind(group: str) -> None:
    protocol = PROTOCOLS[group]
    assert len(protocol.seen) >= 6
    assert len(protocol.unseen) >= 2
    assert sorted(protocol.all) == sorted(SUITE.groups[group])


def test_designs_are_chosen_without_unseen_tasks() -> None:
    scene, design = PROTOCOLS["ogbench-scene"], PROTOCOLS["ogbench-scene-design"]
    assert sorted(design.all) == sorted(scene.seen)
    assert design.unseen == DESIGN


def test_every_task_is_of_one_group() -> None:
    assert sorted(task for group in GROUPS.values() for task in group) == sorted(TASKS)
    assert [len(group) for group in GROUPS.values()] == [16, 9, 18, 9]


@pytest.mark.parametrize("group", GROUPS)
def test_the_tasks_of_a_kind_have_one_spec_that_the_layout_fits(group: str) -> None:
    spec = common_spec(GROUPS[group])
    space = SPACES[TASKS[spec.task].kind]
    assert (spec.state_dim, spec.action_dim, spec.max_steps) == (space.state_dim, ACTION_DIM, MAX_STEPS)
    assert (spec.action_low, spec.action_high) == ((-1,) * ACTION_DIM, (1,) * ACTION_DIM)
    assert spec.layout is not None
    spec.layout.check(spec.state_dim, ACTION_DIM)
    used = [index for point in spec.layout.points for index in point.at]
    assert len({*used, *spec.layout.gripper, *spec.layout.scalars}) == len(used) + 1 + len(spec.layout.scalars)
    assert spec.layout.rotatable


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(GROUPS, 2)))
def test_kinds_are_not_mixed_in_a_run(one: str, other: str) -> None:
    with pytest.raises(InputError, match="one policy cannot serve"):
        common_spec([GROUPS[one][0], GROUPS[other][0]])


def test_the_layout_of_the_scene_is_what_policies_were_trained_with() -> None:
    starts = {"hand": 12, "cube": 19, "right button": 40, "left button": 43, "drawer handle": 46, "window handle": 49}
    assert SPACES["scene"].state_dim == 56
    assert SPACES["scene"].layout == Layout(
        points=tuple(Point(name, (start, start + 1, start + 2)) for name, start in starts.items()),
        gripper=(17,),
        scalars=(18, 29, 33, 52, 53, 54, 55),
        move=(0, 1, 2),
        grip=(4,),
        up=2,
        unit=0.1,
        velocities=(),
        pairs=(
            *(("hand", name) for name in list(starts)[1:]),
            *(("cube", "right button"), ("right button", "drawer handle"), ("left button", "window handle")),
        ),
    )


@pytest.mark.parametrize(
    ("start", "places"), [("scene", 10), ("cube-single", 9), ("cube-double-red", 9), ("cube-double-blue", 9)]
)
def test_the_places_of_a_cube_are_apart(start: str, places: int) -> None:
    found = [own.place for task, own in TASKS.items() if task.startswith(start) and own.place is not None]
    assert len(found) == places
    assert min(math.dist(one, other) for one, other in itertools.combinations(found, 2)) > 0.07


def test_every_task_has_a_text_of_its_own() -> None:
    prompts = [task_prompt(task) for task in TASKS]
    assert len({prompt.task for prompt in prompts}) == len(TASKS)
    for group in GROUPS.values():
        assert len({task_prompt(task).objective for task in group}) == len(group)
    for task, prompt in zip(TASKS, prompts, strict=True):
        assert prompt.render() == SUITE.description(task)


def test_names_are_taken_as_they_stand() -> None:
    assert suite_of(" scene-drawer-open ") is SUITE
    with pytest.raises(InputError, match="unknown task") as caught:
        suite_of("scene-drawer-opne")
    assert "scene-drawer-open" in str(caught.value.hint)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (
        lambda: SUITE.make("scene-drawer-open", goal_visible=True, render=False),
        lambda: SUITE.demonstrator("scene-drawer-open", goal_visible=True),
    ):
        with pytest.raises(InputError, match="not installed") as caught:
            use()
        assert "llmdpd[ogbench]" in str(caught.value)
