"""The trajectory prompt: steps taken from one demonstration, and the settings of the encoder that reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmdpd.errors import InputError
from llmdpd.utils.bounds import Count, Fraction, Layers, SharedByHeads, Width

StepSampling = Literal["even", "window", "last", "all"]


@dataclass(frozen=True)
class TrajectoryEncoderConfig(SharedByHeads):
    """The trajectory encoder g (paper, equation 3). Sizes are MTDiff's: GPT-2 style, not causal here."""

    layers: Layers = 4
    """Transformer layers."""
    heads: Width = 2
    """Attention heads."""
    width: Width = 256
    """Token width."""
    inner: Width = 1024
    """Width of the feed-forward layers."""
    dropout: Fraction = 0.1
    """Dropout inside the transformer, probability."""
    steps: Count = 50
    """Steps of the demonstration that are read; also the encoder's limit."""
    sampling: StepSampling = "even"
    """How a longer demonstration is cut: `even` over the episode; consecutive steps, `window` (MTDiff's: at a random
    place in training) or `last` (Prompt-DT's); `all`: it is an error."""


@dataclass(frozen=True)
class TrajectoryTokens:
    """Steps of P prompts, padded to one length.

    states [P, T, S]; actions [P, T, A]; phase [P, T], 0 … 1 over the episode; times [P, T], time steps within it; mask
    [P, T], True where a step is real; padded: whether any is not (stored, because reading the mask would
    synchronise with the device); returns [P, T], undiscounted, from each step to the end of the demonstration, None
    where rewards are not known.
    """

    states: Tensor
    actions: Tensor
    phase: Tensor
    times: Tensor
    mask: Tensor
    padded: bool
    returns: Tensor | None = None

    def to(self, device: torch.device | str) -> TrajectoryTokens:
        """The same on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return dataclasses.replace(self, **moved)


def choose_steps(
    length: int, config: TrajectoryEncoderConfig, rng: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """Indices of the steps of an episode of `length` steps that the prompt keeps.

    `rng` moves the window (MTDiff samples its start from [0, 150)); without one it starts at 0.

    Raises:
        InputError: an empty episode, or with `all` one longer than the encoder's limit.
    """
    if length < 1:
        raise InputError("the trajectory prompt is empty", field="trajectory", found="0 steps", expected="at least 1")
    if length <= config.steps:
        return np.arange(length)
    if config.sampling == "all":
        raise InputError(
            "the trajectory prompt is longer than the encoder's limit", field="trajectory", found=f"{length} steps",
            expected=f"at most {config.steps}", hint="cut it, or train with sampling 'even' or 'window'",
        )  # fmt: skip
    if config.sampling == "last":
        return np.arange(length - config.steps, length)
    if config.sampling == "window":
        start = int(rng.integers(min(150, length - config.steps + 1))) if rng is not None else 0
        return np.arange(start, start + config.steps)
    return np.linspace(0, length - 1, config.steps).round().astype(np.int64)


def make_tokens(
    trajectories: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    config: TrajectoryEncoderConfig,
    rng: np.random.Generator | None = None,
    *,
    rewards: list[NDArray[np.float32]] | None = None,
) -> TrajectoryTokens:
    """Prompt tokens from (observations [T, S], actions [T, A]) pairs, padded to the longest.

    `rewards`: of each [T], where they are known.

    Raises:
        InputError: arrays that do not fit together, hold NaN or Inf, or are too long (see `choose_steps`).
    """
    for number, (observations, actions) in enumerate(trajectories):
        _check(observations, actions, None if rewards is None else rewards[number])
    chosen = [choose_steps(len(observations), config, rng) for observations, _ in trajectories]
    columns = [
        (seen[index], done[index], index / max(len(seen) - 1, 1), index, np.ones(len(index)))
        for index, (seen, done) in zip(chosen, trajectories, strict=True)
    ]
    states, executed, phase, times, mask = (_padded(parts) for parts in zip(*columns, strict=True))
    returns = None
    if rewards is not None:
        left = [np.cumsum(earned[::-1], dtype=np.float64)[::-1] for earned in rewards]
        returns = _padded([part[index] for index, part in zip(chosen, left, strict=True)])
    return TrajectoryTokens(states, executed, phase, times, mask.bool(), not mask.all(), returns)


def _padded(parts: Sequence[NDArray[Any]]) -> Tensor:
    """Arrays [T, …] of several lengths as float32 [P, longest T, …], zeros after their ends."""
    return pad_sequence([torch.from_numpy(part.astype(np.float32)) for part in parts], batch_first=True)


def _check(
    observations: NDArray[np.float32], actions: NDArray[np.float32], rewards: NDArray[np.float32] | None
) -> None:
    field = "trajectory"
    fit = observations.ndim == actions.ndim == 2 and len(observations) == len(actions)
    if fit and rewards is not None:
        field, fit = "trajectory.rewards", rewards.shape == observations.shape[:1]
    if not fit:
        found = f"observations {observations.shape}, actions {actions.shape}"
        found += "" if rewards is None else f", rewards {rewards.shape}"
        expected = "[T, S], [T, A]" + ("" if rewards is None else " and [T]")
        problem = "the trajectory prompt's arrays do not fit together"
        raise InputError(problem, field=field, found=found, expected=expected)
    for name, array in (("trajectory", observations), ("trajectory", actions), ("trajectory.rewards", rewards)):
        if array is not None and not np.isfinite(array).all():
            raise InputError("the trajectory prompt holds NaN or Inf", field=name, expected="finite numbers")
