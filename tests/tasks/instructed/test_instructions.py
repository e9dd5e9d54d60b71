"""Names, texts and protocol of Meta-World's tasks under instructions."""

from __future__ import annotations

import pytest

from llmdpd.errors import InputError
from llmdpd.prompts import task_prompt
from llmdpd.tasks.instructed.instructions import TASKS
from llmdpd.tasks.instructed.suite import BASES, SUITE
from llmdpd.tasks.metaworld import names
from llmdpd.tasks.metaworld.suite import SUITE as METAWORLD
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.tasks.specs import canonical_task, common_spec, shown_by, shown_tasks, suite_of


@pytest.mark.parametrize("name", ["wait-push", "Wait_Push-v3", " wait-push-v2 "])
def test_a_task_has_one_name_in_every_spelling(name: str) -> None:
    assert suite_of(name) is SUITE
    assert canonical_task(name) == "wait-push"


def test_the_names_are_no_other_suites() -> None:
    assert len(set(TASKS)) == 2 * len(names.TASKS)
    for task in TASKS:
        assert SUITE.canonical(task) == task
        assert not METAWORLD.knows(task)
        assert suite_of(task) is SUITE
    assert not any(SUITE.knows(task) for task in names.TASKS)


@pytest.mark.parametrize("name", ["wait", "wait-", "finish-pour", "push", "go-push"])
def test_an_unknown_name_is_refused(name: str) -> None:
    assert not SUITE.knows(name)
    with pytest.raises(InputError, match="under an instruction") as error:
        SUITE.canonical(name)
    assert "nearest: " in str(error.value)


def test_both_instructions_are_shown_by_the_one_that_finishes() -> None:
    assert (shown_by("wait-push"), shown_by("finish-push")) == ("finish-push", "finish-push")
    assert shown_tasks(("wait-push", "finish-door-lock", "finish-push")) == ("finish-push", "finish-door-lock")
    # Of other suites each task shows itself.
    assert shown_tasks(("push-v3", "scene-drawer-open", "Hopper-v4")) == ("push-v3", "scene-drawer-open", "Hopper-v4")


@pytest.mark.parametrize("base", BASES)
def test_the_texts_differ_in_what_is_asked_for_alone(base: str) -> None:
    finish, wait = (task_prompt(f"{each}-{base}") for each in ("finish", "wait"))
    assert (finish.task, finish.objects) == (wait.task, wait.objects)
    own = task_prompt(base)
    for prompt in (finish, wait):
        assert prompt.objective.startswith(own.objective.rstrip("."))
        assert prompt.constraints == prompt.actions == prompt.observations == ""
    assert finish.objective.endswith(", and carry this through to its end.")
    assert wait.objective.endswith(", but only go near it and wait there, without touching anything.")
    assert own.success in finish.success
    assert wait.success == "the hand waits near the object, which has not moved."


def test_the_protocol_has_both_instructions_over_ml45s_tasks() -> None:
    tasks = PROTOCOLS["text"]
    assert (len(tasks.seen), len(tasks.unseen)) == (66, 8)
    assert common_spec(tasks.all).family == SUITE.name
    for split, allowed in ((tasks.seen, names.ML45_TRAIN), (tasks.unseen, names.ML45_TEST)):
        bases = [task.partition("-")[2] for task in split]
        assert {f"{base}-v3" for base in bases} <= set(allowed)
        assert set(split) == {f"{each}-{base}" for base in bases for each in ("finish", "wait")}
        assert tuple(map(canonical_task, split)) == split
