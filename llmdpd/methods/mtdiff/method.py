"""MTDiff-p (He et al. 2023): diffusion of the actions to come, given an example, the last states and the return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.methods.base import Agent
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.mtdiff.network import MTDiffPolicy
from llmdpd.methods.optimisation import OptimisationConfig


@dataclass(frozen=True)
class MTDiffConfig(OptimisationConfig):
    """Learning of MTDiff-p: its published settings."""

    lr: float = 2e-4
    """Learning rate."""
    ema_every: int = 10
    """Iterations from one EMA update to the next."""
    ema_start: int = 2000
    """Iteration from which the EMA averages; before it copies."""
    first_action_weight: float = 10.0
    """Weight in the loss of a plan's first action, the one that is executed; the others have 1."""
    return_probability: float = 0.8
    """Probability in training that a plan is told its return; without it learns what guidance goes away from."""


class MTDiff(Agent[MTDiffPolicy, MTDiffConfig]):
    """Denoising of the executed actions to come."""

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
            The weighted mean over the numbers of all plans, and the plain mean over the first actions'.
        """
        windows, policy = batch.windows, self.policy
        assert windows is not None, "the sampler was made with the plan's horizon"
        shown = policy.history
        clean, mask = windows.actions[:, shown - 1 :], windows.mask[:, shown - 1 :]
        prompts = policy.encode(batch.text, batch.tokens, batch.keep)
        before = policy.before(windows.states[:, :shown], windows.mask[:, :shown], prompts, None)
        given = (torch.rand(len(clean), device=clean.device) < self.config.return_probability).to(clean.dtype)
        condition = policy.asked(windows.returns[:, shown - 1], given)
        timesteps = torch.randint(len(policy.alpha_bar), (len(clean),), device=clean.device)
        noise, level = torch.randn_like(clean), policy.alpha_bar[timesteps, None, None]
        noisy = level.sqrt() * torch.where(mask[..., None], clean, 0.0) + (1 - level).sqrt() * noise
        predicted = policy.net.denoise(noisy, condition, policy.net.time_rows(timesteps), mask, before)
        error = F.huber_loss(predicted, noise, reduction="none", delta=1.0)
        weight = mask[..., None].to(clean.dtype).expand_as(clean).clone()
        weight[:, 0] *= self.config.first_action_weight
        return (weight * error).sum() / weight.sum(), error[:, 0].mean()
