"""Trajectory diffusion under prompts: the paper's ablation «w/o-DP» (table 3), policy diffusion put out of action.

What is denoised is a trajectory of H steps, states and actions, in place of one action; prompts and their encoders are
the same. It clones: there is no Q-learning in it, and no guidance by return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmdpd.data.augmentation import AugmentationConfig
from llmdpd.errors import InputError
from llmdpd.methods.base import CloningConfig, Method, Start
from llmdpd.methods.batch import PromptedBatch, StepWindows, cloned_actions
from llmdpd.nn.acting import ChainActing
from llmdpd.nn.config import ChainConfig, ContextNetworkConfig
from llmdpd.nn.context import Condition
from llmdpd.nn.policy_network import ConditionedNetwork, Window
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.statistics import Observations, extent
from llmdpd.nn.trajectory_denoiser import TrajectoryConfig, TrajectoryDenoiser, reverse_trajectory, with_present
from llmdpd.utils import sharding
from llmdpd.utils.bounds import NonNegative
from llmdpd.utils.sharding import randint, randn


@dataclass(frozen=True)
class TrajectoryNetworkConfig(ContextNetworkConfig, ChainConfig):
    """The denoiser of trajectories and its diffusion chain."""

    former: ClassVar[Mapping[str, str]] = {"plan": "trajectory"}

    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    """What is denoised in place of an action, and the transformer that does it."""


class TrajectoryPolicy(ConditionedNetwork):
    """p(s_t, a_t … s_{t+H-1}, a_{t+H-1} | s_t, z_text, z_traj): encoders and a denoiser of trajectories.

    The states of a trajectory are scaled to ± the action bound by the least and the greatest that the training tasks
    have, so that the sampler's clip fits states and actions alike.
    """

    config: TrajectoryNetworkConfig
    alpha_bar: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, spaces: Spaces, config: TrajectoryNetworkConfig) -> None:
        super().__init__(spaces, config)
        self.window = Window(config.trajectory.horizon)
        self.register_buffer("alpha_bar", config.alpha_bar(), persistent=False)
        self.net = TrajectoryDenoiser(
            spaces.state_dim + spaces.action_dim,
            self.context.state_dim,
            self.context.prompt_dim,
            config.time_dim,
            config.trajectory,
        )
        self.register_buffer("low", -torch.ones(spaces.state_dim))
        self.register_buffer("high", torch.ones(spaces.state_dim))

    def fit(self, observations: Observations, returns: Callable[[], Tensor]) -> None:
        super().fit(observations, returns)
        low, high = extent(observations)
        self.low.copy_(low)
        self.high.copy_(high)

    def fit_beyond(self, observations: Observations, returns: Callable[[], Tensor]) -> list[str]:
        """Also the range of a trajectory's states: what lies beyond it would be cut to it."""
        low, high = (side.to(self.low) for side in extent(observations))
        wider = ((low < self.low) | (high > self.high)).nonzero()[:, 0].tolist()
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        return [*super().fit_beyond(observations, returns), *(f"range of observation[{index}]" for index in wider)]

    def scaled(self, states: Tensor) -> Tensor:
        """States [..., S] scaled to ± the action bound, 0 where the training tasks have one value alone."""
        span = self.high - self.low
        unit = torch.where(span > 0, (states - self.low) / span.clamp_min(1e-12) * 2 - 1, 0.0)
        return self.config.action_bound * unit.clamp(-1.0, 1.0)

    def sample_conditioned(
        self, observations: Tensor, condition: Condition, acting: ChainActing, seeds: Tensor, critic: Any
    ) -> Tensor:
        """The first action of a trajectory for each state, [B, 1, A]: it is sampled anew at every step."""
        return self.trajectories(observations, condition, acting, seeds)[:, :1, self.state_dim :]

    def trajectories(self, observations: Tensor, condition: Condition, acting: ChainActing, seeds: Tensor) -> Tensor:
        """Trajectories [B, H, S + A] from observations [B, S] on, in their condition; seeds int64 [B]."""
        present = self.scaled(observations)
        return reverse_trajectory(self.net, present, *condition, acting.coefficients(self.config), seeds)


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
        """Trajectory diffusion in place of policy diffusion, under the same prompts: table 3's «w/o-DP».

        Its chain has a length of its own, walked in fewer steps when acting; it has no critics, and learns from scenes
        whose positions are jittered and nothing else, since its trajectories are scaled to the range of the data.
        """
        preset, small = start.whole, start.small
        names = ("lr", "lr_warmup", "lr_final", "weight_decay", "grad_clip", "ema_decay", "ema_every", "clone")
        learning = {name: getattr(preset, name) for name in names} if small else {}
        network = TrajectoryNetworkConfig(
            action_bound=preset.network.action_bound,
            time_dim=preset.network.time_dim,
            diffusion_steps=20 if small else 200,  # 200 is MTDiff's
            schedule=preset.network.schedule,
            context=preset.network.context,
            trajectory=TrajectoryConfig.sized(small),
        )
        return cls(
            network=network,
            acting=ChainActing(noise_scale=preset.acting.noise_scale, sampler="ddim", steps=5 if small else 20),
            batch_size=preset.batch_size,
            prompts_per_batch=preset.prompts_per_batch,
            augmentation=AugmentationConfig(offset=preset.augmentation.offset),
            self_prompted=preset.self_prompted,
            **learning,
        )

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
        timesteps = randint(len(policy.alpha_bar), (len(clean),), clean.device)
        noise = randn(clean.shape, clean.device)
        level = policy.alpha_bar[timesteps, None, None]
        noisy = with_present(level.sqrt() * clean + (1 - level).sqrt() * noise, clean[:, 0, : policy.state_dim])
        predicted = policy.net(noisy, timesteps, condition.state, condition.prompt, windows.mask)
        error = (predicted - noise).square()
        return (weight * error).sum() / sharding.mean(weight.sum()), error[:, 0, policy.state_dim :].mean()

    def _trajectories(self, windows: StepWindows) -> tuple[Tensor, Tensor]:
        """The trajectories that are learned [B, H, S + A], and the weights of their numbers."""
        actions = cloned_actions(windows, self.config.clone)
        real = windows.mask[..., None]
        clean = torch.where(real, torch.cat([self.policy.scaled(windows.states), actions], dim=-1), 0.0)
        weight = real.to(clean.dtype).expand_as(clean).clone()
        weight[:, 0, : self.policy.state_dim] = 0.0
        weight[:, 0, self.policy.state_dim :] *= self.config.first_action_weight
        return clean, weight
