"""Acting in many episodes at once: each has its own time steps, chunks and history."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.policy_network import PolicyNetwork, States
from llmdpd.policy.graphs import ActingGraphs
from llmdpd.policy.takeover import Takeover
from llmdpd.utils.settings import in_own_settings
from llmdpd.utils.tensors import check_tensors

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


def check_finite(part: nn.Module | Mapping[str, Tensor] | None) -> None:
    """Raise `InputError` for a number that is not finite: a clipped sample would hide it."""
    check_tensors(part.state_dict() if isinstance(part, nn.Module) else part or {})


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

    def drop(self, episode: int) -> None:
        """Drop what is left of one episode's chunk."""
        self._left.pop(episode, None)

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


class Episodes:
    """Acts in episodes that are told apart by numbers, each with its own time steps.

    What is sampled for an episode depends on that episode's own past alone, but for rounding, whatever else is in the
    batch. Weights count as they are when this is made, with the prompts that were encoded by them: where the C++ code
    acts they are copied, and copied anew where this is copied or pickled. Elsewhere leave them as they are.

    Args:
        network: the policy's. acting: how it acts. critic: what chooses among several samples; None for nothing.
        prompts: P of them, encoded.
        prompt_of: [episodes], which prompt each episode is under, by its number; None: all under the one.
        targets: target returns at the beginning, by episode, or one for all; for policies that are
            conditioned on history.
        takeover: what acts in episodes that do not get on, or last too long; None: the policy alone.
        graphs: what samples on a CUDA device; None: the network, eagerly.

    Raises:
        InputError: NaN or Inf in a weight; several prompts, and no `prompt_of`.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        acting: ActingConfig,
        critic: nn.Module | None,
        prompts: EncodedPrompts,
        prompt_of: IntArray | None = None,
        targets: FloatArray | float = 0.0,
        takeover: Takeover | None = None,
        graphs: ActingGraphs | None = None,
    ) -> None:
        for module in (network, critic):  # they may have been trained since the policy was made
            check_finite(module)
        if prompt_of is None and len(prompts) > 1:
            problem = "which prompt each episode is under is not said"
            raise InputError(
                problem, field="prompt_of", found=f"{len(prompts)} prompts", expected="a number an episode"
            )
        self._network, self._acting, self._critic = network, acting, critic
        self._graphs = None if graphs is None else graphs.of(network, acting, critic)
        self._prompts, self._targets, self._takeover = prompts, np.asarray(targets, np.float32), takeover
        shared = prompt_of is None or len(prompts) == 1  # a policy that reads none has one for all
        self._prompt_of = None if shared else np.asarray(prompt_of, np.int64)
        self._frozen = network.freeze(prompts, acting, critic)
        self._horizon = acting.horizon(network.config)
        self._chunks, self._memory = ActionChunks(self._horizon), network.episode_memory()
        # Of each episode under way the time step after its last observation, and that.
        self._last: dict[int, tuple[int, FloatArray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_frozen": None}  # the C++ code's copy is made anew

    @in_own_settings
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._frozen = self._network.freeze(self._prompts, self._acting, self._critic)

    def reset(self) -> None:
        """Forget every episode."""
        self.drop_chunks()
        self._last.clear()
        for part in (self._memory, self._takeover):
            if part is not None:
                part.reset()

    def forget(self, episodes: IntArray) -> None:
        """Forget these episodes: each begins anew."""
        for who in episodes.tolist():
            self._last.pop(who, None)
            self._chunks.drop(who)
            for part in (self._memory, self._takeover):
                if part is not None:
                    part.forget(who)

    def drop_chunks(self) -> None:
        """Sample anew from the next step on."""
        self._chunks.reset()

    def act(
        self,
        episodes: IntArray,
        steps: IntArray,
        observations: FloatArray,
        rewards: FloatArray | None,
        seeds: Callable[[IntArray], IntArray],
    ) -> FloatArray:
        """The next action of each of B episodes, [B, A], in the environment's own numbers.

        Args:
            episodes: [B], their numbers; no two alike. steps: [B], time step of each within itself.
            observations: [B, S], the present ones. rewards: [B], what came of each one's last action; None for zeros.
            seeds: rows [b] of the B that a chunk is sampled for → seeds [b] of its noise.
        """
        if self._takeover is None:
            return self._act(episodes, steps, observations, rewards, seeds)
        tracked = self._takeover.late(episodes, steps, observations)
        if not any(tracked):
            return self._act(episodes, steps, observations, rewards, seeds)
        late = np.array(tracked)
        actions = np.empty((len(episodes), self._network.action_dim), np.float32)
        actions[late] = self._takeover.act(episodes[late], observations[late])
        own = np.flatnonzero(~late)
        if len(own):
            earned = None if rewards is None else rewards[own]
            # Of all rows, so that the others' noise is what it would be if none were handed over.
            keys = seeds(np.arange(len(episodes)))[own]
            actions[own] = self._act(episodes[own], steps[own], observations[own], earned, lambda due: keys[due])
        return actions

    def taken_over(self, episode: int) -> bool:
        """Whether the tracker acts in an episode."""
        return self._takeover is not None and self._takeover.has(episode)

    def _act(
        self,
        episodes: IntArray,
        steps: IntArray,
        observations: FloatArray,
        rewards: FloatArray | None,
        seeds: Callable[[IntArray], IntArray],
    ) -> FloatArray:
        """As `act`, by the policy itself."""
        scaling = self._network.action_scaling
        observations = self._completed(episodes, steps, observations)
        if self._horizon == 1:
            chunks = self.sample(episodes, steps, observations, rewards, seeds(np.arange(len(episodes))))
            return scaling.from_unit(chunks[:, 0])
        due = self._chunks.due(episodes, steps)
        if len(due):
            who, when = episodes[due], steps[due]
            earned = None if rewards is None else rewards[due]
            chunks = self.sample(who, when, observations[due], earned, seeds(due))
            self._chunks.put(who, when, chunks)
        if not len(episodes):
            return np.empty((0, self._network.action_dim), np.float32)
        return scaling.from_unit(self._chunks.take(episodes))

    def _completed(self, episodes: IntArray, steps: IntArray, observations: FloatArray) -> FloatArray:
        """Observations with what is remembered of the step before, by episode; one that begins anew has none."""
        spaces = self._network.spaces
        if not spaces.remembered:
            return observations
        before = observations.copy()
        for row, (who, step) in enumerate(zip(episodes.tolist(), steps.tolist(), strict=True)):
            due, last = self._last.get(who, (-1, before[row]))
            self._last[who] = step + 1, before[row].copy()
            if due == step:
                before[row] = last
        return spaces.with_remembered(observations, before)

    def sample(
        self, who: IntArray, steps: IntArray, observations: FloatArray, rewards: FloatArray | None, seeds: IntArray
    ) -> FloatArray:
        """Chunks [b, H, A] within ±1 from the present states [b, S] of these episodes on, whatever was sampled before.

        Arguments as in `act`, but observations with what is remembered beside; seeds [b] of the noise.

        Raises:
            InputError: NaN or Inf in the action.
        """
        prompt_of = None if self._prompt_of is None else self._prompt_of[who]
        if self._frozen is None:
            chunks = self._sample_in_torch(who, steps, observations, rewards, prompt_of, seeds)
        else:
            rows = self._frozen.act(observations, steps, prompt_of, seeds)
            width = self._network.action_dim
            chunks = rows.reshape(len(rows), rows.shape[1] // width, width)
        if not np.isfinite(chunks).all():
            expected = "finite numbers: are the weights?"
            raise InputError("NaN or Inf in the action", field="network", expected=expected)
        if self._memory is not None:
            self._memory.note(who, chunks[:, 0])
        return chunks

    @in_own_settings
    def _sample_in_torch(
        self,
        who: IntArray,
        steps: IntArray,
        observations: FloatArray,
        rewards: FloatArray | None,
        prompt_of: IntArray | None,
        seeds: IntArray,
    ) -> FloatArray:
        place, history = self._network.device, None
        if self._memory is not None:
            targets = self._targets[who] if self._targets.ndim else np.full(len(who), self._targets)
            earned = np.zeros(len(who), np.float32) if rewards is None else rewards
            history = self._memory.recall(who, steps, observations, earned, targets)
        if self._graphs is not None and len(who) and self._graphs.serves():
            given: dict[str, NDArray[Any]] = {"observations": observations, "steps": steps, "seeds": seeds}
            given |= {} if prompt_of is None else {"prompt_of": prompt_of}
            given |= {} if history is None else {name: part.numpy() for name, part in history._asdict().items()}
            return self._graphs.sample(given, self._prompts)
        history = None if history is None else history.to(place)
        index = None if prompt_of is None else torch.from_numpy(prompt_of).to(place)
        states, times, keys = (torch.from_numpy(part).to(place) for part in (observations, steps, seeds))
        with torch.no_grad():
            sampled = self._network.sample(
                States(states, index, times, history), self._prompts, self._acting, keys, self._critic
            )
        chunks: FloatArray = sampled.cpu().numpy()
        return chunks
