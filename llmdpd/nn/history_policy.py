"""Policies that are shown the last steps of an episode and asked for a return."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.episode_memory import History
from llmdpd.nn.policy_network import PolicyConfig, PromptedNetwork, Window


class HistoryPolicy(PromptedNetwork):
    """What such policies share: returns are scaled by the greatest of the training data.

    Args: see `PromptedNetwork`.
    """

    return_scale: Tensor
    reads_rewards = False
    """Whether an example's rewards are read too."""

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        super().__init__(state_dim, action_dim, embedding_dim, config)
        self.register_buffer("return_scale", torch.ones(()))

    @property
    @abstractmethod
    def history(self) -> int:
        """Steps of the episode that it is shown at most, the present one among them."""

    @property
    @abstractmethod
    def window(self) -> Window:
        """The steps that it learns from at once."""

    @abstractmethod
    def check_acting(self, acting: ActingConfig) -> None:
        """Raise `InputError` for ways of acting that it does not have."""

    @abstractmethod
    def draw(
        self, history: History, prompts: EncodedPrompts, index: Tensor | None, acting: ActingConfig, seeds: Tensor
    ) -> Tensor:
        """The action of the present step of B episodes → [B, A].

        Args:
            history: of B episodes.
            prompts: P of them. index: [B], which prompt each episode is under; None: P = 1.
            acting: how actions are drawn.
            seeds: int64 [B], of what is random in it.
        """

    def fit_returns(self, returns: Tensor) -> None:
        """Take the scale of the training data's returns-to-go [N]."""
        self.return_scale.copy_(returns.abs().max().clamp_min(1e-6))


def asked_returns(
    known: Mapping[str, float], tasks: Sequence[str | None], examples: Sequence[Any] | None = None
) -> NDArray[np.float32]:
    """The return that is asked for of each of B tasks, [B].

    A task's own where it was trained on; else that of the example that it is told by, if its rewards are there; else
    the mean over the tasks that were trained on.

    Args:
        known: task → return, of the training data.
        tasks: [B], None where it is not known.
        examples: [B], where examples are read.

    Raises:
        InputError: nothing is known to ask for.
    """
    given = examples or [None] * len(tasks)
    asked = []
    for task, example in zip(tasks, given, strict=True):
        if task is not None and task in known:
            asked.append(known[task])
        elif isinstance(example, Trajectory) and example.rewards is not None:
            asked.append(float(np.sum(example.rewards, dtype=np.float64)))
        elif known:
            asked.append(sum(known.values()) / len(known))
        else:
            raise InputError(
                "no return to ask for",
                field="target_return",
                found="none in the policy's facts (target_returns), and none given",
                expected="prompt(target_return=…)",
            )
    return np.array(asked, np.float32)


def check_targets(known: Any) -> None:
    """Raise `InputError` unless a policy's `facts.target_returns` are numbers by task."""
    good = isinstance(known, dict) and all(
        isinstance(value, float | int) and math.isfinite(value) for value in known.values()
    )
    if not good:
        raise InputError(
            "wrong returns to ask for", field="facts.target_returns", found=known, expected="task → a finite number"
        )
