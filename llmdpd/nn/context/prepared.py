"""Reading prompts, and states under them, prepared once for batches of one shape (`llmdpd.ops.together`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmdpd.nn.context.base import Keep
from llmdpd.nn.context.native import ContextInputs, seen
from llmdpd.ops import native, together
from llmdpd.ops.nodes import Weights
from llmdpd.prompts.demonstration import TrajectoryTokens


class ReadingSizes(NamedTuple):
    """P, T, B, the size of texts (0 where none is read), Z, and F."""

    prompts: int
    steps: int
    states: int
    text: int
    vector: int
    condition: int


class PreparedReading:
    """What `RetrievalContext` makes of P prompts of T steps and of B states under them, in equal groups.

    pooled: the prompts' vectors [P, Z]. condition: the state part [B, F]. Both are written when `forward` runs, and
    the gradients when `backward` does.

    Args:
        inputs: the context's.
        weights: those that prompts are read by, and those that states are read by.
        sizes: see there.
    """

    def __init__(self, inputs: ContextInputs, weights: tuple[Weights, Weights], sizes: ReadingSizes) -> None:
        prompts, steps, states, text, vector, condition = sizes
        self._inputs, shape = inputs, inputs.shape
        of_prompts, of_states = weights
        self._prompt_arrays, self._state_arrays = inputs.new_prompts(prompts, steps), inputs.new_states(states)
        self._text = _zeros(prompts, text) if text else None
        self._kept = _zeros(prompts, 1), _zeros(prompts, 1)
        kept = [native.array(part) for part in self._kept]
        shown = self._prompt_arrays.shown(None if self._text is None else native.array(self._text), *kept)
        self._prompts = together.prompts(shape, shown, of_prompts)
        self.pooled, width = _zeros(prompts, vector), len(of_prompts["nothing"])
        self._rows = [_zeros(prompts, steps + 1, width) for _ in range(2 * shape.layers + shape.waypoints)]
        found = seen(self._prompt_arrays, self._state_arrays)
        self._states = together.states(shape, found, [self.pooled, *self._rows], of_states)
        self.condition = _zeros(states, condition)
        d_read = self._states.each_gradient()
        self._d_pooled, *self._d_rows = d_read[: 1 + len(self._rows)]
        self.gradients = dict(zip(of_prompts.values(), self._prompts.each_gradient(), strict=True))
        self.gradients |= dict(zip(of_states.values(), d_read[1 + len(self._rows) :], strict=True))

    def write(
        self, text: Tensor | None, tokens: TrajectoryTokens, keep: Keep, observations: Tensor, timesteps: Tensor
    ) -> None:
        """Take a batch's prompts and states."""
        if self._text is not None and text is not None:
            self._text.copy_(text)
        for to, given in zip(self._kept, (keep.text, keep.trajectory), strict=True):
            to.fill_(1.0) if given is None else to.copy_(given)
        self._inputs.write_prompts(tokens, keep.trajectory, self._prompt_arrays)
        self._inputs.write_states(observations, timesteps, self._state_arrays)

    def forward(self, calls: together.Prepared) -> None:
        """Add the passes forward."""
        calls.forward(self._prompts, self.pooled, *self._rows)
        calls.forward(self._states, self.condition)

    def backward(self, calls: together.Prepared, d_condition: Tensor, d_pooled: Tensor) -> None:
        """Add the passes backward from the gradients of condition and pooled vectors."""
        calls.backward(self._states, d_condition)
        calls.add(self._d_pooled, d_pooled)
        calls.backward(self._prompts, self._d_pooled, *self._d_rows)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)
