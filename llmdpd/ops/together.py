"""Operators of several learners, prepared once and then run side by side, in one call for all of them.

What is prepared reads and writes memory where it lies at that moment: parameters that are written in place, buffers
that are filled anew. Each learner's calls are what they are alone, one after another; so its bits are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.ops import native, noise_net, operators
from llmdpd.ops.arguments import MlpArguments, SamplerCoefficients
from llmdpd.ops.nodes import Array, Weights
from llmdpd.ops.reading import ContextShape, Seen, Shown


class Prepared:
    """Calls of one learner, in the order in which they run."""

    def __init__(self) -> None:
        self._native = native.module()
        self.calls = self._native.PreparedCalls()

    def nets_forward(self, nets: Sequence[Any], outs: Sequence[Tensor], tapes: Sequence[Array]) -> None:
        """The outputs of `net`s, [B, O] of each."""
        self._native.add_mlps_forward(self.calls, list(nets), list(map(in_place, outs)), list(tapes))

    def nets_backward(
        self,
        nets: Sequence[Any],
        grads: Sequence[Tensor],
        tapes: Sequence[Array],
        x: Sequence[Tensor],
        weights: Sequence[Sequence[Tensor]],
    ) -> None:
        """As `native.mlps_backward`."""
        written = [list(map(in_place, of)) for of in weights]
        given = (list(nets), list(map(in_place, grads)), list(tapes), list(map(in_place, x)), written)
        self._native.add_mlps_backward(self.calls, *given)

    def forward(self, node: Node, *results: Tensor) -> None:
        """The node's results."""
        add = getattr(self._native, f"add_{node.kind}_forward")
        add(self.calls, node.native, node.tape, list(map(in_place, results)))

    def backward(self, node: Node, *grads: Tensor) -> None:
        """The node's `gradients`, from those of its results."""
        add = getattr(self._native, f"add_{node.kind}_backward")
        add(self.calls, node.native, node.tape, list(map(in_place, grads)), in_place(node.gradients))

    def sample(self, sampler: Any, state: Tensor, key: Tensor, actions: Tensor) -> None:
        """Actions [B, A] of states [B, S] by a `bind_sampler` of a network without prompts; key int64 [1]."""
        self._native.add_sample(self.calls, sampler, in_place(state), native.keys(key), in_place(actions))

    def step(
        self,
        step: Sequence[Sequence[Tensor]],
        settings: NDArray[np.float64],
        norm: Tensor,
        averages: Sequence[Tensor] = (),
        rate: NDArray[np.float64] | None = None,
    ) -> None:
        """AdamW's step as `llmdpd.ops.optimizer.clipped_step`.

        Args:
            step: weights, gradients, means and squares, in the same order.
            settings: rate, betas, epsilon, decay, the norm's bound, and the step's number, read when it runs [7].
            norm: of the gradient [1], written.
            averages: of the weights, if any, that go after them as by `average`, in the same pass over memory.
            rate: of the averages.
        """
        lists = [list(map(in_place, tensors)) for tensors in step]
        self._native.add_step(self.calls, *lists, settings, in_place(norm), list(map(in_place, averages)), rate)

    def average(self, targets: Sequence[Tensor], sources: Sequence[Tensor], rate: NDArray[np.float64]) -> None:
        """As `llmdpd.ops.optimizer.average`; the rate [1] is read when it runs."""
        lists = [list(map(in_place, tensors)) for tensors in (targets, sources)]
        self._native.add_average(self.calls, *lists, rate)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """to = source, matrices whose rows are contiguous."""
        self._native.add_copy(self.calls, _rows(to), _rows(source), False)

    def add(self, to: Tensor, source: Tensor) -> None:
        """to += source, as `copy`."""
        self._native.add_copy(self.calls, _rows(to), _rows(source), True)


def prepared_for() -> tuple[int, str]:
    """What every call is prepared for beside memory: the number of threads, and the instruction set."""
    return native.threads(), native.module().active_isa()


