"""Double Q-learning's losses on the CPU, each one node of autograd's graph: little stands between the C++ calls.

`llmdpd.nn.critic.DoubleQ` defines them in PyTorch, which the tests hold these to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmdpd.ops import layers, native, operators
from llmdpd.ops.nodes import Array, Computation, Weights, node, parameters

WEIGHTS = tuple(
    f"{critic}.{layer}.{kind}" for critic in ("q1", "q2") for layer in (0, 2, 4, 6) for kind in ("weight", "bias")
)
"""Names of the weights, as in the state of `DoubleQ`."""
_EACH = len(WEIGHTS) // 2


def weights_of(critics: nn.Module, *tensors: Tensor) -> Weights | None:
    """The critics' `WEIGHTS`, where the C++ code computes what is made of these tensors, each [B, ·] or [B]."""
    return parameters(critics, WEIGHTS) if len(tensors[0]) and layers.computes(*tensors) else None


def learn(weights: Weights) -> bool | None:
    """Whether critics of these weights get a gradient; None where some weights do, and where none is computed."""
    asked = {weight.requires_grad for weight in weights.values()}
    return asked.pop() if len(asked) == 1 and torch.is_grad_enabled() else None


def minimum(x: Sequence[Tensor], weights: Weights, bf16: bool) -> Tensor:
    """min(Q_1, Q_2) [B], without gradient; the arguments are those of `regression`."""
    critics = _Critics(_joined(x), weights.arrays, bf16, keep=False)
    critics.evaluate(np.empty(0, np.float32))
    return torch.from_numpy(np.minimum(*critics.values)[:, 0])


def regression(x: Sequence[Tensor], target: Tensor, weights: Weights, bf16: bool) -> tuple[Tensor, Tensor]:
    """The mean squared errors of both critics to targets, summed, and the mean of Q_1; scalars.

    Args:
        x: what the critics read, each [B, ·]. target: [B]. None of these has a gradient.
        weights: the critics'. bf16: whether the hidden layers' products are in bfloat16.
    """
    rows, wanted = _joined(x), native.array(target)[:, None]

    def compute(arrays: list[Array]) -> tuple[Computation, list[Array]]:
        return _Regression(rows, arrays, bf16, wanted), [np.empty((), np.float32) for _ in range(2)]

    loss, mean = node(compute, (), weights)
    return loss, mean.detach()


def objective(
    state: Tensor, action: Tensor, prompt: Tensor, weights: Weights, bf16: bool, first: bool
) -> tuple[Tensor, Tensor]:
    """The mean value of actions by one critic, and the mean |Q| of the other; scalars.

    Args:
        state: [B, F], and prompt: [B, Z], without a gradient. action: [B, A].
        weights: the critics', which get no gradient. bf16: as of `regression`. first: whether Q_1 is the one.
    """
    ordered = weights.arrays if first else [*weights.arrays[_EACH:], *weights.arrays[:_EACH]]
    rows = _joined([state, action.detach(), prompt])
    columns = slice(state.shape[1], state.shape[1] + action.shape[1])

    def compute(_: list[Array]) -> tuple[Computation, list[Array]]:
        return _Objective(rows, ordered, bf16, columns), [np.empty((), np.float32) for _ in range(2)]

    none = Weights()
    none.arrays = []
    value, scale = node(compute, (action,), none, tuple(weights.values()))
    return value, scale.detach()


def _joined(parts: Sequence[Tensor]) -> Array:
    return np.concatenate([part.detach().numpy() for part in parts], 1)


class _Critics:
    """Both critics on rows [B, I]; their tapes lie in one."""

    def __init__(self, rows: Array, arrays: list[Array], bf16: bool, keep: bool = True) -> None:
        threads, make = native.threads(), native.module().MlpArguments
        nets = (arrays[:_EACH], arrays[_EACH:])
        self.nets = [make(rows, net[0], net[1], net[2:], bf16, threads) for net in nets]
        self.values = [np.empty((len(rows), 1), np.float32) for _ in nets]
        self.rows = rows
        floats = operators.tape_floats(len(rows), len(arrays[1]), 1, 0, 1, 1, bf16)
        self._each = -(-floats // 16) * 16 if keep and operators.keeps_tape(2 * floats) else 0

    def tape_floats(self) -> int:
        """Numbers of both tapes."""
        return 2 * self._each

    def evaluate(self, tape: Array) -> None:
        """Compute the values, and what is kept."""
        native.module().mlps_forward(self.nets, self.values, self.tapes(tape))

    def tapes(self, tape: Array) -> list[Array]:
        """Each critic's."""
        return [tape[: self._each], tape[self._each : 2 * self._each]]


class _Regression(_Critics):
    def __init__(self, rows: Array, arrays: list[Array], bf16: bool, target: Array) -> None:
        super().__init__(rows, arrays, bf16)
        self._arrays, self._target = arrays, target

    def forward(self, tape: Array, results: list[Array]) -> None:
        self.evaluate(tape)
        self._errors = [value - self._target for value in self.values]
        one, other = (torch.from_numpy(error).square().mean() for error in self._errors)
        results[0][...], results[1][...] = (one + other).numpy(), torch.from_numpy(self.values[0]).mean().numpy()

    def backward(self, tape: Array, grads: list[Array], gradients: Array) -> None:
        factor = np.float32(2 / len(self.rows)) * grads[0]
        written: list[list[Any]] = [[], []]
        at = 0
        for number, array in enumerate(self._arrays):
            written[number // _EACH].append(gradients[at : at + array.size].reshape(array.shape))
            at += array.size
        of_values = [factor * error for error in self._errors]
        native.module().mlps_backward(self.nets, of_values, self.tapes(tape), [], written)


class _Objective(_Critics):
    def __init__(self, rows: Array, arrays: list[Array], bf16: bool, columns: slice) -> None:
        super().__init__(rows, arrays, bf16)
        self._columns = columns

    def forward(self, tape: Array, results: list[Array]) -> None:
        self.evaluate(tape)
        chosen, other = map(torch.from_numpy, self.values)  # means as of torch, to the bit
        results[0][...], results[1][...] = chosen.mean().numpy(), other.abs().mean().numpy()

    def backward(self, tape: Array, grads: list[Array], gradients: Array) -> None:
        of_value = np.full_like(self.values[0], grads[0] / np.float32(len(self.rows)))
        of_rows = np.empty_like(self.rows)
        native.module().mlps_backward(self.nets[:1], [of_value], self.tapes(tape)[:1], [of_rows], [[]])
        actions = of_rows[:, self._columns]
        gradients.reshape(actions.shape)[...] = actions
