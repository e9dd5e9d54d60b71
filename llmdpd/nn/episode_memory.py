"""Memory of an episode while acting: what history-conditioned methods are shown of past steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class History(NamedTuple):
    """The last steps of B episodes, T at most, each from the left on, the present one last; zeros after it.

    states [B, T, S]; actions [B, T, A], executed, zeros at the present step; returns [B, T], the target
    return at each step; timesteps int64 [B, T]; lengths int64 [B], at least 1.
    """

    states: Tensor
    actions: Tensor
    returns: Tensor
    timesteps: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> History:
        """The same on another device."""
        return History(*(part.to(device) for part in self))


@dataclass
class _Steps:
    """One episode's last steps, and the time step at which it goes on."""

    states: deque[FloatArray]
    actions: deque[FloatArray]
    returns: deque[float]
    first: int
    next: int = -1


class EpisodeMemory:
    """The last `length` steps of many episodes, each with its own time steps.

    Args:
        length: steps that are remembered, the present one among them.
        action_dim: A.
    """

    def __init__(self, length: int, action_dim: int) -> None:
        self._length, self._action_dim = length, action_dim
        self._episodes: dict[int, _Steps] = {}

    def reset(self) -> None:
        """Forget every episode."""
        self._episodes.clear()

    def forget(self, episode: int) -> None:
        """Forget one episode."""
        self._episodes.pop(episode, None)

    def recall(
        self, episodes: IntArray, steps: IntArray, observations: FloatArray, rewards: FloatArray, targets: FloatArray
    ) -> History:
        """Take note of the present states, and show them with what went before.

        An episode goes on at the time step after its last one's and at no other: one that begins anew, or whose time
        step was set, has no past, and its target is the whole return again.

        Args:
            episodes: [B], by which they are told apart from call to call; no two alike.
            steps: [B], time step of each within itself.
            observations: [B, S].
            rewards: [B], what came of each one's last action: it is taken off the target.
            targets: [B], target returns at the beginning.
        """
        rows = zip(episodes.tolist(), steps.tolist(), observations, rewards.tolist(), targets.tolist(), strict=True)
        known = [self._take(*row) for row in rows]
        longest = max(len(one.states) for one in known)
        states = np.zeros((len(known), longest, observations.shape[1]), np.float32)
        actions = np.zeros((len(known), longest, self._action_dim), np.float32)
        returns, timesteps = np.zeros((len(known), longest), np.float32), np.zeros((len(known), longest), np.int64)
        for row, one in enumerate(known):
            count = len(one.states)
            states[row, :count], returns[row, :count] = np.stack(tuple(one.states)), tuple(one.returns)
            timesteps[row, :count] = np.arange(one.first, one.first + count)
            if one.actions:
                actions[row, : count - 1] = np.stack(tuple(one.actions))
        lengths = np.array([len(one.states) for one in known], np.int64)
        return History(*(torch.from_numpy(part) for part in (states, actions, returns, timesteps, lengths)))

    def note(self, episodes: IntArray, actions: FloatArray) -> None:
        """The actions [B, A] that are executed in the states that were just shown."""
        for episode, action in zip(episodes.tolist(), actions, strict=True):
            self._episodes[episode].actions.append(action.copy())

    def _take(self, episode: int, step: int, observation: FloatArray, reward: float, target: float) -> _Steps:
        known = self._episodes.get(episode)
        # Fewer actions than states: nothing was sampled in the last one.
        if known is None or known.next != step or len(known.actions) != len(known.states):
            known = _Steps(deque(), deque(), deque(), step)
            self._episodes[episode] = known
        known.returns.append(known.returns[-1] - reward if known.returns else target)
        known.states.append(observation.copy())
        if len(known.states) > self._length:
            for part in (known.states, known.actions, known.returns):
                part.popleft()
            known.first += 1
        known.next = step + 1
        return known
