"""Meta-World's scripted experts as demonstrators."""

from __future__ import annotations

import numpy as np

from llmdpd.tasks.demonstrators import ScriptedEpisode, ScriptedRequest, demonstrate
from llmdpd.tasks.metaworld.behaviours import Behaviour
from llmdpd.tasks.metaworld.environment import MetaWorldTask, make_task


class ScriptedExpert:
    """The demonstrator of one task, in an environment of its own."""

    def __init__(self, task: str, *, goal_visible: bool) -> None:
        self._task = make_task(task, goal_visible=goal_visible)

    def episode(self, request: ScriptedRequest) -> ScriptedEpisode:
        """Run one episode."""
        return run_episode(self._task, request)


def run_episode(task: MetaWorldTask, request: ScriptedRequest) -> ScriptedEpisode:
    """Roll out `request` on `task`."""
    behaviour = Behaviour(request.behaviour, np.random.default_rng(request.noise_seed))
    return demonstrate(task, task.expert_action, behaviour, request)
