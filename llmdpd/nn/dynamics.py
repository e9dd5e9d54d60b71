"""Models of an environment: an ensemble that knows a step by the present state, as model-based offline RL has them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdpd.nn.layers import EnsembleLinear
from llmdpd.utils.sharding import randint, randn

_LOG_STD = (-6.0, 1.0)


class Predicted(NamedTuple):
    """A step by each of N models: mean and log of the deviation of (change of state, reward) [N, B, S + 1].

    terminal [N, B]: logits.
    """

    mean: Tensor
    log_std: Tensor
    terminal: Tensor


class EnsembleDynamics(nn.Module):
    """N networks, each a Gaussian of the change of state and the reward, and the logit of a terminal.

    After the probabilistic ensembles of Chua et al. (2018) and MBPO (Janner et al. 2019). Steps are
    in the caller's units; the terminal is learned, where those have a known rule for each task.

    Args:
        members: N. inputs: size of what is known of a state. state_dim: S. action_dim: A.
        hidden, layers: width and number of the hidden layers.
    """

    def __init__(self, members: int, inputs: int, state_dim: int, action_dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = (inputs + action_dim, *(hidden,) * layers)
        parts = [EnsembleLinear(members, a, b) for a, b in itertools.pairwise(widths)]
        self.hidden, self.last = nn.ModuleList(parts), EnsembleLinear(members, hidden, 2 * (state_dim + 1) + 1)
        self.members = members

    def forward(self, known: Tensor, action: Tensor) -> Predicted:
        """What is known of B states [B, F], actions [B, A] → the step by each model."""
        found = torch.cat([known, action], -1)[None]
        for layer in self.hidden:
            found = F.silu(layer(found))
        found = self.last(found)
        mean, log_std = found[..., :-1].chunk(2, -1)
        return Predicted(mean, log_std.clamp(*_LOG_STD), found[..., -1])

    def loss(self, known: Tensor, action: Tensor, step: Tensor, terminal: Tensor) -> Tensor:
        """Mean negative log-likelihood of steps [B, S + 1] and terminals [B], over models and numbers."""
        found = self(known, action)
        error = (step - found.mean) / found.log_std.exp()
        ends = F.binary_cross_entropy_with_logits(found.terminal, terminal.expand_as(found.terminal))
        return (0.5 * error.square() + found.log_std).mean() + ends

    def disagreement(self, found: Tensor) -> Tensor:
        """Of the models' means [N, B, S + 1]: the root of the summed variances over the models [B]."""
        return found.var(0, correction=0).sum(-1).sqrt()

    def sample(self, known: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """A step by one of the models, drawn for each state: [B, S + 1], and whether it is terminal [B], 0 or 1."""
        found, count = self(known, action), len(known)
        which = randint(self.members, (count,), known.device)
        rows = torch.arange(count, device=known.device)
        mean, log_std, terminal = (part[which, rows] for part in found)
        return mean + log_std.exp() * randn(mean.shape, mean.device), (terminal > 0).to(mean.dtype)
