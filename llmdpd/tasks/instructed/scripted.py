"""The experts that follow instructions, as demonstrators."""

from __future__ import annotations

import numpy as np

from llmdpd.tasks.demonstrators import ScriptedEpisode, ScriptedRequest, demonstrate
from llmdpd.tasks.instructed.environment import InstructedTask
from llmdpd.tasks.metaworld.behaviours import Behaviour


class InstructedExpert:
    """The demonstrator of one task, in an environment of its own."""

    def __init__(self, task: str, *, goal_visible: bool) -> None:
        self._task = InstructedTask(task, goal_visible=goal_visible)

    def episode(self, request: ScriptedRequest) -> ScriptedEpisode:
        """Run one episode."""
        behaviour = Behaviour(request.behaviour, np.random.default_rng(request.noise_seed))
        return demonstrate(self._task, self._task.expert_action, behaviour, request)
