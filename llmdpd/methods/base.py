"""What agents share: an acting policy, its optimiser and EMA, an iteration in three parts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.optimisation import (
    OptimisationConfig,
    clip_gradient,
    ema_rate,
    lerp,
    rate_factor,
    rate_tensor,
    set_rate,
)
from llmdpd.nn.context import Condition, EncodedPrompts
from llmdpd.nn.policy_network import PromptedNetwork

Network = TypeVar("Network", bound=PromptedNetwork)
Config = TypeVar("Config", bound=OptimisationConfig)


class Agent(ABC, Generic[Network, Config]):
    """A policy that learns; one file a method says by which losses (`learn`).

    Args:
        policy: the networks.
        config: the method's options.
        iterations: length of the run, for the learning-rate schedule.
    """

    def __init__(self, policy: Network, config: Config, iterations: int) -> None:
        self.config, self.iterations, self.policy = config, iterations, policy
        self.ema_policy = self._copy(policy).eval().requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"policy": policy, "ema_policy": self.ema_policy}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._rates: dict[str, float] = {}
        self._optimise_policy()

    def _copy(self, policy: Network) -> Network:
        """The network that the EMA is kept in."""
        return copy.deepcopy(policy)

    def _optimise_policy(self) -> None:
        """Make the policy's optimiser."""
        self._optimise("policy", list(self.policy.parameters()), self.config.lr, self.config.weight_decay)

    def _optimise(self, name: str, parameters: list[nn.Parameter], rate: float, decay: float = 0.0) -> None:
        """Make the optimiser of these parameters, which follows the schedule of rates."""
        device = parameters[0].device
        self._rates[f"{name}_optimizer"] = rate
        self.optimizers[f"{name}_optimizer"] = torch.optim.AdamW(
            parameters, rate_tensor(rate, device), weight_decay=decay, fused=True, capturable=device.type == "cuda"
        )

    def _add(self, name: str, module: nn.Module, rate: float) -> None:
        """A further network that learns, `name`, with a target of its own, `target_NAME`."""
        self.modules[name] = module
        self._add_target(name, module)
        self._optimise(name, list(module.parameters()), rate)

    def _add_target(self, name: str, module: nn.Module) -> None:
        self.modules[f"target_{name}"] = copy.deepcopy(module).eval().requires_grad_(False)

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        """One iteration on one batch; iteration counts from 0. Returns metrics, scalar tensors on the device."""
        self.schedule(iteration)
        metrics = self.learn(batch)
        self.follow(iteration)
        return metrics

    def schedule(self, iteration: int) -> None:
        """The learning rates of the iteration."""
        factor = rate_factor(self.config, iteration, self.iterations)
        for name, optimizer in self.optimizers.items():
            set_rate(optimizer, self._rates[name] * factor)

    @abstractmethod
    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        """Every loss and gradient step: the work of the device."""

    def follow(self, iteration: int) -> None:
        """The EMA's step after the iteration, at its marks."""
        rate = ema_rate(self.config, iteration)
        if rate is not None:
            target, source = self.modules["ema_policy"], self.modules["policy"]
            lerp(list(target.parameters()), list(source.parameters()), rate)

    def encode(self, batch: PromptedBatch, network: Network | None = None) -> EncodedPrompts:
        """One pass of the encoders of `network` (by default the policy) over the batch's prompts.

        In training every pass has its own dropout mask, so that one pass serves all losses of a gradient step.
        """
        return (network or self.policy).encode(batch.text, batch.tokens, batch.keep)

    def condition(
        self,
        batch: PromptedBatch,
        prompts: EncodedPrompts,
        following: bool = False,
        network: Network | None = None,
    ) -> Condition:
        """The batch's states, or the next ones, under prompts that `network` (by default the policy) has encoded."""
        states = batch.next_observations if following else batch.observations
        return (network or self.policy).condition(states, prompts, None, batch.timesteps + following)

    def step(self, name: str | Sequence[str], loss: Tensor) -> Tensor:
        """One step of an optimiser, or of several, down a loss; the norm of their gradient before it is cut."""
        names = (name,) if isinstance(name, str) else name
        optimizers = [self.optimizers[f"{name}_optimizer"] for name in names]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        norm = clip_gradient(parameters, self.config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        return norm

    def track(self, name: str, rate: float) -> None:
        """target ← target + rate (network - target), of the network `name`."""
        target, source = self.modules[f"target_{name}"], self.modules[name]
        lerp(list(target.parameters()), list(source.parameters()), rate)


def detached(condition: Condition) -> Condition:
    """The condition without its gradient: critics do not train the policy's encoders."""
    return Condition(condition.state.detach(), condition.prompt.detach())
