"""Acting on a CPU: from observations to actions in one C++ call, by copies of the weights and the prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.ops import native


class FrozenActor:
    """Samples actions by weights and prompts as they were when it was made; what is trained later changes nothing.

    It is safe to call from several threads at once: it keeps nothing of a call.

    Args:
        prompts: packed, with their context (`llmdpd.ops.packing`).
        sampler: bound to the packed noise network.
        action_dim: numbers of an action, or of a whole chunk.
        critics: Q_1 and Q_2 packed, which choose one of `samples` actions; None where there is one sample.
        samples: N.
        temperature: of the softmax over min(Q_1, Q_2) that an action is chosen by; None: the maximum is taken.
    """

    def __init__(
        self,
        prompts: Any,
        sampler: Any,
        action_dim: int,
        critics: tuple[Any, Any] | None = None,
        samples: int = 1,
        temperature: float | None = None,
    ) -> None:
        self._prompts, self._sampler, self._action_dim = prompts, sampler, action_dim
        self._actor = None
        if critics is not None and samples > 1:
            soft = temperature is not None
            self._actor = native.module().Actor(sampler, *critics, samples, soft, temperature or 1.0)

    def act(
        self,
        observations: NDArray[np.float32],
        times: NDArray[np.int64],
        prompt_of: NDArray[np.int64] | None,
        seeds: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Actions [B, A] of observations [B, S] at time steps [B].

        prompt_of [B] is which prompt each state is under; None: all under the first. The noise of each state depends
        on its own seed [B] alone, and its action on nothing else of the batch.
        """
        actions = np.empty((len(observations), self._action_dim), np.float32)
        states, steps, keys = (np.ascontiguousarray(part) for part in (observations, times, seeds.view(np.uint64)))
        index = None if prompt_of is None else np.ascontiguousarray(prompt_of)
        self._prompts.act(self._sampler, self._actor, states, steps, index, keys, actions, native.threads())
        return actions
