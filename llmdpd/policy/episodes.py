"""What acting in many episodes at once remembers: the rest of their action chunks, and their last steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.policy_network import PolicyNetwork, States
from llmdpd.policy.action_chunks import ActionChunks

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Episodes:
    """Acts in episodes that are told apart by numbers, each with a clock of its own.

    What is sampled for an episode depends on that episode's own past alone, but for rounding, whatever else is in the
    batch.

    Args:
        network: the policy's. acting: how it acts. critic: what chooses among several samples; None for nothing.
        prompts: P of them, encoded.
        prompt_of: [episodes], which prompt each episode is under, by its number; None: all under the one.
        targets: returns that are asked for at the beginning, by episode, or one for all; for policies that are
            conditioned on history.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        acting: ActingConfig,
        critic: nn.Module | None,
        prompts: EncodedPrompts,
        prompt_of: IntArray | None = None,
        targets: FloatArray | float = 0.0,
    ) -> None:
        self._network, self._acting, self._critic = network, acting, critic
        self._prompts, self._prompt_of, self._targets = prompts, prompt_of, np.asarray(targets, np.float32)
        self._horizon = acting.horizon(network.config)
        self._chunks, self._memory = ActionChunks(self._horizon), network.episode_memory()

    def reset(self) -> None:
        """Forget every episode."""
        self.drop_chunks()
        if self._memory is not None:
            self._memory.reset()

    def drop_chunks(self) -> None:
        """Sample anew from the next step on."""
        self._chunks.reset()

    def act(
        self,
        episodes: IntArray,
        steps: IntArray,
        observations: FloatArray,
        rewards: FloatArray,
        seeds: Callable[[IntArray], IntArray],
    ) -> FloatArray:
        """The next action of each of B episodes, [B, A].

        Args:
            episodes: [B], their numbers; no two alike. steps: [B], time step of each within itself.
            observations: [B, S], the present ones. rewards: [B], what came of each one's last action.
            seeds: rows [b] of the B that a chunk is sampled for → seeds [b] of its noise.
        """
        if self._horizon == 1:
            return self._sample(episodes, steps, observations, rewards, seeds(np.arange(len(episodes))))[:, 0]
        due = self._chunks.due(episodes, steps)
        if len(due):
            who, when = episodes[due], steps[due]
            chunks = self._sample(who, when, observations[due], rewards[due], seeds(due))
            self._chunks.put(who, when, chunks)
        return self._chunks.take(episodes) if len(episodes) else observations[:, : self._network.action_dim]

    def _sample(
        self, who: IntArray, steps: IntArray, observations: FloatArray, rewards: FloatArray, seeds: IntArray
    ) -> FloatArray:
        """Chunks [b, H, A] from the present states of these episodes on."""
        place, history = self._network.device, None
        if self._memory is not None:
            targets = self._targets[who] if self._targets.ndim else np.full(len(who), self._targets)
            history = self._memory.recall(who, steps, observations, rewards, targets).to(place)
        index = None if self._prompt_of is None else torch.from_numpy(self._prompt_of[who]).to(place)
        states, clock, keys = (torch.from_numpy(part).to(place) for part in (observations, steps, seeds))
        with torch.no_grad():
            sampled = self._network.sample(
                States(states, index, clock, history), self._prompts, self._acting, keys, self._critic
            )
        chunks: FloatArray = sampled.cpu().numpy()
        if self._memory is not None:
            self._memory.note(who, chunks[:, 0])
        return chunks
