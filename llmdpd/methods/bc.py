"""Behavioural cloning by a Gaussian policy: the least that any other method has to do better than."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from llmdpd.methods.base import Clone, Method, OfflineConfig, Start
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.acting import NoisyActing
from llmdpd.nn.actor import ActorNetworkConfig, GaussianPolicy
from llmdpd.nn.context import Condition
from llmdpd.nn.policy_network import Spaces
from llmdpd.utils.bounds import Count, Fraction


@dataclass(frozen=True)
class BCConfig(OfflineConfig):
    """Cloning by maximum likelihood. The policy acts as it is: no average of it."""

    name = "bc"
    legacy: ClassVar[Mapping[str, str]] = {"bc": "method."}

    network: ActorNetworkConfig = field(default_factory=ActorNetworkConfig)
    acting: NoisyActing = field(default_factory=NoisyActing)
    ema_decay: Fraction = 0.0
    """Decay of the EMA of the policy, which acts; 0: the policy itself."""
    ema_every: Count = 1
    """Iterations from one EMA update to the next."""
    clone: Clone = "executed"
    """The executed actions, or the expert's clean ones in the visited states."""

    @classmethod
    def from_preset(cls, start: Start) -> BCConfig:
        return cls(network=ActorNetworkConfig.from_preset(start), clone=start.diffusion.clone, **start.batches)

    @property
    def cloned(self) -> Clone:
        return self.clone


class BC(Method[GaussianPolicy, BCConfig]):
    """Maximum likelihood of the data's actions."""

    Config = BCConfig

    @classmethod
    def build_network(cls, spaces: Spaces, config: ActorNetworkConfig) -> GaussianPolicy:
        return GaussianPolicy(spaces, config)

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
