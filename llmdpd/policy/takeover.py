"""Handing over: from some time on a policy's episodes are acted by the tracker of their demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmdpd.policy.tracker import Follower, Scene, Track, nearest

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Takeover:
    """Which episodes the tracker has taken over, and what it does there.

    A policy that has not done its task in a multiple of the demonstration's time is where it does not get on: it stands
    before the goal, at another height say, or repeats what a task that it was trained on asks for. From the moment of
    the demonstration that is most like the state it is in, the tracker goes on as shown.

    Args:
        tracks: [P] prompts, the tracks of each one's demonstrations. scene: of their task.
        after: lengths of a prompt's longest demonstration after which the tracker takes over.
        prompt_of: [episodes], which prompt each is under; None: all under the one.
    """

    def __init__(
        self, tracks: Sequence[Sequence[Track]], scene: Scene, after: float, prompt_of: IntArray | None
    ) -> None:
        self._tracks, self._scene, self._prompt_of = tracks, scene, prompt_of
        self._limits = np.array([after * max(map(len, prompt)) for prompt in tracks])
        self._starts: dict[int, FloatArray] = {}  # the first observation of each episode under way
        self._followers: dict[int, Follower] = {}

    def reset(self) -> None:
        """Forget every episode."""
        self._starts.clear()
        self._followers.clear()

    def forget(self, episode: int) -> None:
        """Forget one: it begins anew."""
        self._starts.pop(episode, None)
        self._followers.pop(episode, None)

    def late(self, episodes: IntArray, steps: IntArray, observations: FloatArray) -> NDArray[np.bool_]:
        """Which of B episodes [B], at time steps [B], the tracker acts in, [B]; it notes where each began.

        Observations [B, S]. An episode whose time step is set back is the policy's again.
        """
        limits = self._limits[0] if self._prompt_of is None else self._limits[self._prompt_of[episodes]]
        late: NDArray[np.bool_] = steps >= limits
        for row, (who, step) in enumerate(zip(episodes.tolist(), steps.tolist(), strict=True)):
            if step == 0 or who not in self._starts:
                self._starts[who] = observations[row].copy()
            if self._followers and not late[row]:
                self._followers.pop(who, None)
        return late

    def act(self, episodes: IntArray, observations: FloatArray) -> FloatArray:
        """The actions [B, A] of episodes that it has taken over, in the environment's own numbers."""
        return np.stack(
            [self._follower(who, now).act(now) for who, now in zip(episodes.tolist(), observations, strict=True)]
        )

    def _follower(self, who: int, now: FloatArray) -> Follower:
        if who not in self._followers:
            prompt = 0 if self._prompt_of is None else int(self._prompt_of[who])
            self._followers[who] = nearest(self._tracks[prompt], self._scene, self._starts[who], now)
        return self._followers[who]
