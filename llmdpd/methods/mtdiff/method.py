"""MTDiff-p (He et al. 2023): diffusion of the actions to come, given an example, the last states and the return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.methods.base import Method, OfflineConfig, Start
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.mtdiff.network import MTDiffNetworkConfig, MTDiffPolicy, MTDiffTrajectoryConfig
from llmdpd.nn.acting import ChainActing
from llmdpd.utils.bounds import Count, Fraction, NonNegative, WholeNumber


@dataclass(frozen=True)
class MTDiffConfig(OfflineConfig):
    """Learning of MTDiff-p: its published settings. Five steps of DDIM walk its chain."""

    name = "mtdiff"
    legacy: ClassVar[Mapping[str, str]] = {"mtdiff": "method."}

    network: MTDiffNetworkConfig = field(default_factory=MTDiffNetworkConfig)
    acting: ChainActing = field(default_factory=lambda: ChainActing(sampler="ddim", steps=5))
    lr: NonNegative = 2e-4
    """Learning rate."""
    ema_every: Count = 10
    """Iterations from one EMA update to the next."""
    ema_start: WholeNumber = 2000
    """Iteration from which the EMA averages; before it copies."""
    first_action_weight: NonNegative = 10.0
    """Weight in the loss of the first of the actions to come, the one that is executed; the others have 1."""
    return_probability: Fraction = 0.8
    """Probability in training that the return is given; without it the network learns what guidance goes away from."""

    @classmethod
    def from_preset(cls, start: Start) -> MTDiffConfig:
        preset, sizes = start.diffusion, start.trajectory_diffusion.network.plan
        network = MTDiffNetworkConfig(
            action_bound=preset.network.action_bound,
            time_dim=preset.network.time_dim,
            schedule=preset.network.schedule,
            features=preset.network.context.features,
            plan=MTDiffTrajectoryConfig(**{field.name: getattr(sizes, field.name) for field in fields(sizes)}),
        )
        # Published: 16 windows a prompt.
        prompts = preset.prompts_per_batch
        return cls(network=network, batch_size=16 * prompts, prompts_per_batch=prompts)


class MTDiff(Method[MTDiffPolicy, MTDiffConfig]):
    """Denoising of the executed actions to come."""

    Config = MTDiffConfig
    network_class = MTDiffPolicy

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        if not self.policy.training:
            self.policy.train()
        loss, first_action = self.loss(batch)
        norm = self.step("policy", loss)
        return {"loss/diffusion": loss.detach(), "loss/first_action": first_action.detach(), "grad/policy": norm}

    def loss(self, batch: PromptedBatch) -> tuple[Tensor, Tensor]:
        """Huber loss (delta 1) of the noise in the actions to come, k uniform in 1 … K.

        Steps after the episode's end count nothing.

        Returns:
            The weighted mean over the numbers of all sequences, and the plain mean over the first actions'.
        """
        windows, policy = batch.windows, self.policy
        assert windows is not None, "the sampler was made with the sequence's horizon"
        shown = policy.memory_length
        clean, mask = windows.actions[:, shown - 1 :], windows.mask[:, shown - 1 :]
        prompts = policy.encode(batch.text, batch.tokens, batch.keep)
        before = policy.before(windows.states[:, :shown], windows.mask[:, :shown], prompts, None)
        given = (torch.rand(len(clean), device=clean.device) < self.config.return_probability).to(clean.dtype)
        condition = policy.return_condition(windows.returns[:, shown - 1], given)
        timesteps = torch.randint(len(policy.alpha_bar), (len(clean),), device=clean.device)
        noise, level = torch.randn_like(clean), policy.alpha_bar[timesteps, None, None]
        noisy = level.sqrt() * torch.where(mask[..., None], clean, 0.0) + (1 - level).sqrt() * noise
        predicted = policy.net.denoise(noisy, condition, policy.net.time_rows(timesteps), mask, before)
        error = F.huber_loss(predicted, noise, reduction="none", delta=1.0)
        weight = mask[..., None].to(clean.dtype).expand_as(clean).clone()
        weight[:, 0] *= self.config.first_action_weight
        return (weight * error).sum() / weight.sum(), error[:, 0].mean()
