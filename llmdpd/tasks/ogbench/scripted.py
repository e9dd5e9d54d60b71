"""OGBench's oracles as demonstrators."""

from __future__ import annotations

import numpy as np

from llmdpd.tasks.behaviours import Behaviour
from llmdpd.tasks.demonstrators import ScriptedEpisode, ScriptedRequest, demonstrate
from llmdpd.tasks.ogbench.environment import OGBenchTask
from llmdpd.tasks.ogbench.layout import LAYOUT


class OracleDemonstrator:
    """The demonstrator of one task, in an environment of its own."""

    def __init__(self, task: str) -> None:
        self._task = OGBenchTask(task)

    def episode(self, request: ScriptedRequest) -> ScriptedEpisode:
        """Run one episode."""
        task, (grip,) = self._task, LAYOUT.grip
        behaviour = Behaviour(request.behaviour, np.random.default_rng(request.noise_seed), grip)
        task.reset(request.seed)
        task.start_expert(request.noise_seed)
        return demonstrate(task, task.expert_action, behaviour, request)
