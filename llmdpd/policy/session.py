"""`Session`: a prompted policy in use, with its own time steps and noise."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from llmdpd.errors import InputError
from llmdpd.policy.episodes import Episodes
from llmdpd.policy.inputs import Observations, read_observations, read_rewards

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Seeds:
    """A stream of seeds of the noise.

    Args:
        seed: an integer, numpy's too.
    """

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(int(seed))

    def next(self, count: int) -> IntArray:
        """The next seeds [count]."""
        seeds: IntArray = torch.randint(2**63 - 1, (count,), generator=self._random).numpy()
        return seeds

    def __getstate__(self) -> NDArray[np.uint8]:
        state: NDArray[np.uint8] = self._random.get_state().numpy()  # a generator does not reach a spawned process
        return state

    def __setstate__(self, state: NDArray[np.uint8]) -> None:
        self._random = torch.Generator()
        self._random.set_state(torch.from_numpy(state))


class Session:
    """A prompted policy in use: one episode, or the rows of a vector environment, each an episode of its own.

    What it keeps between calls is each row's time step, what is left of its action chunk, its history where the policy
    is conditioned on one, and the state of the noise. All else is the policy's, and does not change: sessions may act
    at the same time in threads of their own, one in each.

    Args:
        episodes: what acts, under its prompt. width: numbers of an observation. seed: of the noise. keys: of Dict
            observations, in the order in which they are read; none of others.
    """

    def __init__(self, episodes: Episodes, width: int, seed: int = 0, keys: tuple[str, ...] = ()) -> None:
        self._episodes, self._width, self._keys = episodes, width, keys
        self._timesteps = np.zeros(1, np.int64)  # the time step at which each row goes on
        self._seeds = Seeds(seed)

    def reset(self, rows: ArrayLike | None = None) -> None:
        """Start an episode in these rows, or in all: the time step goes back to 0, what is left of a chunk is dropped.

        Raises:
            InputError: rows that are no whole numbers from 0 on.
        """
        if rows is None:
            self._timesteps[:] = 0
            self._episodes.reset()
            return
        which = _whole_numbers(rows, "rows").ravel()
        known = which[which < len(self._timesteps)]
        self._timesteps[known] = 0
        self._episodes.forget(known)

    @property
    def tracked(self) -> NDArray[np.bool_]:
        """In which rows [B] the tracker acts in place of the policy, since the last call of `act`."""
        rows = range(len(self._timesteps))
        return np.array([self._episodes.taken_over(row) for row in rows], np.bool_)

    def seed(self, seed: int) -> None:
        """Fix the noise of all actions from here on; what is left of a chunk was sampled before, and is dropped."""
        self.use(Seeds(seed))

    def use(self, seeds: Seeds) -> None:
        """Take the noise's seeds from this stream from here on."""
        self._episodes.drop_chunks()
        self._seeds = seeds

    def act(
        self, observation: Observations, step: ArrayLike | None = None, reward: ArrayLike | None = None
    ) -> FloatArray:
        """Observation [S] → action [A], or [B, S] → [B, A], all under the one prompt.

        Observations of a Dict space may be given by key, as the environment returns them.
        Row i is the same episode from call to call. Its time step counts by itself from `reset()`; `step` sets it, one
        number for all or [B]. With action chunks, an observation is read where a chunk is sampled: after `reset()`,
        after the last one's `action_horizon` actions, and where the time step was set to another step than the next.
        `reward`, of the last action (a number, or [B]), is taken off the return that a policy which is conditioned on
        history asks for, and which stays as it is without; other policies have no use for it.

        Raises:
            InputError: an observation of another width, or that is no finite numbers; steps or rewards that do not fit.
        """
        state = read_observations(observation, self._width, self._keys)
        rows = state[None] if state.ndim == 1 else state
        count = len(rows)
        self._grow(count)
        if step is not None:
            self._timesteps[:count] = _steps(step, count)
        rewards = None if reward is None else read_rewards(reward, count)
        actions = self._episodes.act(
            np.arange(count), self._timesteps[:count].copy(), rows, rewards, lambda due: self._seeds.next(len(due))
        )
        self._timesteps[:count] += 1
        return actions[0] if state.ndim == 1 else actions

    def _grow(self, count: int) -> None:
        """Have a clock for so many rows; those that are new begin."""
        if count > len(self._timesteps):
            self._timesteps = np.pad(self._timesteps, (0, count - len(self._timesteps)))


def _steps(step: ArrayLike, count: int) -> IntArray:
    given = _whole_numbers(step, "step")
    if given.shape not in ((), (count,)):
        raise InputError("wrong steps", field="step", found=f"shape {given.shape}", expected=f"one, or {count} of them")
    return given


def _whole_numbers(given: ArrayLike, field: str) -> IntArray:
    try:
        numbers = np.asarray(given)
        whole = numbers.dtype.kind in "iu" or not numbers.size
    except ValueError:  # lists of unequal lengths
        numbers, whole = np.asarray(()), False
    if not whole or (numbers < 0).any() or (numbers > np.iinfo(np.int64).max // 2).any():
        raise InputError(f"wrong {field}", field=field, found=repr(given)[:60], expected="whole numbers from 0 on")
    return numbers.astype(np.int64)
