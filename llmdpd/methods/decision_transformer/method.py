"""Decision Transformer and Prompt-DT: cloning of what was done, given the return that came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from llmdpd.methods.base import Method, Start, UnaveragedConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.decision_transformer.network import (
    DecisionTransformer,
    DecisionTransformerConfig,
    PromptDecisionTransformer,
    PromptDecisionTransformerConfig,
)
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.policy_network import PolicyNetwork
from llmdpd.utils.bounds import Count, NonNegative, WholeNumber


@dataclass(frozen=True)
class DTConfig(UnaveragedConfig):
    """Learning of Decision Transformers: its published settings for Gym, with a shorter warm-up."""

    name = "dt"
    legacy: ClassVar[Mapping[str, str]] = {"dt": "method."}

    network: DecisionTransformerConfig = field(default_factory=DecisionTransformerConfig)
    acting: ActingConfig = field(default_factory=ActingConfig)
    batch_size: Count = 64
    """Windows an iteration."""
    prompts_per_batch: Count = 8
    """Tasks in a batch, each with its own share of the windows."""
    lr: NonNegative = 1e-4
    """Learning rate."""
    lr_warmup: WholeNumber = 500
    """Iterations of linear warm-up."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay (AdamW)."""
    grad_clip: NonNegative = 0.25
    """Bound on the norm of the gradient."""

    @classmethod
    def from_preset(cls, start: Start) -> DTConfig:
        own, network = cls(), start.diffusion.network
        network = replace(own.network, action_bound=network.action_bound, features=network.context.features)
        return replace(own, network=network)


@dataclass(frozen=True)
class PromptDTConfig(DTConfig):
    """Prompt-DT: the same with a demonstration's last five steps before the episode's."""

    name = "prompt-dt"

    network: PromptDecisionTransformerConfig = field(default_factory=PromptDecisionTransformerConfig)


class DT(Method[DecisionTransformer, DTConfig]):
    """Regression of the executed actions on returns-to-go, states and the actions before."""

    Config: ClassVar[type[DTConfig]] = DTConfig
    network_class: ClassVar[type[PolicyNetwork]] = DecisionTransformer

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        self.policy.train()
        loss = cloning_loss(self.policy, batch)
        norm = self.step("policy", loss)
        return {"loss/cloning": loss.detach(), "grad/policy": norm}


class PromptDT(DT):
    """The same, read after a demonstration."""

    Config = PromptDTConfig
    network_class = PromptDecisionTransformer


def cloning_loss(policy: DecisionTransformer, batch: PromptedBatch) -> Tensor:
    """Mean squared error of the actions of all steps of the windows, those past an episode's end left out."""
    windows = batch.windows
    assert windows is not None, "the sampler was made with the model's context"
    steps = torch.arange(windows.mask.shape[1], device=windows.mask.device)
    timesteps = batch.timesteps[:, None] + steps
    prompts = policy.encode(batch.text, batch.tokens, batch.keep) if policy.prompted else None
    found = policy(windows.returns, windows.states, windows.actions, timesteps, prompts)
    error = (found - windows.actions).square().mean(-1)
    return (error * windows.mask).sum() / windows.mask.sum()
