"""From a task's name to its suite, its canonical name, its spec and its environment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks import SUITES, USER
from llmdpd.tasks.base import Environment, TaskSpec, TaskSuite

__all__ = [
    "TaskSpec",
    "canonical_task",
    "common_spec",
    "find_suite",
    "known_behaviours",
    "make_environment",
    "shown_by",
    "shown_tasks",
    "spec_by_name",
    "suite_of",
    "task_spec",
]


def find_suite(task: str) -> TaskSuite | None:
    """The first suite that knows a task, in any spelling; None where none does.

    The task file in use comes first: its names are taken as they stand, and one such as "push" is not Meta-World's.
    """
    order = sorted(SUITES, key=lambda name: name != USER)
    return next((suite for name in order if (suite := SUITES[name]).knows(task)), None)


def suite_of(task: str) -> TaskSuite:
    """The first suite that knows a task. Raises InputError, which offers the nearest names, where none does."""
    suite = find_suite(task)
    if suite is None and USER in SUITES:
        own = SUITES[USER]
        expected, hint = f"one of {', '.join(own.tasks)}", f"nearest: {nearest_names(task.strip(), own.tasks)}"
        raise InputError(f"{own.name} has no task {task!r}", field="task", found=task, expected=expected, hint=hint)
    if suite is None:
        hint = "nearest: " + nearest_names(task.strip(), [name for suite in SUITES.values() for name in suite.tasks])
        expected = f"a task of one of the suites {', '.join(SUITES)}"
        raise InputError(f"unknown task {task!r}", field="task", found=task, expected=expected, hint=hint)
    return suite


def known_behaviours() -> dict[str, str]:
    """Descriptions of the behaviour policies of all suites' demonstrators, by name."""
    return {name: words for suite in SUITES.values() for name, words in suite.behaviours.items()}


def canonical_task(name: str) -> str:
    """ "sweep-into" → "sweep-into-v3"; "hopper", "hopper-medium-replay-v2" → "Hopper-v4". Errors: see `suite_of`."""
    return suite_of(name).canonical(name)


def task_spec(task: str) -> TaskSpec:
    """The spec of a task in any spelling. An environment of locomotion is made and closed. Errors: see `suite_of`."""
    return _spec(task, SUITES.version)


@lru_cache(maxsize=128)
def _spec(task: str, version: int) -> TaskSpec:
    suite = suite_of(task)
    return suite.spec(suite.canonical(task))


def spec_by_name(name: str) -> TaskSpec | None:
    """The spec of the task that data of this name are of, where a suite knows it.

    Not of a user's file: what it doesn't say of a task, it reads off the task's data.
    """
    suite = find_suite(name)
    return None if suite is None or (USER in SUITES and suite is SUITES[USER]) else task_spec(name)


def make_environment(task: str, goal_visible: bool, render: bool) -> Environment:
    """The environment of a task in any spelling. Errors: see `suite_of`."""
    return suite_of(task).make(task, goal_visible=goal_visible, render=render)


def shown_by(task: str) -> str:
    """The task whose demonstrations show a task, given by its canonical name; see `TaskSuite.shown_by`.

    One that no suite knows, as recorded data may have them, shows itself.
    """
    suite = find_suite(task)
    return task if suite is None else suite.shown_by(task)


def shown_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks whose demonstrations show these, each once, in the order in which they are first needed."""
    return tuple(dict.fromkeys(map(shown_by, tasks)))


def check_environments(tasks: Sequence[str]) -> None:
    """Raise `InputError` for a task that cannot be rolled out: it has no environment, or one that fails."""
    for task in tasks:
        if not task_spec(task).has_environment:
            raise InputError(
                "a task without environment cannot be rolled out",
                field=f"tasks.{task}",
                found="no env in the task file",
                expected='env = "…", a Gymnasium id or "module:factory"',
            )
        suite_of(task).try_out(task)


def common_spec(tasks: Sequence[str]) -> TaskSpec:
    """The spec of the first task, which the others must match.

    Raises InputError for tasks of different families, widths or bounds of actions: one network cannot serve them.
    """
    specs = [task_spec(task) for task in tasks]
    first = specs[0]
    bounded = next((spec for spec in specs if spec.action_low is not None), first)
    for spec in specs[1:]:
        if (spec.family, spec.state_dim, spec.action_dim) != (first.family, first.state_dim, first.action_dim):
            one = f"{first.task} ({first.state_dim} state and {first.action_dim} action numbers)"
            found = f"{one} and {spec.task} ({spec.state_dim} and {spec.action_dim})"
            expected = "tasks with the same observations and actions"
            raise InputError("tasks that one policy cannot serve", field="tasks", found=found, expected=expected)
        # Bounds that are not known, of a task without an environment, may be any.
        if None not in (spec.action_low, bounded.action_low) and _bounds(spec) != _bounds(bounded):
            bounds = (f"{each.task} ({each.action_low} to {each.action_high})" for each in (bounded, spec))
            found, expected = " and ".join(bounds), "tasks whose actions have the same bounds"
            raise InputError("tasks that one policy cannot serve", field="tasks", found=found, expected=expected)
    return first


def _bounds(spec: TaskSpec) -> object:
    return spec.action_low, spec.action_high
