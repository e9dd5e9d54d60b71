"""What every agent learns from in one iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmdpd.prompts.trajectory import TrajectoryTokens


@dataclass(frozen=True)
class PromptedBatch:
    """B transitions of one or more tasks under P prompts.

    observations, next_observations [B, S]; actions [B, A] (executed); expert_actions [B, A] or None; rewards,
    terminals [B] float32; timesteps [B] int64 within the episode; prompt_index [B] int64 into the P prompts, None
    where P = 1; text [P, D] LLM embeddings; tokens: the trajectory prompts.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    expert_actions: Tensor | None
    timesteps: Tensor
    prompt_index: Tensor | None
    text: Tensor | None
    tokens: TrajectoryTokens | None
