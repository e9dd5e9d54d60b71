"""Trajectory diffusion under prompts: the paper's ablation «w/o-DP» (table 3), policy diffusion put out of action.

What is denoised is a trajectory of H steps, states and actions, in place of one action; prompts and their encoders are
the same. It clones: there is no Q-learning in it, and no guidance by return.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.methods.base import CloningConfig, Method, Start
from llmdpd.methods.batch import PromptedBatch, StepWindows, cloned_actions
from llmdpd.methods.trajectory_diffusion.network import TrajectoryNetworkConfig, TrajectoryPolicy
from llmdpd.nn.acting import ChainActing
from llmdpd.nn.context import Condition
from llmdpd.nn.trajectory_denoiser import with_present
from llmdpd.utils.bounds import NonNegative


@dataclass(frozen=True)
class TrajectoryDiffusionConfig(CloningConfig):
    """Learning by trajectory diffusion. Defaults are MTDiff's; of its EMA, Diffusion-QL's."""

    name = "trajectory-diffusion"
    legacy: ClassVar[Mapping[str, str]] = {"planner": "method."}

    network: TrajectoryNetworkConfig = field(default_factory=TrajectoryNetworkConfig)
    acting: ChainActing = field(default_factory=ChainActing)
    lr: NonNegative = 2e-4
    """Learning rate of denoiser and encoders."""
    first_action_weight: NonNegative = 10.0
    """Weight in the loss of a trajectory's first action, the one that is executed; all else has 1."""

    @classmethod
    def from_preset(cls, start: Start) -> TrajectoryDiffusionConfig:
        own: TrajectoryDiffusionConfig = start.trajectory_diffusion
        return own

    def check(self) -> None:
        super().check()
        for name in ("rotate", "mirror"):
            if getattr(self.augmentation, name):
                raise InputError(
                    "trajectories are scaled to the range of the data, which this augmentation leaves",
                    field=f"augmentation.{name}",
                    found=getattr(self.augmentation, name),
                    expected="0 with trajectory diffusion",
                )


class TrajectoryDiffusion(Method[TrajectoryPolicy, TrajectoryDiffusionConfig]):
    """Denoising of trajectories."""

    Config = TrajectoryDiffusionConfig
    network_class = TrajectoryPolicy

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        assert batch.windows is not None, "the sampler was made with the trajectory's horizon"
        if not self.policy.training:
            self.policy.train()
        loss, first_action = self.diffusion_loss(batch.windows, self.condition(batch, self.encode(batch)))
        norm = self.step("policy", loss)
        return {"loss/diffusion": loss.detach(), "loss/first_action": first_action.detach(), "grad/policy": norm}

    def diffusion_loss(self, windows: StepWindows, condition: Condition) -> tuple[Tensor, Tensor]:
        """Mean squared error between sampled and predicted noise of trajectories, k uniform in 1 … K.

        It is the noise that is predicted, and not the trajectory: the sampler's tables take the noise, and so does the
        paper's equation 5, from which this then differs by what is denoised alone. The present state is put into the
        noisy trajectory as it is when acting, and counts nothing; neither do steps after the episode's end.

        Returns:
            The weighted mean over the numbers of all trajectories, and the plain mean over the first actions'.
        """
        policy = self.policy
        clean, weight = self._trajectories(windows)
        timesteps = torch.randint(len(policy.alpha_bar), (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        level = policy.alpha_bar[timesteps, None, None]
        noisy = with_present(level.sqrt() * clean + (1 - level).sqrt() * noise, clean[:, 0, : policy.state_dim])
        predicted = policy.net(noisy, timesteps, condition.state, condition.prompt, windows.mask)
        error = (predicted - noise).square()
        return (weight * error).sum() / weight.sum(), error[:, 0, policy.state_dim :].mean()

    def _trajectories(self, windows: StepWindows) -> tuple[Tensor, Tensor]:
        """The trajectories that are learned [B, H, S + A], and the weights of their numbers."""
        actions = cloned_actions(windows, self.config.clone)
        real = windows.mask[..., None]
        clean = torch.where(real, torch.cat([self.policy.scaled(windows.states), actions], dim=-1), 0.0)
        weight = real.to(clean.dtype).expand_as(clean).clone()
        weight[:, 0, : self.policy.state_dim] = 0.0
        weight[:, 0, self.policy.state_dim :] *= self.config.first_action_weight
        return clean, weight
