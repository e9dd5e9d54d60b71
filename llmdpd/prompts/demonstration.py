"""The trajectory prompt: steps taken from demonstrations, and the settings of the encoder that reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmdpd.errors import InputError
from llmdpd.prompts.useful_part import Reason, Recorded, useful_part, without_standing
from llmdpd.tasks.layout import Layout
from llmdpd.utils.bounds import Count, Fraction, Layers, SharedByHeads, Width

StepSampling = Literal["even", "window", "last", "all"]
Trim = Literal["none", "useful"]
Shown = Recorded | tuple[NDArray[np.float32], NDArray[np.float32]]
"""A demonstration: as recorded, or its observations [T, S] and actions [T, A] alone."""


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
    trim: Trim = "none"
    """What of a demonstration is read: all of it, or its `useful` part, up to 20 steps after the success (1 where the
    body then goes far away) or where else its end is found: by the reward, the goal, or when nothing moves any more."""


@dataclass(frozen=True)
class TrajectoryTokens:
    """Steps of P prompts, padded to one length.

    states [P, T, S]; actions [P, T, A]; phase [P, T], 0 … 1 over the episode; times [P, T], time steps within it; mask
    [P, T], True where a step is real; padded: whether any is not (stored, because reading the mask would
    synchronise with the device); returns [P, T], undiscounted, from each step to the end of the demonstration, None
    where rewards are not known.

    Where prompts are of several demonstrations, the rows are those of all, prompt by prompt, and `counts` says how many
    each prompt has; it is empty where each has one. `together()` puts those of a prompt into one row: ends [P, T] is
    then the place of the last step of the demonstration that a step is of.
    """

    states: Tensor
    actions: Tensor
    phase: Tensor
    times: Tensor
    mask: Tensor
    padded: bool
    returns: Tensor | None = None
    counts: tuple[int, ...] = ()
    ends: Tensor | None = None

    def to(self, device: torch.device | str) -> TrajectoryTokens:
        """The same on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return dataclasses.replace(self, **moved)

    def together(self) -> TrajectoryTokens:
        """The demonstrations of each prompt in one row, one after the other; phase and times stay each one's own."""
        length = self.mask.shape[1]
        last = (self.mask.sum(1) - 1).clamp_min(0)
        place = torch.cat([torch.arange(count, device=last.device) for count in self.counts])
        ends = (place * length + last)[:, None].expand(-1, length)
        parts: dict[str, Any] = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        rows: dict[str, Any] = {name: joined(part, self.counts) for name, part in (parts | {"ends": ends}).items()}
        padded = self.padded or len(set(self.counts)) > 1
        return dataclasses.replace(self, **rows, padded=padded)


def joined(parts: Tensor, counts: Sequence[int]) -> Tensor:
    """What is known of the steps of all demonstrations, [N, T, …], as prompts with `counts` of them, [P, C T, …].

    C is the largest of the counts; prompts with fewer are filled up with zeros.
    """
    rows = pad_sequence(list(parts.split(list(counts))), batch_first=True)
    return rows.flatten(1, 2)


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
    return _even(length, config.steps)


@lru_cache(maxsize=4096)
def _even(length: int, count: int) -> NDArray[np.int64]:
    """So many indices over `length` steps; kept, since a batch of training asks for a dozen."""
    index = np.linspace(0, length - 1, count).round().astype(np.int64)
    index.flags.writeable = False
    return index


def make_tokens(
    demonstrations: Sequence[Shown],
    config: TrajectoryEncoderConfig,
    rng: np.random.Generator | None = None,
    *,
    returns: bool = False,
    layout: Layout | None = None,
    counts: tuple[int, ...] = (),
    standing: bool = True,
) -> TrajectoryTokens:
    """Prompt tokens from demonstrations, padded to the longest: `read_part` of each, and `part_tokens`.

    Raises:
        InputError: arrays that do not fit together, hold NaN or Inf, or are too long (see `choose_steps`).
    """
    parts = [read_part(Recorded(*one), config, layout, standing=standing)[0] for one in demonstrations]
    return part_tokens(parts, config, rng, returns=returns, counts=counts)


def part_tokens(
    parts: Sequence[Recorded],
    config: TrajectoryEncoderConfig,
    rng: np.random.Generator | None = None,
    *,
    returns: bool = False,
    counts: tuple[int, ...] = (),
) -> TrajectoryTokens:
    """Prompt tokens from the parts of demonstrations that are read, padded to the longest.

    `returns`: whether returns-to-go are made, for which all must have rewards. `counts`: demonstrations of each prompt;
    by default each is a prompt.

    Raises:
        InputError: a part that is empty or too long (see `choose_steps`).
    """
    chosen = [choose_steps(len(one.observations), config, rng) for one in parts]
    states = _padded([one.observations[index] for index, one in zip(chosen, parts, strict=True)])
    executed = _padded([one.actions[index] for index, one in zip(chosen, parts, strict=True)])
    phase, times, mask = timed(chosen, parts)
    left = None
    if returns:
        earned = [np.cumsum(one.rewards[::-1], dtype=np.float64)[::-1] for one in parts if one.rewards is not None]
        left = _padded([part[index] for index, part in zip(chosen, earned, strict=True)])
    counts = () if all(count == 1 for count in counts) else counts
    return TrajectoryTokens(states, executed, phase, times, mask, not mask.all(), left, counts)


def timed(chosen: Sequence[NDArray[np.int64]], parts: Sequence[Recorded]) -> tuple[Tensor, Tensor, Tensor]:
    """Phase, times and mask of prompts, [P, T], of which these steps of these parts are read."""
    phase = _padded([index / max(len(one.observations) - 1, 1) for index, one in zip(chosen, parts, strict=True)])
    return phase, _padded(chosen), _padded([np.ones(len(index)) for index in chosen]).bool()


def read_part(
    shown: Recorded, config: TrajectoryEncoderConfig, layout: Layout | None = None, *, standing: bool = True
) -> tuple[Recorded, Reason]:
    """The part of a demonstration of which `choose_steps` takes its steps, and what its end was found by.

    `layout` tells what the numbers are, see `useful_part`. `standing`: whether long stretches of standing still are
    read, of useful parts: policies learn from them to wait, and act better without.

    Raises:
        InputError: arrays that do not fit together or hold NaN or Inf.
    """
    _check(shown.observations, shown.actions, shown.rewards)
    if config.trim == "none" or not len(shown.observations):
        return shown, "whole"
    steps, by = useful_part(shown, layout)
    rewards = None if shown.rewards is None else shown.rewards[:steps]
    part = shown._replace(observations=shown.observations[:steps], actions=shown.actions[:steps], rewards=rewards)
    return part if standing else without_standing(part, layout), by


def _padded(parts: Sequence[NDArray[Any]]) -> Tensor:
    """Arrays [T, …] of several lengths as float32 [P, longest T, …], zeros after their ends."""
    padded = np.zeros((len(parts), max(map(len, parts)), *parts[0].shape[1:]), np.float32)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return torch.from_numpy(padded)


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
