"""PnF-Qgrad (Modhe et al. 2023, arXiv 2308.03882) on COMBO (Yu et al. 2021): rollouts from states that nobody has seen.

COMBO is CQL on the data and on short rollouts of a learned ensemble: the squared errors are of both, Q is pressed down
at the states of both, and held up at the data's actions alone. PnF perturbs the states that rollouts start from, by the
gradient of the value, and keeps those whose epistemic uncertainty is neither too high nor too low; the others start
where the data was.

Sources: the paper's abstract, which says just that; its text and code could not be had. COMBO's settings are those of
a public implementation (OfflineRL-Kit, for medium-replay data). So these are this project's: the direction (uphill),
length and distribution of the perturbation, that the uncertainty is the ensemble's disagreement, and the band, which
lies between two quantiles of that of the data's own states. Different from COMBO's code: the model has five networks
where that chooses five of seven, and learns along with the policy; terminals are learned, and rollouts are made anew in
each iteration from its own states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.simulated import Simulated, SimulatedConfig, SimulatedCQL
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.dynamics import EnsembleDynamics
from llmdpd.utils import sharding
from llmdpd.utils.bounds import Bounds, Fraction, Layers, NonNegative, Width


@dataclass(frozen=True)
class PnFConfig(SimulatedConfig):
    """COMBO with PnF-Qgrad."""

    name = "pnf"

    penalty: NonNegative = 0.5
    """Weight of the conservative term."""
    members: Annotated[int, Bounds(2, 1000)] = 5
    """Networks of the model."""
    model_hidden: Width = 200
    """Width of the model's hidden layers."""
    model_layers: Layers = 4
    """Hidden layers of the model."""
    rollout: Annotated[int, Bounds(1, 1000)] = 5
    """Steps of a rollout at most."""
    perturbation: NonNegative = 0.3
    """Greatest length of a perturbation, in standard deviations of the data's states."""
    least_uncertainty: Fraction = 0.5
    """Quantile of the data's uncertainty below which a perturbed state counts as seen."""
    most_uncertainty: Fraction = 0.95
    """Quantile of the data's uncertainty above which the model is not trusted."""

    def check(self) -> None:
        super().check()
        if self.least_uncertainty > self.most_uncertainty:
            raise InputError(
                "the least quantile is above the greatest",
                field="least_uncertainty",
                found=self.least_uncertainty,
                expected=f"at most {self.most_uncertainty} (most_uncertainty)",
            )


class PnF(SimulatedCQL[PnFConfig]):
    """COMBO's actor, critics, temperature and model."""

    Config = PnFConfig
    model: EnsembleDynamics

    def make_model(self) -> EnsembleDynamics:
        config, policy = self.config, self.policy
        inputs = policy.context.state_dim + policy.context.prompt_dim
        return EnsembleDynamics(
            config.members, inputs, policy.state_dim, policy.action_dim, config.model_hidden, config.model_layers
        )

    def model_loss(self, batch: PromptedBatch, prompts: EncodedPrompts) -> Tensor:
        """The likelihood of the batch's steps."""
        with torch.no_grad():
            known = self.condition(batch, prompts).joined()
            change = (batch.next_observations - batch.observations) / self.policy.context.features.std
        return self.model.loss(known, batch.actions, torch.cat([change, batch.rewards[:, None]], -1), batch.terminals)

    def simulate(self, batch: PromptedBatch, prompts: EncodedPrompts, places: Tensor) -> Simulated:
        """Of a rollout from each place the step at a random depth, or the one that ended it before."""
        with sharding.by_transition():
            starts = self.starts(batch, prompts)
        index = places // (len(batch.rewards) // len(prompts)) if len(prompts) > 1 else None
        with torch.no_grad():
            return self._rollout(starts[places], prompts, index, batch.timesteps[places])

    def held_up(self, count: int, device: torch.device) -> Tensor:
        simulated = torch.zeros(count, dtype=torch.bool, device=device)
        if self._simulates:
            simulated[self.places(count, device)] = True
        return (~simulated).nonzero()[:, 0]

    def starts(self, batch: PromptedBatch, prompts: EncodedPrompts) -> Tensor:
        """Perturbed states where the filter lets them through, else the batch's own [B, S]."""
        states = batch.observations
        perturbed = self.perturbed(states, prompts, batch.timesteps)
        with torch.no_grad():
            usual, found = (self.uncertainty(s, prompts, batch.timesteps) for s in (states, perturbed))
            edges = torch.tensor([self.config.least_uncertainty, self.config.most_uncertainty], device=usual.device)
            low, high = torch.quantile(sharding.gathered(usual), edges.to(usual.dtype))
            return torch.where(((found >= low) & (found <= high))[:, None], perturbed, states)

    def perturbed(self, states: Tensor, prompts: EncodedPrompts, steps: Tensor) -> Tensor:
        """States [B, S] a random length up the gradient of min Q(s, pi(s)), in units of the data's deviations."""
        unit, inputs = self.policy.context.features.std, states.clone().requires_grad_()
        condition = self.policy.condition(inputs, prompts, None, steps)
        value = self.critic.minimum(condition, self.policy.rsample(condition)[0][0])
        uphill = torch.autograd.grad(value.sum(), inputs)[0] * unit
        length = self.config.perturbation * sharding.rand((len(states), 1), states.device)
        # Where an observation says that nothing is there, by an exact 0, a value would show something.
        there = states != 0
        return states + there * unit * length * uphill / uphill.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    def uncertainty(self, states: Tensor, prompts: EncodedPrompts, steps: Tensor) -> Tensor:
        """The models' disagreement on the policy's action in each state [B]."""
        condition = self.policy.condition(states, prompts, None, steps)
        action = self.policy.rsample(condition)[0][0]
        return self.model.disagreement(self.model(condition.joined(), action).mean)

    def _rollout(self, states: Tensor, prompts: EncodedPrompts, index: Tensor | None, steps: Tensor) -> Simulated:
        unit = self.policy.context.features.std
        depth = sharding.randint(self.config.rollout, (len(states),), states.device)
        chosen: Simulated | None = None
        ended = torch.zeros_like(depth, dtype=torch.bool)
        for step in range(self.config.rollout):
            condition = self.policy.condition(states, prompts, index, steps + step)
            action = self.policy.rsample(condition)[0][0]
            found, terminal = self.model.sample(condition.joined(), action)
            following = states + unit * found[:, :-1]
            made = Simulated(states, action, found[:, -1], following, terminal, torch.full_like(depth, step))
            chosen = made if chosen is None else _where((depth >= step) & ~ended, made, chosen)
            ended |= terminal > 0
            states = following
        assert chosen is not None, "a rollout has a step"
        return chosen


def _where(mask: Tensor, there: Simulated, elsewhere: Simulated) -> Simulated:
    pairs = zip(there, elsewhere, strict=True)
    return Simulated(*(torch.where(mask.view(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in pairs))
