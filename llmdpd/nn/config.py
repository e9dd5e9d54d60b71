"""What a policy's networks are built with, as parts that methods put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from llmdpd.diffusion import SamplerCoefficients, alphas, sampler_coefficients
from llmdpd.diffusion.schedules import ScheduleName
from llmdpd.errors import InputError
from llmdpd.nn.context import ContextConfig
from llmdpd.utils.bounds import Bounds


@dataclass(frozen=True)
class NetworkConfig:
    """What the networks of a method's policy are built with, beside `Spaces`."""

    action_bound: Annotated[float, Bounds(1e-6)] = 1.0
    """Actions lie in ±this."""

    reads_several: ClassVar[bool] = True
    """Whether several demonstrations can be one prompt, where demonstrations are read."""

    def context_config(self) -> ContextConfig:
        """Which prompts the policy reads, and how; by default none."""
        return ContextConfig(text=False, trajectory=False)


@dataclass(frozen=True)
class ContextNetworkConfig(NetworkConfig):
    """Networks that read both kinds of prompts by a context of their own."""

    context: ContextConfig = field(default_factory=ContextConfig)
    """How prompts and state become the condition."""

    def context_config(self) -> ContextConfig:
        return self.context


@dataclass(frozen=True)
class ChainConfig(NetworkConfig):
    """A diffusion chain. Defaults are Diffusion-QL's."""

    time_dim: Annotated[int, Bounds(2, 16_384)] = 16
    """Size of the timestep embedding."""
    diffusion_steps: Annotated[int, Bounds(1, 10_000)] = 5
    """K, steps of the diffusion chain."""
    schedule: ScheduleName = "vp"
    """Variance schedule of the forward process."""

    def check(self) -> None:
        """Raise `InputError` for an odd timestep embedding."""
        if self.time_dim % 2:
            raise InputError(
                "the timestep embedding is made of sine and cosine pairs",
                field="time_dim",
                found=self.time_dim,
                expected="an even number",
            )

    def alpha_bar(self) -> Tensor:
        """Products of alpha_1 … alpha_k for k = 1 … K, float32 [K]."""
        return torch.from_numpy(np.cumprod(alphas(self.schedule, self.diffusion_steps))).float()

    def training_sampler(self) -> SamplerCoefficients:
        """The sampler of training: DDPM over the K steps of the chain."""
        return sampler_coefficients("ddpm", self.diffusion_steps, self.schedule, self.action_bound)
