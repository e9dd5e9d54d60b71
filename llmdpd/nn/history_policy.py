"""Policies that are conditioned on the last steps of an episode and on the return that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.nn.context import ContextConfig, EncodedPrompts
from llmdpd.nn.episode_memory import History
from llmdpd.nn.features import FeatureKind
from llmdpd.nn.policy_network import NetworkConfig, PolicyNetwork, Spaces, States, padded_rows
from llmdpd.prompts.demonstration import StepSampling, TrajectoryEncoderConfig
from llmdpd.utils.bounds import Count


@dataclass(frozen=True)
class DemonstrationConfig:
    """How a demonstration is cut that is read step by step."""

    steps: Count = 5
    """Steps of the demonstration that are read."""
    sampling: StepSampling = "last"
    """Which steps of a longer one: `even` over the episode, `window` (steps in a row, anywhere in training), `last`."""

    def context(self, features: FeatureKind, dropout: float) -> ContextConfig:
        """As a context that reads a demonstration and no text."""
        encoder = TrajectoryEncoderConfig(steps=self.steps, sampling=self.sampling)
        return ContextConfig("pooled", text=False, trajectory_dropout=dropout, features=features, encoder=encoder)


class HistoryPolicy(PolicyNetwork):
    """A policy network that is conditioned on history; returns are scaled by the greatest of the training data."""

    return_scale: Tensor

    def __init__(self, spaces: Spaces, config: NetworkConfig, context: ContextConfig | None = None) -> None:
        super().__init__(spaces, config, context)
        self.register_buffer("return_scale", torch.ones(()))

    def fit(self, observations: Tensor, returns: Callable[[], Tensor]) -> None:
        super().fit(observations, returns)
        self.return_scale.copy_(returns().abs().max().clamp_min(1e-6))

    def sample(self, states: States, prompts: EncodedPrompts, acting: Any, seeds: Tensor, critic: Any = None) -> Tensor:
        """See `PolicyNetwork.sample`.

        Raises:
            ValueError: no history.
        """
        if states.history is None:
            raise ValueError("this policy is conditioned on history: it needs what an episode memory recalls")
        count = len(states.observations)
        alone = states.prompt_of is None and len(prompts) > 1
        rows = torch.arange(count) if alone else padded_rows(count)
        rows = rows.to(self.device)
        index = None if states.prompt_of is None else states.prompt_of[rows]
        return self.action(states.history.take(rows), prompts, index, acting, seeds[rows])[:count, None]

    def action(
        self, history: History, prompts: EncodedPrompts, index: Tensor | None, acting: Any, seeds: Tensor
    ) -> Tensor:
        """The action of the present step of B episodes, [B, A].

        Args:
            history: of B episodes.
            prompts: P of them. index: [B], which prompt each episode is under; None: P = 1.
            acting: the method's `ActingConfig`.
            seeds: int64 [B], of what is random in it.
        """
        raise NotImplementedError


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
