"""Behavioural cloning by a Gaussian policy: the least that any other method has to do better than."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llmdpd.methods.base import Agent
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.optimisation import OptimisationConfig
from llmdpd.nn.actor import GaussianPolicy
from llmdpd.nn.context import Condition


@dataclass(frozen=True)
class CloningConfig(OptimisationConfig):
    """Cloning by maximum likelihood. The policy acts as it is: no average of it."""

    ema_decay: float = 0.0
    """Decay of the EMA of the policy, which acts; 0: the policy itself."""
    ema_every: int = 1
    """Iterations from one EMA update to the next."""
    clone: Literal["executed", "expert"] = "executed"
    """The executed actions, or the expert's clean ones in the visited states."""


class Cloning(Agent[GaussianPolicy, CloningConfig]):
    """Maximum likelihood of the data's actions."""

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        self.policy.train()
        loss = self.loss(batch, self.condition(batch, self.encode(batch)))
        norm = self.step("policy", loss)
        return {"loss/cloning": loss.detach(), "grad/policy": norm}

    def loss(self, batch: PromptedBatch, condition: Condition) -> Tensor:
        """- mean log pi(a | s, z), over the batch; summed over the action's numbers."""
        actions = batch.expert_actions if self.config.clone == "expert" else batch.actions
        assert actions is not None, "checked when the training data is prepared"
        return -self.policy.log_probability(condition, actions).mean()
