"""What methods share that learn CQL on the data and on transitions of a model which they learn beside."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.cql import CQL, CQLConfig
from llmdpd.nn.actor import SquashedGaussianPolicy
from llmdpd.nn.context import EncodedPrompts
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Fraction, NonNegative

Config = TypeVar("Config", bound="SimulatedConfig")


@dataclass(frozen=True)
class SimulatedConfig(CQLConfig):
    """CQL on data and simulation."""

    legacy: ClassVar[Mapping[str, str]] = {}

    model_lr: NonNegative = 1e-3
    """Learning rate of the model."""
    model_share: Fraction = 0.2
    """Share of the run in which the model learns before it simulates; it goes on learning then."""
    real_share: Annotated[float, Bounds(0.01, 1)] = 0.5
    """Share of a batch that is of the data."""


class Simulated(NamedTuple):
    """N transitions of a model: observations and next ones [N, S], actions [N, A], rewards and terminals [N].

    steps int64 [N]: how long after the batch's transition each one is.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminals: Tensor
    steps: Tensor


class SimulatedCQL(CQL[Config]):
    """CQL whose batches are partly simulated, by a model that a method makes, teaches and asks."""

    same_work = False  # the model simulates from a part of the run on

    def __init__(self, network: SquashedGaussianPolicy, config: Config, iterations: int) -> None:
        super().__init__(network, config, iterations)
        self.model = self.modules["model"] = self.make_model().to(network.device)
        self._optimise("model", list(self.model.parameters()), config.model_lr)
        self._simulates = False

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The model."""

    @abstractmethod
    def model_loss(self, batch: PromptedBatch, prompts: EncodedPrompts) -> Tensor:
        """What the model learns by, of a batch and its prompts, encoded without gradient."""

    @abstractmethod
    def simulate(self, batch: PromptedBatch, prompts: EncodedPrompts, places: Tensor) -> Simulated:
        """A transition in place of each of these of the batch, int64 [N], under the same prompt."""

    def schedule(self, iteration: int) -> None:
        """The learning rates, and whether the model simulates already."""
        super().schedule(iteration)
        self._simulates = iteration >= self.config.model_share * self.iterations

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """A step of the model, then those of CQL."""
        with torch.no_grad():
            prompts = self.encode(batch)
        loss = self.model_loss(batch, prompts)
        norm = self.step("model", loss)
        metrics = {"loss/model": loss.detach(), "grad/model": norm}
        return metrics | super().learn(self.mixed(batch, prompts) if self._simulates else batch)

    def mixed(self, batch: PromptedBatch, prompts: EncodedPrompts) -> PromptedBatch:
        """The batch with simulated transitions in the places of some of its own."""
        marked = self.marked(sharding.whole_batch(len(batch.rewards)), batch.rewards.device)
        if not marked.any():
            return batch
        with sharding.among(marked) as places:
            named = self.simulate(batch, prompts, places)._asdict()
        steps = batch.timesteps.index_add(0, places, named.pop("steps"))
        changed = {name: getattr(batch, name).index_copy(0, places, value) for name, value in named.items()}
        return replace(batch, **changed, timesteps=steps)

    def places(self, count: int, device: torch.device) -> Tensor:
        """Which of the `count` transitions that are here are simulated [N]."""
        whole = self.marked(sharding.whole_batch(count), device)
        return whole[sharding.own_rows(count, device)].nonzero()[:, 0]

    def marked(self, count: int, device: torch.device) -> Tensor:
        """Where a batch's `count` transitions are simulated, bool [count]: evenly spread over all prompts."""
        # In float64, where whole shares come out whole.
        marks = (torch.arange(count + 1, dtype=torch.float64, device=device) * (1 - self.config.real_share)).floor()
        return marks[1:] > marks[:-1]
