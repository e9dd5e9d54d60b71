"""Diffusion over trajectories: the denoiser of a plan of H steps (s, a), and its reverse chain.

A plan is x = (s_t, a_t … s_{t+H-1}, a_{t+H-1}), [H, S + A], of which s_t is known (Janner et al. 2022, Diffuser). The
network is MTDiff's (He et al. 2023), a transformer of GPT-2's make over the plan's steps; not causal here, since every
step of a plan is there at every step of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmdpd.diffusion.noise_mlp import SinusoidalTime
from llmdpd.diffusion.reference import walk_chain
from llmdpd.ops.arguments import SamplerCoefficients
from llmdpd.ops.philox import philox_normal
from llmdpd.utils.bounds import Fraction, Layers, Steps, Width, check_heads

# Plans are drawn so many at a time, always: a matrix product of another number of rows can round in another way, and a
# plan would hang on the batch that it is drawn in.
_BLOCK = 8


@dataclass(frozen=True)
class PlanConfig:
    """The plan and the transformer that denoises it. Defaults are MTDiff's."""

    horizon: Steps = 32
    """H, steps of a plan; the first of its actions is executed."""
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

    def check(self) -> None:
        """Raise `InputError` for a width that the heads cannot share evenly."""
        check_heads(self.width, self.heads)


class Before(NamedTuple):
    """Tokens [B, M, W] that stand before a plan's and are not denoised; mask [B, M], False where there is none."""

    tokens: Tensor
    mask: Tensor


class PlanDenoiser(nn.Module):
    """epsilon(x_k, s, z, k): the noise in a plan, given state features, prompt vector and diffusion step.

    One token a step of the plan. What it is conditioned on is added to every token: the diffusion step, and state and
    prompt together through two layers, computed once a chain (`context`).

    Args:
        plan_dim: P = S + A, numbers of a step of the plan.
        state_dim: F, of the state features [B, F].
        prompt_dim: Z, of the prompt vector [Z] or [B, Z]; 0 for none.
        time_dim: size of the sinusoidal time embedding (even).
        config: see `PlanConfig`.
    """

    def __init__(self, plan_dim: int, state_dim: int, prompt_dim: int, time_dim: int, config: PlanConfig) -> None:
        super().__init__()
        width = config.width
        self.plan_dim, self.horizon = plan_dim, config.horizon
        self.embed = nn.Linear(plan_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(config.horizon, width))
        self.time_mlp = nn.Sequential(
            SinusoidalTime(time_dim), nn.Linear(time_dim, width), nn.Mish(), nn.Linear(width, width)
        )
        self.condition = nn.Sequential(nn.Linear(state_dim + prompt_dim, width), nn.Mish(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(
            width, config.heads, config.inner, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, plan_dim)

    def context(self, state: Tensor, prompt: Tensor) -> Tensor:
        """State features [B, F] and prompt [Z] or [B, Z] → [B, W]."""
        context: Tensor = self.condition(torch.cat([state, prompt.expand(len(state), -1)], dim=-1))
        return context

    def denoise(
        self,
        plan: Tensor,
        context: Tensor,
        time_rows: Tensor,
        mask: Tensor | None = None,
        before: Before | None = None,
    ) -> Tensor:
        """epsilon from x_k [B, H, P], context [B, W] and time embeddings [W] or [B, W].

        mask [B, H] is True where a step is real; the others are not attended to, and their epsilon means nothing.
        """
        tokens = self.embed(plan) + self.position + (context + time_rows)[:, None]
        if before is not None:
            mask = torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask
            tokens, mask = torch.cat([before.tokens, tokens], 1), torch.cat([before.mask, mask], 1)
        padding = None if mask is None else ~mask
        return self.head(self.transformer(tokens, src_key_padding_mask=padding)[:, -self.horizon :])

    def time_rows(self, timesteps: Tensor) -> Tensor:
        """Time indices int64 [K] → [K, W]."""
        rows: Tensor = self.time_mlp(timesteps)
        return rows

    def forward(
        self, plan: Tensor, timesteps: Tensor, state: Tensor, prompt: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """epsilon [B, H, P]: noisy plans [B, H, P], time indices int64 [B], state [B, F], prompt, mask [B, H]."""
        return self.denoise(plan, self.context(state, prompt), self.time_rows(timesteps), mask)


def with_present(plan: Tensor, present: Tensor) -> Tensor:
    """The plans [B, H, S + A] with the present state [B, S] in place of their first one (Diffuser's inpainting)."""
    first = torch.cat([present, plan[:, 0, present.shape[1] :]], dim=-1)
    return torch.cat([first[:, None], plan[:, 1:]], dim=1)


def reverse_plan(
    net: PlanDenoiser, present: Tensor, state: Tensor, prompt: Tensor, plan: SamplerCoefficients, seeds: Tensor
) -> Tensor:
    """Draw plans by walking the reverse chain, the present state in place at every step.

    Args:
        net: the denoiser.
        present: [B, S], the first state of each plan, within the plan's bound.
        state: features [B, F]. prompt: [Z] or [B, Z].
        plan: from `sampler_plan`; what it bounds is states and actions alike.
        seeds: int64 [B]: each plan's noise hangs on its own seed alone (`philox_normal`, a row a step of the plan).

    Returns:
        [B, H, S + A].
    """
    batch = len(state)
    if batch == 0:
        return state.new_zeros(0, net.horizon, net.plan_dim)
    time_rows = net.time_rows(torch.tensor(plan.timesteps).to(state.device))
    prompts = prompt.expand(batch, -1)
    plans = [
        _walk(net, present[rows], net.context(state[rows], prompts[rows]), time_rows, plan, noise)
        for rows, noise in noise_blocks(net, plan, seeds, state)
    ]
    return torch.cat(plans)[:batch]


def noise_blocks(
    net: PlanDenoiser, plan: SamplerCoefficients, seeds: Tensor, like: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The noise of B plans, as many at a time as are drawn together: rows int64 [8] of the B, noise [K + 1, 8, H, P].

    The last block is filled up with its own last row. Where the plan draws at no step, noise is the start alone.

    Args:
        seeds: int64 [B]. like: of the noise's device and dtype.
    """
    draws = plan.steps + 1 if (plan.S > 0).any() else 1
    for start in range(0, len(seeds), _BLOCK):
        rows = torch.arange(start, start + _BLOCK, device=like.device).clamp_max(len(seeds) - 1)
        yield rows, philox_normal(seeds[rows], _BLOCK, net.horizon, draws, net.plan_dim, like.device).to(like.dtype)


def _walk(
    net: PlanDenoiser, present: Tensor, context: Tensor, time_rows: Tensor, plan: SamplerCoefficients, noise: Tensor
) -> Tensor:
    return walk_chain(
        plan, noise, lambda x, k: net.denoise(x, context, time_rows[k]), lambda x: with_present(x, present)
    )
