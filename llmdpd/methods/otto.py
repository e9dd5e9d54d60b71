"""OTTO on CQL (Zhao et al. 2024, arXiv 2404.10393): long simulations of good trajectories whose actions are perturbed.

Two World Transformers learn from the steps before what follows an action: one the next state, one the reward. Windows
of the data with high returns are then simulated under perturbed actions, and CQL learns from data and simulation
alike.

Sources: the abstracts of the paper's two versions. They name World Transformers for states and rewards, that actions of
the offline data are perturbed by one of four strategies (three in the second version) towards high returns, that
simulations are long, and that data and simulation are learned from jointly by any offline method. The strategies
themselves are not to be had, nor is code: the authors' repository (github.com/ZiqiZhao1/OTTO) holds an empty README. So
these are this project's: the one strategy (Gaussian noise on the actions of the windows with the highest returns), and
all sizes. What came later, an ensemble that judges and corrects, is not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from llmdpd.methods.base import Start
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.simulated import Simulated, SimulatedConfig, SimulatedCQL
from llmdpd.nn.actor import ActorNetworkConfig, SquashedGaussianPolicy
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.policy_network import Window
from llmdpd.nn.spaces import Spaces
from llmdpd.nn.world_transformer import WorldTransformerConfig, WorldTransformers
from llmdpd.utils.bounds import Bounds, NonNegative

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class OTTONetworkConfig(ActorNetworkConfig):
    """CQL's actor, and the windows that World Transformers read."""

    world: WorldTransformerConfig = field(default_factory=WorldTransformerConfig)
    """The World Transformers."""

    @classmethod
    def from_preset(cls, start: Start) -> OTTONetworkConfig:
        own = ActorNetworkConfig.from_preset(start)
        return cls(own.action_bound, own.context, own.hidden_dim)


class OTTOPolicy(SquashedGaussianPolicy):
    """CQL's actor; its batches carry windows."""

    def __init__(self, spaces: Spaces, config: OTTONetworkConfig) -> None:
        super().__init__(spaces, config)
        self.window = Window(config.world.horizon)


@dataclass(frozen=True)
class OTTOConfig(SimulatedConfig):
    """CQL+OTTO."""

    name = "otto"

    network: OTTONetworkConfig = field(default_factory=OTTONetworkConfig)
    best: Annotated[float, Bounds(0.001, 1)] = 0.1
    """Share of a prompt's windows that are simulated, those with the highest returns from there on."""
    action_noise: NonNegative = 0.1
    """Standard deviation of the perturbation of actions, of the action bound."""

    @classmethod
    def from_preset(cls, start: Start) -> Self:
        return cls(network=OTTONetworkConfig.from_preset(start), **start.batches)


class OTTO(SimulatedCQL[OTTOConfig]):
    """CQL's actor, critics and temperature, and the World Transformers."""

    Config = OTTOConfig
    network_class = OTTOPolicy
    unshared = "it simulates from the best windows of the whole batch"

    model: WorldTransformers

    def make_model(self) -> WorldTransformers:
        policy = self.policy
        inputs = policy.context.state_dim + policy.context.prompt_dim
        return WorldTransformers(inputs, policy.state_dim, policy.action_dim, self.config.network.world)

    def model_loss(self, batch: PromptedBatch, prompts: EncodedPrompts) -> Tensor:
        """Mean squared errors of the changes of state, in the data's deviations, and of the rewards in the windows."""
        windows = self._windows(batch)
        self.model.train()
        with torch.no_grad():
            rows = torch.arange(len(windows.mask), device=windows.mask.device)
            known = self.known(batch, prompts, windows.states[:, :-1], rows)
            change = windows.states.diff(dim=1) / self.policy.context.features.std
            rewards = -windows.returns.diff(dim=1)
        changes, earned = self.model(known, windows.actions[:, :-1])
        real = windows.mask[:, 1:].to(change.dtype)
        errors = (changes - change).square().mean(-1) + (earned - rewards).square()
        return (real * errors).sum() / real.sum().clamp_min(1)

    def known(self, batch: PromptedBatch, prompts: EncodedPrompts, states: Tensor, rows: Tensor) -> Tensor:
        """What the model sees of the states [N, T, S] of these of the batch's windows, int64 [N]."""
        steps = states.shape[1]
        clock = batch.timesteps[rows, None] + torch.arange(steps, device=states.device)
        index = (rows // (len(batch.rewards) // len(prompts))).repeat_interleave(steps) if len(prompts) > 1 else None
        found = self.policy.condition(states.flatten(0, 1), prompts, index, clock.flatten()).joined()
        return found.unflatten(0, (len(rows), steps))

    @torch.no_grad()
    def simulate(self, batch: PromptedBatch, prompts: EncodedPrompts, places: Tensor) -> Simulated:
        """A random step of a simulated window in each place, as far as its recorded one goes."""
        windows, rows = self._windows(batch), self.sources(batch, places, len(prompts))
        self.model.eval()
        recorded, bound = windows.actions[rows, :-1], self.policy.config.action_bound
        actions = (recorded + bound * self.config.action_noise * torch.randn_like(recorded)).clamp(-bound, bound)
        states, unit = windows.states[rows, :1], self.policy.context.features.std
        for step in range(1, recorded.shape[1] + 1):
            known = self.known(batch, prompts, states, rows)
            change = self.model.states(known, actions[:, :step])[:, -1:]
            states = torch.cat([states, states[:, -1:] + unit * change], 1)
        rewards = self.model.rewards(known, actions).squeeze(-1)
        length = (windows.mask[rows].sum(1) - 1).clamp(1, recorded.shape[1])
        depth = (torch.rand(len(rows), device=length.device) * length).long()
        each = torch.arange(len(rows), device=length.device)
        steps = batch.timesteps[rows] + depth - batch.timesteps[places]
        taken = states[each, depth], actions[each, depth], rewards[each, depth], states[each, depth + 1]
        return Simulated(*taken, torch.zeros_like(rewards[:, 0]), steps)

    def sources(self, batch: PromptedBatch, places: Tensor, prompts: int) -> Tensor:
        """A window of each place's prompt among the best, drawn at random: its place in the batch [N].

        Windows of a single step, the last ones of episodes, have nothing to simulate and come last.
        """
        windows, size = self._windows(batch), len(batch.rewards) // prompts
        worth = windows.returns[:, 0].masked_fill(windows.mask.sum(1) < 2, -torch.inf).view(prompts, size)
        best = worth.topk(max(1, int(size * self.config.best)), dim=1).indices
        group = places // size
        drawn = torch.randint(best.shape[1], (len(places),), device=places.device)
        return best[group, drawn] + group * size

    def _windows(self, batch: PromptedBatch) -> StepWindows:
        assert batch.windows is not None, "the sampler was made with the horizon"
        return batch.windows
