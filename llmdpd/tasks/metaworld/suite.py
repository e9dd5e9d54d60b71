"""Meta-World as a task suite."""

from __future__ import annotations

from llmdpd.tasks.base import Environment, TaskSpec, TaskSuite
from llmdpd.tasks.metaworld.layout import ACTION_DIM, LAYOUT, STATE_DIM
from llmdpd.tasks.metaworld.names import TASKS, check_task, is_metaworld

MAX_STEPS = 500


class MetaWorldSuite(TaskSuite):
    """The 50 tasks of Meta-World, with one layout of observations and actions."""

    name = "Meta-World"
    tasks = TASKS
    collector = "scripted"

    def knows(self, task: str) -> bool:
        return is_metaworld(task)

    def canonical(self, task: str) -> str:
        return check_task(task)

    def spec(self, task: str) -> TaskSpec:
        return TaskSpec(
            *(task, STATE_DIM, ACTION_DIM, MAX_STEPS, self.name),
            layout=LAYOUT,
            action_low=(-1.0,) * ACTION_DIM,
            action_high=(1.0,) * ACTION_DIM,
        )

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        from llmdpd.tasks.metaworld.environment import MetaWorldTask

        return MetaWorldTask(task, goal_visible=goal_visible, render=render)


SUITE = MetaWorldSuite()
