"""Steps of optimisers that are prepared once, for iterations that are (`llmdpd.ops.together`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmdpd.methods.base import Method
from llmdpd.ops.optimizer import MOMENTS, state_of
from llmdpd.ops.together import Prepared


class Steps:
    """The steps of one optimiser of each learner: AdamW's state, whose counts lie in one tensor, and its settings."""

    def __init__(self, learners: Sequence[Method[Any, Any]], name: str) -> None:
        optimizers = [learner.optimizers[f"{name}_optimizer"] for learner in learners]
        self.weights = [list(optimizer.param_groups[0]["params"]) for optimizer in optimizers]
        pairs = zip(optimizers, self.weights, strict=True)
        self._states = [[state_of(optimizer, weight) for weight in weights] for optimizer, weights in pairs]
        self._counts = torch.stack([torch.stack([state["step"] for state in states]) for states in self._states])
        for states, counts in zip(self._states, self._counts, strict=True):
            for state, count in zip(states, counts.unbind(), strict=True):
                state["step"] = count
        self.norm = torch.zeros(len(learners), 1)
        self._group, self._bound = optimizers[0].param_groups[0], learners[0].config.grad_clip
        self._settings = np.zeros((len(learners), 7))

    def gradients(self, number: int) -> list[Tensor]:
        """Memory for the gradients of a learner's weights."""
        return [torch.zeros_like(weight) for weight in self.weights[number]]

    def count(self) -> None:
        """Prepare the next step: its number, and what stands in the first optimiser, as the schedule's rate."""
        self._counts += 1
        group = self._group
        self._settings[:, :6] = float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], self._bound
        self._settings[:, 6] = self._counts[:, 0].numpy()

    def prepare(
        self,
        number: int,
        calls: Prepared,
        gradients: Sequence[Tensor],
        averages: Sequence[Tensor] = (),
        rate: NDArray[np.float64] | None = None,
    ) -> None:
        """Add a learner's step to its calls; averages, rate: see `Prepared.step`."""
        states = self._states[number]
        moments = [[state[key] for state in states] for key in MOMENTS]
        step = (self.weights[number], gradients, *moments)
        calls.step(step, self._settings[number], self.norm[number], averages, rate)


def can_step(optimizer: torch.optim.Optimizer, network: nn.Module) -> bool:
    """Whether it steps all of the network's weights, in their order, as one group that has made as many steps each."""
    groups, learned = optimizer.param_groups, [*network.parameters()]
    if type(optimizer) is not torch.optim.AdamW or len(groups) != 1:
        return False
    if [*map(id, groups[0]["params"])] != [*map(id, learned)]:
        return False
    return len({float(optimizer.state[p]["step"]) if optimizer.state.get(p) else 0.0 for p in learned}) == 1
