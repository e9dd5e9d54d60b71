"""OGBench's scene as a task suite."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmdpd.errors import InputError
from llmdpd.tasks.base import Environment, Reading, Split, TaskSpec, TaskSuite
from llmdpd.tasks.behaviours import KINDS
from llmdpd.tasks.ogbench.layout import ACTION_DIM, LAYOUT, STATE_DIM
from llmdpd.tasks.ogbench.tasks import DESIGN, SEEN, TASKS, UNSEEN, describe

if TYPE_CHECKING:
    from llmdpd.tasks.demonstrators import Demonstrator

MAX_STEPS = 200


class OGBenchSuite(TaskSuite):
    """Tasks of OGBench's scene, each one thing to do with one thing, with one layout of observations and actions."""

    name = "OGBench"
    tasks = tuple(TASKS)
    groups: Mapping[str, tuple[str, ...]] = {"ogbench-scene": tuple(TASKS)}
    protocols: Mapping[str, Split] = {
        "ogbench-scene": (SEEN, UNSEEN),
        # Without its unseen tasks: for choosing a design.
        "ogbench-scene-design": (tuple(task for task in SEEN if task not in DESIGN), DESIGN),
    }
    behaviours: Mapping[str, str] = {kind: description for kind, (_, description) in KINDS.items()}
    collector = "scripted"

    def knows(self, task: str) -> bool:
        return self.canonical(task) in TASKS

    def canonical(self, task: str) -> str:
        return task.strip().lower().replace("_", "-")

    def spec(self, task: str) -> TaskSpec:
        return TaskSpec(
            *(task, STATE_DIM, ACTION_DIM, MAX_STEPS, self.name),
            layout=LAYOUT,
            action_low=(-1.0,) * ACTION_DIM,
            action_high=(1.0,) * ACTION_DIM,
        )

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        _check_installed()
        from llmdpd.tasks.ogbench.environment import OGBenchTask

        return OGBenchTask(self.canonical(task), render=render)

    def reading(self, task: str) -> Reading:
        return Reading(terminates=False)  # OGBench's `terminals` are the ends of trajectories

    def demonstrator(self, task: str, *, goal_visible: bool) -> Demonstrator:
        _check_installed()
        from llmdpd.tasks.ogbench.scripted import OracleDemonstrator

        return OracleDemonstrator(task)

    def description(self, task: str) -> str:
        return describe(task)


def _check_installed() -> None:
    if find_spec("ogbench") is None:
        raise InputError(
            "OGBench is not installed",
            field="tasks",
            expected="the package ogbench",
            hint="pip install 'llmdpd[ogbench]'",
        )


SUITE = OGBenchSuite()
