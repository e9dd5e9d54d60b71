"""OGBench's oracles as demonstrators."""

from __future__ import annotations

import numpy as np

from llmdpd.tasks.behaviours import Behaviour
from llmdpd.tasks.demonstrators import ScriptedEpisode, ScriptedRequest, demonstrate
from llmdpd.tasks.ogbench.environment import OGBenchTask
from llmdpd.tasks.ogbench.layout import SPACES
from llmdpd.tasks.ogbench.tasks import TASKS


class OracleDemonstrator:
    """The demonstrator of one task, in an environment of its own."""

    def __init__(self, task: str) -> None:
        self._task = OGBenchTask(task)
        (self._grip,) = SPACES[TASKS[task].kind].layout.grip

    def episode(self, request: ScriptedRequest) -> ScriptedEpisode:
        """Run one episode."""
        task = self._task
        behaviour = Behaviour(request.behaviour, np.random.default_rng(request.noise_seed), self._grip)
        task.reset(request.seed)
        task.start_expert(request.noise_seed)
        return demonstrate(task, task.expert_action, behaviour, request)
