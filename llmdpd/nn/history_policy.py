"""Policies that are conditioned on the last steps of an episode and on a target return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.data import Trajectory
from llmdpd.errors import InputError
from llmdpd.nn.config import NetworkConfig
from llmdpd.nn.context import ContextConfig, EncodedPrompts
from llmdpd.nn.episode_memory import History
from llmdpd.nn.features import FeatureKind
from llmdpd.nn.policy_network import PolicyNetwork, States, repeating_last
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.statistics import Observations
from llmdpd.prompts.demonstration import StepSampling, TrajectoryEncoderConfig, TrajectoryTokens, Trim
from llmdpd.utils.bounds import Steps

# Of the scale of returns: greater ones are nothing that a policy has seen the like of.
_BEYOND = 10.0


@dataclass(frozen=True)
class DemonstrationConfig:
    """How a demonstration is cut that is read step by step."""

    steps: Steps = 5
    """Steps of the demonstration that are read."""
    sampling: StepSampling = "last"
    """Which steps of a longer one: `even` over the episode, `window` (steps in a row, anywhere in training), `last`."""
    trim: Trim = "none"
    """What of it is read: all, or its `useful` part; see the trajectory encoder of policy diffusion."""

    def context(self, features: FeatureKind, dropout: float) -> ContextConfig:
        """As a context that reads a demonstration and no text."""
        encoder = TrajectoryEncoderConfig(steps=self.steps, sampling=self.sampling, trim=self.trim)
        return ContextConfig("pooled", text=False, trajectory_dropout=dropout, features=features, encoder=encoder)


class HistoryPolicy(PolicyNetwork):
    """A policy network that is conditioned on history; returns are scaled by the greatest of the training data."""

    return_scale: Tensor

    def __init__(self, spaces: Spaces, config: NetworkConfig) -> None:
        # It reads its demonstration itself, step by step: no encoder of the context's.
        super().__init__(spaces, config, replace(config.context_config(), trajectory=False))
        self.register_buffer("return_scale", torch.ones(()))

    def fit(self, observations: Observations, returns: Callable[[], Tensor]) -> None:
        super().fit(observations, returns)
        self.return_scale.copy_(returns().abs().max().clamp_min(1e-6))

    def fit_beyond(self, observations: Observations, returns: Callable[[], Tensor]) -> list[str]:
        chosen, greatest = super().fit_beyond(observations, returns), returns().abs().max().to(self.return_scale)
        if greatest > _BEYOND * self.return_scale:
            self.return_scale.copy_(greatest)
            chosen.append("returns")
        return chosen

    def sample(self, states: States, prompts: EncodedPrompts, acting: Any, seeds: Tensor, critic: Any = None) -> Tensor:
        if states.history is None:
            raise ValueError("this policy is conditioned on history: it needs what an episode memory recalls")
        padded = states.padded(len(prompts))
        assert padded.history is not None
        keys = repeating_last(seeds, len(padded.observations) - len(seeds))
        actions = self.action(padded.history, prompts, padded.prompt_of, acting, keys)
        return actions[: len(states.observations), None]

    def action(
        self, history: History, prompts: EncodedPrompts, index: Tensor | None, acting: Any, seeds: Tensor
    ) -> Tensor:
        """The action of the present step of B episodes, [B, A].

        index [B] says which of the P prompts each episode is under; None: equal groups in order.
        """
        raise NotImplementedError


def check_one_demonstration(tokens: TrajectoryTokens) -> None:
    """Raise `InputError` for several demonstrations of a prompt: steps stand in a row before the episode's own."""
    if tokens.counts:
        raise InputError(
            "this policy reads one demonstration a prompt",
            field="trajectory",
            found=f"{max(tokens.counts)} demonstrations",
            expected="one",
        )


def target_returns(
    known: Mapping[str, float], tasks: Sequence[str | None], demonstrations: Sequence[Any] | None = None
) -> NDArray[np.float32]:
    """The target return of each of B tasks, [B].

    It is the task's own where it was trained on, else that of its demonstration if its rewards are known, else the mean
    over the tasks that were trained on.

    Args:
        known: task → return, of the training data.
        tasks: [B], None where it is not known.
        demonstrations: [B], where the policy reads them.

    Raises:
        InputError: no return is known.
    """
    targets = []
    for task, demonstration in zip(tasks, demonstrations or [None] * len(tasks), strict=True):
        if task is not None and task in known:
            targets.append(known[task])
        elif isinstance(demonstration, Trajectory) and demonstration.rewards is not None:
            targets.append(float(np.sum(demonstration.rewards, dtype=np.float64)))
        elif known:
            targets.append(sum(known.values()) / len(known))
        else:
            raise InputError(
                "no target return",
                field="target_return",
                found="none in the policy's metadata (target_returns), and none given",
                expected="prompt(target_return=…)",
            )
    return np.array(targets, np.float32)


def check_targets(known: Any) -> None:
    """Raise `InputError` unless a policy's `metadata.target_returns` are numbers by task."""
    good = isinstance(known, dict) and all(
        isinstance(value, float | int) and math.isfinite(value) for value in known.values()
    )
    if not good:
        raise InputError(
            "wrong target returns", field="metadata.target_returns", found=known, expected="task → a finite number"
        )
