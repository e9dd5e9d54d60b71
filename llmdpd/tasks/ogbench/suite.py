"""OGBench's scene, cubes and puzzle as a task suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmdpd.tasks.base import Environment, Reading, TaskSpec, TaskSuite
from llmdpd.tasks.behaviours import KINDS
from llmdpd.tasks.ogbench.layout import ACTION_DIM, SPACES
from llmdpd.tasks.ogbench.tasks import GROUPS, MAX_STEPS, PROTOCOLS, TASKS, describe
from llmdpd.utils.extras import check_installed

if TYPE_CHECKING:
    from llmdpd.tasks.demonstrators import Demonstrator


class OGBenchSuite(TaskSuite):
    """Tasks of OGBench, each one thing to do with one thing; the tasks of one kind have one layout."""

    name = "OGBench"
    tasks = tuple(TASKS)
    groups = GROUPS
    protocols = PROTOCOLS
    behaviours: Mapping[str, str] = {kind: description for kind, (_, description) in KINDS.items()}
    collector = "scripted"
    steps_per_second = 20  # real time

    def knows(self, task: str) -> bool:
        return self.canonical(task) in TASKS

    def canonical(self, task: str) -> str:
        return task.strip().lower().replace("_", "-")

    def spec(self, task: str) -> TaskSpec:
        space = SPACES[TASKS[task].kind]
        return TaskSpec.within_one(task, space.state_dim, ACTION_DIM, MAX_STEPS, self.name, space.layout)

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
    check_installed("ogbench", "ogbench", field="tasks")


SUITE = OGBenchSuite()
