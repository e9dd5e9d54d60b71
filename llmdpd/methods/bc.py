"""Behavioural cloning by a Gaussian policy: the least that any other method has to do better than."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from llmdpd.methods.actor_critic import ActorConfig
from llmdpd.methods.base import CloningConfig, Method, Start
from llmdpd.methods.batch import PromptedBatch, cloned_actions
from llmdpd.nn.acting import NoisyActing
from llmdpd.nn.actor import GaussianPolicy
from llmdpd.nn.context import Condition


@dataclass(frozen=True)
class BCConfig(ActorConfig, CloningConfig):
    """Cloning by maximum likelihood. The policy acts as it is: no average of it."""

    name = "bc"
    legacy: ClassVar[Mapping[str, str]] = {"bc": "method."}

    acting: NoisyActing = field(default_factory=NoisyActing)

    @classmethod
    def from_preset(cls, start: Start) -> BCConfig:
        return replace(super().from_preset(start), clone=start.diffusion.clone)


class BC(Method[GaussianPolicy, BCConfig]):
    """Maximum likelihood of the data's actions."""

    Config = BCConfig
    network_class = GaussianPolicy

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """One gradient step."""
        self.policy.train()
        loss = self.loss(batch, self.condition(batch, self.encode(batch)))
        norm = self.step("policy", loss)
        return {"loss/cloning": loss.detach(), "grad/policy": norm}

    def loss(self, batch: PromptedBatch, condition: Condition) -> Tensor:
        """- mean log pi(a | s, z), over the batch; summed over the action's numbers."""
        return -self.policy.log_probability(condition, cloned_actions(batch, self.config.clone)).mean()