def show_gradients(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let the gradient of each parameter be the tensor whose memory it was written to."""
    for parameter, gradient in pairs:
        if parameter.grad is not gradient:
            parameter.grad = gradient


def run_together(members: Sequence[Prepared]) -> None:
    """Run the calls of each, members side by side."""
    native.module().run_together([member.calls for member in members], native.threads())


class Node:
    """A node of training (`llmdpd.ops.noise_net`, `.reading`), made once.

    gradients: of all that it was given, then of all weights in the order of the module's, one after the other.
    """

    def __init__(self, kind: str, made: Any, given: Sequence[Array]) -> None:
        self.kind, self.native = kind, made
        self.tape: Array = native.module().pooled_buffer(made.tape_floats())
        self.gradients = torch.zeros(sum(array.size for array in given), dtype=torch.float32)
        self._shapes = [array.shape for array in given]

    def each_gradient(self) -> list[Tensor]:
        """The gradients as tensors of the same memory, of the shapes of what they are of."""
        parts = self.gradients.split([math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def prompts(shape: ContextShape, shown: Shown, weights: Weights) -> Node:
    """Prompts read; see `llmdpd.ops.reading.read_prompts`."""
    made = native.module().prompt_node(shape, *shown, weights.arrays, native.threads())
    return Node("prompts", made, weights.arrays)


def states(shape: ContextShape, seen: Seen, read: Sequence[Tensor], weights: Weights) -> Node:
    """States read, under prompts that `read` is of; see `llmdpd.ops.reading.read_states`."""
    given = [*map(in_place, read), *weights.arrays]
    flat = [array.reshape(-1, array.shape[-1]) for array in given[: len(read)]]
    made = native.module().state_node(shape, *seen, [*flat, *weights.arrays], native.threads())
    return Node("states", made, given)


def prediction(
    actions: Tensor, place: Tensor, levels: int, condition: Sequence[Tensor], weights: Weights, net: Any, bf16: bool
) -> Node:
    """The noise in actions [B, A], at the diffusion steps int64 [B] of so many.

    condition: states [B, S], and prompts [P, Z] of equal groups of them where the network reads any.
    """
    waves = noise_net.waves(np.arange(levels), net.time_frequencies)
    given, prompted = [*map(in_place, condition), *weights.arrays], len(condition) > 1
    most, threads = operators.TAPE_LIMIT // 4, native.threads()
    make = native.module().prediction_node
    made = make(in_place(actions), waves, place.numpy(), given, prompted, bf16, most, threads)
    return Node("prediction", made, given)


def chain(
    plan: SamplerCoefficients, key: Tensor, action_dim: int, state: Tensor, weights: Weights, net: Any, bf16: bool
) -> Node:
    """Actions [B, 1, A] by the reverse chain, in states [B, S]; key int64 [1]."""
    waves, given = noise_net.waves(plan.timesteps, net.time_frequencies), [in_place(state), *weights.arrays]
    constants = (plan.start, plan.bound, 1, action_dim)
    most, threads = operators.TAPE_LIMIT // 4, native.threads()
    make = native.module().chain_node
    own = (waves, plan.table(), native.keys(key), None, *constants, given, False, False, bf16, most, threads)
    return Node("chain", make(*own), given)


def net_of(mlp: MlpArguments) -> Any:
    """A three-layer net on its inputs as the C++ code takes it."""
    return native.mlp_arguments(mlp)


def tapes_of(mlps: Sequence[MlpArguments]) -> list[Array]:
    """Memory for the tapes of nets, empty where they would be too large and are computed again."""
    floats = [operators.mlp_tape_floats(mlp) for mlp in mlps]
    return [native.module().pooled_buffer(count if operators.keeps_tape(sum(floats)) else 0) for count in floats]


def in_place(tensor: Tensor) -> Array:
    """The tensor's own memory: a copy would be read for ever as it was."""
    found = native.array(tensor)
    if found.size and found.ctypes.data != tensor.data_ptr():
        raise ValueError("a tensor that lies so that the C++ code can't take it where it is")
    return found


def _rows(tensor: Tensor) -> Array:
    found = native.rows(tensor)
    if found.size and found.ctypes.data != tensor.data_ptr():
        raise ValueError("a matrix whose rows are not contiguous")
    return found
