"""The losses of policy diffusion with double Q-learning, of several learners: values to gradients, a program a learner.

Everything is float32, and summed in the same order each time.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def regression_kernel(
    values, next_values, rewards, terminals, d_values, metrics, rows, scale, gamma, BLOCK: tl.constexpr
):
    """Equation 6 of learner program_id(0); `regression` says what is read and written."""
    learner = tl.program_id(0).to(tl.int64)
    first, own = 2 * learner * rows, learner * rows
    total, of_first, of_target = (
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        there = row < rows
        one = tl.load(next_values + first + row, mask=there, other=0.0)
        other = tl.load(next_values + first + rows + row, mask=there, other=0.0)
        least = tl.where(one < other, one, other)
        least = tl.where(one == one, least, one)  # NaN stays, of either
        reward = tl.load(rewards + own + row, mask=there, other=0.0)
        end = tl.load(terminals + own + row, mask=there, other=0.0)
        target = tl.where(there, reward * scale + gamma * (1.0 - end) * least, 0.0)
        q1 = tl.load(values + first + row, mask=there, other=0.0)
        q2 = tl.load(values + first + rows + row, mask=there, other=0.0)
        e1, e2 = q1 - target, q2 - target
        tl.store(d_values + first + row, e1 * (2.0 / rows), mask=there)
        tl.store(d_values + first + rows + row, e2 * (2.0 / rows), mask=there)
        total += e1 * e1 + e2 * e2
        of_first += q1
        of_target += target
    tl.store(metrics + 3 * learner, tl.sum(total, 0) / rows)
    tl.store(metrics + 3 * learner + 1, tl.sum(of_first, 0) / rows)
    tl.store(metrics + 3 * learner + 2, tl.sum(of_target, 0) / rows)


@triton.jit(do_not_specialize=["rows", "numbers"])
def actor_kernel(
    predicted, noise, values, uniform, d_predicted, d_values, metrics, rows, numbers, eta, BLOCK: tl.constexpr
):
    """Equation 8 of learner program_id(0); `actor` says what is read and written."""
    learner = tl.program_id(0).to(tl.int64)
    own, first = learner * numbers, 2 * learner * rows
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, numbers, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        there = place < numbers
        error = tl.load(predicted + own + place, mask=there, other=0.0)
        error -= tl.load(noise + own + place, mask=there, other=0.0)
        tl.store(d_predicted + own + place, error * (2.0 / numbers), mask=there)
        total += error * error
    diffusion = tl.sum(total, 0) / numbers
    other = tl.where(tl.load(uniform + learner) < 0.5, 1, 0)  # which of the two is not chosen
    value, size = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        there = row < rows
        value += tl.load(values + first + (1 - other) * rows + row, mask=there, other=0.0)
        size += tl.abs(tl.load(values + first + other * rows + row, mask=there, other=0.0))
    objective, scale = tl.sum(value, 0) / rows, tl.sum(size, 0) / rows
    weight = eta / tl.where(scale < 1e-6, 1e-6, scale)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        chosen = tl.zeros([BLOCK], tl.float32) - weight / rows
        tl.store(d_values + first + (1 - other) * rows + row, chosen, mask=row < rows)
        tl.store(d_values + first + other * rows + row, tl.zeros([BLOCK], tl.float32), mask=row < rows)
    tl.store(metrics + 3 * learner, diffusion - weight * objective)
    tl.store(metrics + 3 * learner + 1, diffusion)
    tl.store(metrics + 3 * learner + 2, objective)


def regression(
    values: Tensor, next_values: Tensor, rewards: Tensor, terminals: Tensor, scale: float, gamma: float
) -> tuple[Launch, Tensor, Tensor]:
    """The critics' loss: mean (Q_i - target)^2, summed over both, target = scale r + gamma (1 - terminal) min Q̄.

    Args:
        values, next_values: by both critics of each learner, [2 L, B, 1], and by their targets at the next states.
        rewards, terminals: float32 [L, B].

    Returns:
        The launch; what it writes: the gradient by the values, like them, and [L, 3]: the loss, the means of Q_1 and of
        the target.
    """
    (learners, rows), metrics, d_values = (
        rewards.shape,
        values.new_empty(len(rewards), 3),
        values.new_empty(values.shape),
    )
    arguments = {
        "values": values, "next_values": next_values, "rewards": rewards, "terminals": terminals,
        "d_values": d_values, "metrics": metrics, "rows": rows, "scale": float(scale), "gamma": float(gamma),
    }  # fmt: skip
    return Launch(regression_kernel, learners, arguments, {"BLOCK": _block(rows)}, 4, 1), d_values, metrics


def actor(
    predicted: Tensor, noise: Tensor, values: Tensor, uniform: Tensor, eta: float
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The policy's loss: mean (predicted - noise)^2 - lambda mean Q, lambda = eta / mean |Q of the other critic|.

    Args:
        predicted, noise: [L, B, A]. values: of the policy's actions by both critics of each learner, [2 L, B, 1].
        uniform: random numbers from 0 to 1, [L]; below 0.5 Q_1 is chosen, else Q_2.

    Returns:
        The launch; what it writes: the gradients by predicted and by values, like them, and [L, 3]: the loss, its first
        mean, and the mean of the chosen Q.
    """
    learners, rows, action_dim = predicted.shape
    d_predicted, d_values = predicted.new_empty(predicted.shape), values.new_empty(values.shape)
    metrics = values.new_empty(learners, 3)
    arguments = {
        "predicted": predicted, "noise": noise, "values": values, "uniform": uniform, "d_predicted": d_predicted,
        "d_values": d_values, "metrics": metrics, "rows": rows, "numbers": rows * action_dim, "eta": float(eta),
    }  # fmt: skip
    launch = Launch(actor_kernel, learners, arguments, {"BLOCK": _block(rows * action_dim)}, 4, 1)
    return launch, d_predicted, d_values, metrics


def _block(numbers: int) -> int:
    return min(_BLOCK, max(16, 1 << (numbers - 1).bit_length()))
