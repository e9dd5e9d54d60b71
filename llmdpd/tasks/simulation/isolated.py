"""Environments in a process of their own, for whoever steps one at a time: it is replaced where it dies or hangs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmdpd.tasks.base import FloatArray
from llmdpd.tasks.simulation.processes import MAX_DEATHS, Worker, WorkerDiedError, WorkerError, answered, time_limits
from llmdpd.tasks.simulation.worker import State

_HOST = "llmdpd.tasks.simulation.worker:EnvironmentHost"


@dataclass
class _Episode:
    """What repeats it in a new process."""

    task: str
    seed: int
    actions: list[FloatArray] = field(default_factory=list)
    deaths: int = 0
    lost: bool = False


class IsolatedEnvironments:
    """The calls of `EnvironmentHost`, answered by a process of its own within `time_limits`.

    One that dies, or gives no answer in time, is replaced, and the episode is repeated up to the call. Code in C may
    hang there, which would be deaf to signals here.

    Args:
        make: name ("module:function") of the factory of environments, called with (task, goal_visible, render).
        goal_visible, limit: see `EnvironmentHost`.
    """

    def __init__(self, make: str, *, goal_visible: bool, limit: int) -> None:
        self._arguments = make, goal_visible, limit
        self._step_seconds, self._episode_seconds = time_limits()
        self._episodes: dict[str, _Episode] = {}
        self._worker: Worker | None = None

    def reset(self, slot: str, task: str, seed: int) -> State:
        """See `EnvironmentHost.reset`. Raises WorkerError after three deaths in one episode."""
        self._episodes[slot] = _Episode(task, seed)
        return self._answer(slot, "reset", task, seed)

    def step(self, slot: str, action: npt.ArrayLike) -> State:
        """See `EnvironmentHost.step`. Raises WorkerError after three deaths in one episode."""
        episode = self._episodes[slot]
        episode.actions.append(np.array(action))
        return self._answer(slot, "step", episode.actions[-1])

    def _answer(self, slot: str, method: str, *arguments: Any) -> State:
        episode = self._episodes[slot]
        if self._worker is None:
            self._worker = Worker(0, _HOST, self._arguments)
            # Not at the interpreter's exit, which may be a forked process's: the worker then sees that we are gone.
            weakref.finalize(self, self._worker.stop).atexit = False
        elif self._worker.pending:  # a call that was broken off
            self._replace(self._worker)
        while True:
            seconds = self._step_seconds if method == "step" and not episode.lost else self._episode_seconds
            if episode.lost:
                method, arguments = "replay", (episode.task, episode.seed, episode.actions)
            self._worker.call(None, method, slot, *arguments, seconds=seconds)
            while not answered([self._worker]):
                pass
            try:
                state: State = self._worker.receive()[1]
            except WorkerDiedError:
                death = self._replace(self._worker)
                episode.deaths += 1
                if episode.deaths == MAX_DEATHS:
                    what = f"{MAX_DEATHS} workers died in the episode of task {episode.task}, seed {episode.seed}"
                    raise WorkerError(f"{what}; {death}{death.hint}") from None
            else:
                episode.lost = False
                return state

    def _replace(self, worker: Worker) -> Any:
        for episode in self._episodes.values():
            episode.lost = True
        return worker.replace()
