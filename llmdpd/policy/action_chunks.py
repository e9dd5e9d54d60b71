"""Action chunks: several actions are sampled at once, and executed before the next are sampled (receding horizon)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class ActionChunks:
    """What is left of the action chunks of many episodes, each with its own time steps.

    An episode executes the first `horizon` actions of a chunk at consecutive time steps, and has the next one sampled
    in the state that it is in then (action chunking: Zhao et al. 2023, ACT, without its temporal ensembling; receding
    horizon: Chi et al. 2023, Diffusion Policy).
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        # Of each episode under way the time step at which it goes on, and the actions [n, A] from there on.
        self._left: dict[int, tuple[int, FloatArray]] = {}

    def reset(self) -> None:
        """Drop what is left of every chunk."""
        self._left.clear()

    def due(self, episodes: IntArray, steps: IntArray) -> IntArray:
        """The rows of B episodes [B], at time steps [B], that need a chunk.

        A chunk goes on at the time step after its last action's and at no other: an episode that begins anew, or whose
        time step was set, needs one.
        """
        clocks = zip(episodes.tolist(), steps.tolist(), strict=True)
        return np.array([row for row, (who, step) in enumerate(clocks) if self._step_of(who) != step], np.int64)

    def put(self, episodes: IntArray, steps: IntArray, chunks: FloatArray) -> None:
        """Chunks [B, H, A] of B episodes, from these time steps on."""
        for who, step, chunk in zip(episodes.tolist(), steps.tolist(), chunks, strict=True):
            self._left[who] = step, chunk[: self._horizon]

    def take(self, episodes: IntArray) -> FloatArray:
        """The next action of each of B episodes, [B, A]."""
        return np.stack([self._take(who) for who in episodes.tolist()])

    def _step_of(self, episode: int) -> int | None:
        return self._left[episode][0] if episode in self._left else None

    def _take(self, episode: int) -> FloatArray:
        step, actions = self._left.pop(episode)
        if len(actions) > 1:
            self._left[episode] = step + 1, actions[1:]
        first: FloatArray = actions[0]
        return first
