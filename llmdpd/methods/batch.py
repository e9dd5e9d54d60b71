"""What every method learns from in one iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from llmdpd.nn.context import ALL_KEPT, Keep
from llmdpd.prompts.demonstration import TrajectoryTokens
from llmdpd.utils.sharding import Rows, Share

T = TypeVar("T")


@dataclass(frozen=True)
class StepWindows:
    """The H steps of an episode from each of B transitions on: what a trajectory, chunk or sequence is learned from.

    states [B, H, S]; actions [B, H, A] (executed); expert_actions [B, H, A] or None; mask [B, H], False past the
    episode's end, where its last step is repeated; returns [B, H], undiscounted, from each step to the episode's end.
    Where the sampler was made with steps before, those come first, False in the mask before the episode's start.
    """

    states: Tensor
    actions: Tensor
    expert_actions: Tensor | None
    mask: Tensor
    returns: Tensor


_OF_PROMPTS = ("text", "tokens.", "keep.")
"""Leaves of a batch that have a row a prompt; the others have one a transition."""


@dataclass(frozen=True)
class PromptedBatch:
    """B transitions of one or more tasks under P prompts.

    observations, next_observations [B, S]; actions [B, A] (executed); expert_actions [B, A] or None; rewards,
    terminals [B] float32; timesteps [B] int64 within the episode; text [P, D] LLM embeddings; tokens: the trajectory
    prompts; keep: which of the prompts are given in this batch; windows: of steps, where the method needs them. The
    transitions lie in P equal groups, one a prompt, in the prompts' order.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    expert_actions: Tensor | None
    timesteps: Tensor
    text: Tensor | None
    tokens: TrajectoryTokens | None
    keep: Keep = ALL_KEPT
    windows: StepWindows | None = None

    def leaves(self) -> dict[str, Any]:
        """Every part of the batch by its place, as `observations` or `tokens.states`; what is absent as None."""
        return dict(_leaves(self, ""))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the leaves."""
        return {name: leaf for name, leaf in self.leaves().items() if isinstance(leaf, Tensor)}

    def part(self, share: Share) -> PromptedBatch:
        """What is a process's own of the batch: its prompts, and its transitions under them."""
        rows = {name: share.prompts if name.startswith(_OF_PROMPTS) else share.rows for name in self.leaves()}
        return self.with_tensors({name: rows[name].of(tensor) for name, tensor in self.tensors().items()})

    def with_prompts(self, own: Rows) -> PromptedBatch:
        """The batch, whose transitions are a process's own already, with the prompts that are."""
        parts = self.tensors().items()
        return self.with_tensors({n: own.of(tensor) if n.startswith(_OF_PROMPTS) else tensor for n, tensor in parts})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PromptedBatch:
        """The same batch with these in place of its own tensors; every one of `tensors()` must be given."""
        return _with_tensors(self, tensors, "")


def cloned_actions(source: PromptedBatch | StepWindows, clone: str) -> Tensor:
    """The executed actions, or with `clone` "expert" the expert's."""
    actions = source.expert_actions if clone == "expert" else source.actions
    assert actions is not None, "checked when the training data is prepared"
    return actions


def _leaves(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _with_tensors(part: T, tensors: Mapping[str, Tensor], prefix: str) -> T:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value, name = getattr(part, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_tensors(value, tensors, f"{name}.")
        elif isinstance(value, Tensor):
            changes[field.name] = tensors[name]
    return dataclasses.replace(part, **changes)  # type: ignore[type-var]
