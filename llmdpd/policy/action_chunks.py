"""Playing chunks of actions: several are drawn at one look, and played before the next look (receding horizon)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Draw = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Rows int64 [b] of a call → a chunk for each, actions [b, H, A]."""


class ChunkPlayer:
    """What is left of the chunks of many episodes, each with a clock of its own.

    An episode plays the first `length` actions of a chunk at consecutive time steps, and has the next one drawn in the
    state that it is in then (action chunking: Zhao et al. 2023, ACT, without its temporal ensembling; receding
    horizon: Chi et al. 2023, Diffusion Policy). What is played to an episode hangs on that episode's own past alone.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        # Of each episode under way the time step at which it goes on, and the actions [n, A] from there on.
        self._left: dict[int, tuple[int, NDArray[np.float32]]] = {}

    def reset(self) -> None:
        """Drop what is left of every chunk."""
        self._left.clear()

    def play(self, episodes: NDArray[np.int64], steps: NDArray[np.int64], draw: Draw) -> NDArray[np.float32]:
        """The next action of each of B episodes, [B, A].

        A chunk goes on at the time step after its last action's and at no other: an episode that begins anew, or whose
        clock was set, has one drawn.

        Args:
            episodes: [B], by which they are told apart from call to call; no two alike.
            steps: [B], time step of each within itself.
            draw: called once at most, with the rows whose episodes need a chunk.
        """
        if self._length == 1 or not len(steps):
            return draw(np.arange(len(steps)))[:, 0]
        clocks = list(zip(episodes.tolist(), steps.tolist(), strict=True))
        due = [row for row, (episode, step) in enumerate(clocks) if not self._goes_on(episode, step)]
        if due:
            for row, chunk in zip(due, draw(np.array(due)), strict=True):
                episode, step = clocks[row]
                self._left[episode] = step, chunk[: self._length]
        return np.stack([self._take(episode, step) for episode, step in clocks])

    def _goes_on(self, episode: int, step: int) -> bool:
        return episode in self._left and self._left[episode][0] == step

    def _take(self, episode: int, step: int) -> NDArray[np.float32]:
        _, actions = self._left.pop(episode)
        if len(actions) > 1:
            self._left[episode] = step + 1, actions[1:]
        first: NDArray[np.float32] = actions[0]
        return first
