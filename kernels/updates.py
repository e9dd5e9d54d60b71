"""AdamW with a bound on the gradient's norm, of several learners whose weights lie in one tensor [L, P].

Two launches: sums of squares, and the step, which also moves an average of the weights after them. Sums are always
taken in the same order. As `torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_`.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_BLOCK = 2048


@triton.jit(do_not_specialize=["count"])
def squares_kernel(gradients, sums, count, BLOCK: tl.constexpr):
    """Program (i, l): the sum of the squares of block i of learner l's gradient [L, count], into sums [L, blocks]."""
    block, learner = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradients + learner * count + place, mask=place < count, other=0.0)
    tl.store(sums + learner * tl.num_programs(0) + block, tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["count", "between"])
def adamw_kernel(
    weights, gradients, means, squares, averages, sums, norms, done, lr, count, between, limit, tau,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPSILON: tl.constexpr, DECAY: tl.constexpr,
    LIMITED: tl.constexpr, AVERAGED: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, l): the step of block i of learner l's weights [L, count], and averages += tau (weights - averages).

    sums: of `squares_kernel`, SUMS or fewer a learner; norms [L] are written. done: how many steps were made with this
    one, float32, `between` numbers from one learner to the next. lr: in memory, [1].
    """
    block, learner, blocks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    part = tl.arange(0, SUMS)
    norm = tl.sqrt(tl.sum(tl.load(sums + learner * blocks + part, mask=part < blocks, other=0.0), 0))
    if block == 0:
        tl.store(norms + learner, norm)
    place = block * BLOCK + tl.arange(0, BLOCK)
    there, at = place < count, learner * count + place
    g = tl.load(gradients + at, mask=there, other=0.0)
    if LIMITED:
        share = limit / (norm + 1e-6)
        g = g * tl.where(share > 1.0, 1.0, share)  # NaN stays
    # In float64: after one step the second is 1 less 0.999, of which float32 keeps four digits.
    steps = tl.load(done + learner * between).to(tl.float64)
    beta1, beta2 = tl.exp(tl.full((), LOG_BETA1, tl.float64)), tl.exp(tl.full((), LOG_BETA2, tl.float64))
    correction1, correction2 = 1.0 - tl.exp(steps * LOG_BETA1), 1.0 - tl.exp(steps * LOG_BETA2)
    rate = tl.load(lr)
    pace, root = (rate.to(tl.float64) / correction1).to(tl.float32), tl.sqrt(correction2).to(tl.float32)
    w = tl.load(weights + at, mask=there, other=0.0)
    m = tl.load(means + at, mask=there, other=0.0)
    v = tl.load(squares + at, mask=there, other=0.0)
    w = w - rate * DECAY * w
    m = m + (1.0 - beta1).to(tl.float32) * (g - m)
    v = beta2.to(tl.float32) * v + (1.0 - beta2).to(tl.float32) * g * g
    w = w - pace * m / (tl.sqrt(v) / root + EPSILON)
    tl.store(weights + at, w, mask=there)
    tl.store(means + at, m, mask=there)
    tl.store(squares + at, v, mask=there)
    if AVERAGED:
        a = tl.load(averages + at, mask=there, other=0.0)
        # As torch.lerp: from a half on, from the other end, so that 1 gives the weights themselves.
        tl.store(averages + at, tl.where(tau < 0.5, a + tau * (w - a), w - (1.0 - tau) * (w - a)), mask=there)


@dataclass(frozen=True)
class AdamW:
    """The constants of a step."""

    betas: tuple[float, float]
    eps: float
    decay: float
    limit: float
    """On the norm of a learner's gradient; 0 for none."""


class Step(NamedTuple):
    """The launches of a step."""

    squares: Launch
    update: Launch
    norms: Tensor
    """Of the learners' gradients before the bound, [L], written by the second."""

    def run(self) -> Tensor:
        """Do it; the norms."""
        self.squares.run()
        self.update.run()
        return self.norms


def step(
    weights: Tensor,
    gradients: Tensor,
    moments: tuple[Tensor, Tensor],
    done: Tensor,
    lr: Tensor,
    settings: AdamW,
    average: tuple[Tensor, float] | None = None,
) -> Step:
    """One step of the weights [L, P] of each learner, in place.

    Args:
        moments: means and squares [L, P]. done: steps with this one, float32 [L, …], of which each learner's first is
            read. lr: float32, one number. average: weights [L, P] and how far they go to the new ones, 0 to 1.
    """
    learners, count = weights.shape
    blocks = -(-count // _BLOCK)
    sums, norms = weights.new_empty(learners, blocks), weights.new_empty(learners)
    averages, tau = (None, 0.0) if average is None else average
    arguments = {"gradients": gradients, "sums": sums, "count": count}
    of_squares = Launch(squares_kernel, blocks, arguments, {"BLOCK": _BLOCK}, 4, 1, members=learners)
    own = {
        "weights": weights, "gradients": gradients, "means": moments[0], "squares": moments[1], "averages": averages,
        "sums": sums, "norms": norms, "done": done, "lr": lr, "count": count, "between": done.stride(0),
        "limit": float(settings.limit), "tau": float(tau),
    }  # fmt: skip
    constants = {
        "LOG_BETA1": math.log(settings.betas[0]), "LOG_BETA2": math.log(settings.betas[1]), "EPSILON": settings.eps,
        "DECAY": settings.decay, "LIMITED": settings.limit > 0, "AVERAGED": average is not None,
        "SUMS": max(16, 1 << (blocks - 1).bit_length()), "BLOCK": _BLOCK,
    }  # fmt: skip
    return Step(of_squares, Launch(adamw_kernel, blocks, own, constants, 4, 1, members=learners), norms)
