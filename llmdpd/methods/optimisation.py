"""How a policy is optimised, whatever its method: learning rate and average by the number of the iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmdpd.utils.bounds import Count, Fraction, NonNegative, WholeNumber


@dataclass(frozen=True)
class OptimisationConfig:
    """How any method's policy is optimised: AdamW, its rate's schedule, and the EMA that acts.

    A method's own config inherits it, and declares a field again where its literature has another default.
    """

    lr: NonNegative = 3e-4
    """Learning rate of policy and encoders."""
    lr_warmup: WholeNumber = 0
    """Iterations of linear warm-up, of every rate."""
    lr_final: Fraction = 1.0
    """Fraction of the rates that is left at the end of a cosine decay per iteration; 1 keeps them constant."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW) of policy and encoders."""
    grad_clip: NonNegative = 0.0
    """Bound on the norm of each optimiser's gradient; 0 for none."""
    ema_decay: Fraction = 0.995
    """Decay of the EMA of the policy, which acts, and samples target actions where critics learn."""
    ema_every: Count = 5
    """Iterations from one EMA update to the next."""
    ema_start: WholeNumber = 1000
    """Iteration from which the EMA averages; before it copies."""


def rate_factor(config: OptimisationConfig, iteration: int, iterations: int) -> float:
    """The fraction of its rate that an iteration (from 0) learns with: linear warm-up, cosine decay to `lr_final`."""
    progress = torch.tensor(iteration / max(iterations, 1) * torch.pi)
    factor = config.lr_final + (1 - config.lr_final) * 0.5 * (1 + float(torch.cos(progress)))
    if config.lr_warmup:
        factor *= min(1.0, (iteration + 1) / config.lr_warmup)
    return factor


def ema_rate(config: OptimisationConfig, iteration: int) -> float | None:
    """How far the EMA goes to the trained weights after an iteration: 1 (a copy) before `ema_start`; None: not now."""
    if iteration % config.ema_every:
        return None
    return 1 - config.ema_decay if iteration >= config.ema_start else 1.0
