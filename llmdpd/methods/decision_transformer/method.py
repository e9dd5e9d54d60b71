"""Decision Transformer and Prompt-DT: cloning of what was done, given the return that came of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmdpd.methods.base import Agent
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.decision_transformer.network import DecisionTransformer
from llmdpd.methods.optimisation import OptimisationConfig


@dataclass(frozen=True)
class DecisionTransformerConfig(OptimisationConfig):
    """Learning of Decision Transformers: its published settings for Gym, with a shorter warm-up."""

    lr: float = 1e-4
    """Learning rate."""
    lr_warmup: int = 500
    """Iterations of linear warm-up."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (AdamW)."""
    grad_clip: float = 0.25
    """Bound on the norm of the gradient."""
    ema_decay: float = 0.0
    """Decay of the EMA of the policy, which acts; 0: the policy itself."""
    ema_every: int = 1
    """Iterations from one EMA update to the next."""


class SequenceCloning(Agent[DecisionTransformer, DecisionTransformerConfig]):
    """Regression of the executed actions on returns-to-go, states and the actions before."""

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        self.policy.train()
        loss = self.loss(batch)
        norm = self.step("policy", loss)
        return {"loss/cloning": loss.detach(), "grad/policy": norm}

    def loss(self, batch: PromptedBatch) -> Tensor:
        """See `cloning_loss`."""
        return cloning_loss(self.policy, batch)


def cloning_loss(policy: DecisionTransformer, batch: PromptedBatch) -> Tensor:
    """Mean squared error of the actions of all steps of the windows, those past an episode's end left out."""
    windows = batch.windows
    assert windows is not None, "the sampler was made with the model's context"
    steps = torch.arange(windows.mask.shape[1], device=windows.mask.device)
    clock = batch.timesteps[:, None] + steps
    prompts = policy.encode(batch.text, batch.tokens, batch.keep) if policy.prompted else None
    found = policy(windows.returns, windows.states, windows.actions, clock, prompts)
    error = (found - windows.actions).square().mean(-1)
    return (error * windows.mask).sum() / windows.mask.sum()
