"""Diffusion over trajectories of H steps (s, a): the denoiser, and its reverse chain.

A trajectory is x = (s_t, a_t … s_{t+H-1}, a_{t+H-1}), [H, S + A], of which s_t is known (Janner et al. 2022, Diffuser).
The network is MTDiff's (He et al. 2023), a transformer over the trajectory's steps; it is not causal, since every step
is there at every step of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from llmdpd.diffusion.noise_mlp import SinusoidalTime
from llmdpd.diffusion.on_device import coefficient_tensors
from llmdpd.diffusion.reference import walk_chain
from llmdpd.nn.layers import mlp, transformer
from llmdpd.ops.arguments import SamplerCoefficients
from llmdpd.ops.philox import philox_normal
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Fraction, Layers, SharedByHeads, Steps, Width

if TYPE_CHECKING:
    from typing_extensions import Self

# Trajectories are sampled in blocks of this size, always: a matrix product of another number of rows can round in
# another way, and a trajectory would depend on the batch that it is sampled in.
_BLOCK = 8


@dataclass(frozen=True)
class TrajectoryConfig(SharedByHeads):
    """The trajectory and the transformer that denoises it. Defaults are MTDiff's."""

    horizon: Steps = 32
    """H, steps of a trajectory; the first of its actions is executed."""
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

    @classmethod
    def sized(cls, small: bool) -> Self:
        """The defaults, or sizes that fit two CPU cores."""
        return cls(horizon=8, layers=2, width=128, inner=256) if small else cls()


class Before(NamedTuple):
    """Tokens [B, M, W] that stand before a trajectory and are not denoised; mask [B, M], False where there is none."""

    tokens: Tensor
    mask: Tensor


class TrajectoryDenoiser(nn.Module):
    """epsilon(x_k, s, z, k): the noise in a trajectory, given state features, prompt vector and diffusion step.

    One token a step. What it is conditioned on is added to every token: the embedding of the diffusion timestep, and
    state and prompt together through two layers, computed once a chain (`context`).

    Args:
        step_dim: P = S + A, numbers of a step.
        state_dim: F, of the state features [B, F].
        prompt_dim: Z, of the prompt vector [Z] or [B, Z]; 0 for none.
        time_dim: size of the sinusoidal timestep embedding (even).
        config: see `TrajectoryConfig`.
    """

    def __init__(self, step_dim: int, state_dim: int, prompt_dim: int, time_dim: int, config: TrajectoryConfig) -> None:
        super().__init__()
        width = config.width
        self.step_dim, self.horizon = step_dim, config.horizon
        self.embed = nn.Linear(step_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(config.horizon, width))
        self.time_mlp = nn.Sequential(
            SinusoidalTime(time_dim), nn.Linear(time_dim, width), nn.Mish(), nn.Linear(width, width)
        )
        self.condition = mlp(state_dim + prompt_dim, (width,), width, nn.Mish)
        self.transformer = transformer(config.layers, width, config.heads, config.inner, config.dropout)
        self.head = nn.Linear(width, step_dim)

    def context(self, state: Tensor, prompt: Tensor) -> Tensor:
        """State features [B, F] and prompt [Z] or [B, Z] → [B, W]."""
        context: Tensor = self.condition(torch.cat([state, prompt.expand(len(state), -1)], dim=-1))
        return context

    def denoise(
        self,
        trajectory: Tensor,
        context: Tensor,
        time_rows: Tensor,
        mask: Tensor | None = None,
        before: Before | None = None,
    ) -> Tensor:
        """epsilon from x_k [B, H, P], context [B, W] and time embeddings [W] or [B, W].

        mask [B, H] is True where a step is real; the others are not attended to, and their epsilon means nothing.
        """
        tokens = self.embed(trajectory) + self.position + (context + time_rows)[:, None]
        if before is not None:
            mask = torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask
            tokens, mask = torch.cat([before.tokens, tokens], 1), torch.cat([before.mask, mask], 1)
        padding = None if mask is None else ~mask
        with sharding.dropout():
            return self.head(self.transformer(tokens, src_key_padding_mask=padding)[:, -self.horizon :])

    def time_rows(self, timesteps: Tensor) -> Tensor:
        """Time indices int64 [K] → [K, W]."""
        rows: Tensor = self.time_mlp(timesteps)
        return rows

    def forward(
        self, trajectory: Tensor, timesteps: Tensor, state: Tensor, prompt: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """epsilon [B, H, P] from x_k [B, H, P], timestep indices int64 [B], state [B, F], prompt and mask [B, H]."""
        return self.denoise(trajectory, self.context(state, prompt), self.time_rows(timesteps), mask)


def with_present(trajectory: Tensor, present: Tensor) -> Tensor:
    """Trajectories [B, H, S + A] with the present state [B, S] in place of their first one (Diffuser's inpainting)."""
    first = torch.cat([present, trajectory[:, 0, present.shape[1] :]], dim=-1)
    return torch.cat([first[:, None], trajectory[:, 1:]], dim=1)


def reverse_trajectory(
    net: TrajectoryDenoiser,
    present: Tensor,
    state: Tensor,
    prompt: Tensor,
    coefficients: SamplerCoefficients,
    seeds: Tensor,
) -> Tensor:
    """Sample trajectories by walking the reverse chain, the present state in place at every step.

    Args:
        net: the denoiser.
        present: [B, S], the first state of each trajectory, within the sampler's bound.
        state: features [B, F]. prompt: [Z] or [B, Z].
        coefficients: of the sampler; its bound holds for states and actions alike.
        seeds: int64 [B]: each trajectory's noise depends on its own seed alone (`philox_normal`, a row a step).

    Returns:
        [B, H, S + A].
    """
    batch = len(state)
    time_rows = net.time_rows(coefficient_tensors(coefficients.content, state.device)[0])
    prompts, sampled = prompt.expand(batch, -1), [state.new_zeros(0, net.horizon, net.step_dim)]
    for rows, noise in noise_blocks(net, coefficients, seeds, state):
        context = net.context(state[rows], prompts[rows])

        def epsilon(x: Tensor, k: int, context: Tensor = context) -> Tensor:
            return net.denoise(x, context, time_rows[k])

        sampled.append(walk_chain(coefficients, noise, epsilon, partial(with_present, present=present[rows])))
    return torch.cat(sampled)[:batch]


def noise_blocks(
    net: TrajectoryDenoiser, coefficients: SamplerCoefficients, seeds: Tensor, like: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The noise of B trajectories in blocks that are sampled together: rows int64 [8] of the B, noise [K + 1, 8, H, P].

    The last block is filled up with its own last row. A sampler without noise at its steps gets the start alone.

    Args:
        seeds: int64 [B]. like: of the noise's device and dtype.
    """
    count = coefficients.steps + 1 if (coefficients.S > 0).any() else 1
    for start in range(0, len(seeds), _BLOCK):
        rows = torch.arange(start, start + _BLOCK, device=like.device).clamp_max(len(seeds) - 1)
        yield rows, philox_normal(seeds[rows], _BLOCK, net.horizon, count, net.step_dim, like.device).to(like.dtype)
