"""The conditional policy's networks: prompts + state → context → reverse diffusion → action."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from llmdpd.context import Condition, ContextConfig, EncodedPrompts, make_context
from llmdpd.diffusion import NoiseMLP, SamplerPlan, alphas, sampler_plan
from llmdpd.diffusion.schedules import ScheduleName
from llmdpd.errors import InputError
from llmdpd.prompts.trajectory import TrajectoryTokens


@dataclass(frozen=True)
class PolicyConfig:
    """The policy's networks. Defaults are Diffusion-QL's."""

    hidden_dim: int = 256
    """Width of the noise network's three hidden layers."""
    time_dim: int = 16
    """Size of the time embedding."""
    diffusion_steps: int = 5
    """K, steps of the diffusion chain."""
    schedule: ScheduleName = "vp"
    """Variance schedule of the forward process."""
    action_bound: float = 1.0
    """Actions lie in ±this; x0 is clipped to it at every step."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """How prompts and state become the condition."""

    def check(self) -> None:
        """Raise `InputError` for sizes that don't fit each other; each by itself is held to `llmdpd.limits`."""
        heads, width = self.context.encoder.heads, self.context.encoder.width
        if width % heads:
            raise InputError(
                "the trajectory encoder's width cannot be shared out among its heads",
                field="context.encoder.heads",
                found=heads,
                expected=f"a divisor of {width} (policy.context.encoder.width)",
            )
        if self.time_dim % 2:
            raise InputError(
                "the time embedding is sine and cosine pairs",
                field="time_dim",
                found=self.time_dim,
                expected="an even number",
            )


class ConditionalPolicy(nn.Module):
    """pi(a | s, z_text, z_traj): encoders (psi, phi) and noise network (theta) of the paper's section 3.2.

    Args:
        state_dim: S. action_dim: A. embedding_dim: D, of the LLM's embeddings.
        config: see `PolicyConfig`.
    """

    alpha_bar: Tensor

    def __init__(self, state_dim: int, action_dim: int, embedding_dim: int, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.state_dim, self.action_dim, self.embedding_dim = state_dim, action_dim, embedding_dim
        self.context = make_context(state_dim, action_dim, embedding_dim, config.context)
        self.net = NoiseMLP(
            self.context.state_dim, action_dim, self.context.prompt_dim, config.hidden_dim, config.time_dim
        )
        bar = np.cumprod(alphas(config.schedule, config.diffusion_steps))
        self.register_buffer("alpha_bar", torch.from_numpy(bar).float(), persistent=False)

    @property
    def plan(self) -> SamplerPlan:
        """The sampler of training: DDPM over the K steps of the chain."""
        config = self.config
        return sampler_plan("ddpm", config.diffusion_steps, config.schedule, config.action_bound)

    def encode(self, text: Tensor | None, tokens: TrajectoryTokens | None) -> EncodedPrompts:
        """Read P prompts (equations 1 and 3): LLM embeddings [P, D], trajectory tokens."""
        return self.context.encode(text, tokens)

    def condition(self, state: Tensor, prompts: EncodedPrompts, index: Tensor | None, clock: Tensor) -> Condition:
        """Observations [B, S] under prompts, `index` [B] says which → the noise network's condition."""
        return self.context.condition(state, prompts, index, clock)
