"""Many layers in C++ as one node of autograd's graph, and parameters by name for it."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmdpd.ops import native
from llmdpd.ops.memory import Memory

Array = NDArray[np.float32]


class Computation(Protocol):
    """A node of the C++ code, with all that it reads."""

    def tape_floats(self) -> int:
        """Numbers that its pass forward keeps for the pass backward."""

    def forward(self, tape: Array, results: list[Array]) -> None:
        """Write the results, and what is kept."""

    def backward(self, tape: Array, grads: list[Array], gradients: Array) -> None:
        """Write, from the gradients of the results, those of all that was given, one after the other."""


Compute = Callable[[list[Array]], tuple[Computation, list[Array]]]


class Weights(dict[str, Tensor]):
    """Parameters by name, and arrays of their memory in the same order."""

    arrays: list[Array]


def node(
    compute: Compute, given: Sequence[Tensor], weights: Weights, read: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """What a computation makes of tensors and weights, in that order; differentiable once in all of them.

    compute: takes arrays of these, and returns the computation and arrays for its results.
    read: tensors without gradient whose memory the pass backward reads too: autograd refuses them once written.
    """
    results: tuple[Tensor, ...] = _Node.apply(compute, tuple(read), weights.arrays, *given, *weights.values())
    return results


class _Held(np.ndarray[Any, Any]):
    """An array that holds a pass backward.

    As a tensor that autograd has saved, it makes autograd release the pass with all its arrays as it releases any
    tensor: after a backward pass that does not retain the graph, and not only with the last reference to a result.
    """

    backward: Callable[[list[Array], Array], None]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Compute, read: tuple[Tensor, ...], weights: list[Array], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        held = np.zeros(1, np.float32).view(_Held)
        given = tensors[: len(tensors) - len(weights)]
        computation, results = compute([*map(native.array, given), *weights])
        tape = native.module().pooled_buffer(computation.tape_floats())
        computation.forward(tape, results)
        held.backward = lambda grads, gradients: computation.backward(tape, grads, gradients)
        ctx.count, ctx.held = len(tensors), weakref.ref(held)
        ctx.save_for_backward(*tensors, *read, torch.from_numpy(held))
        return tuple(map(torch.from_numpy, results))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors[
            : ctx.count
        ]  # autograd refuses those that were written meanwhile, and a second pass
        gradients = torch.empty(sum(map(Tensor.numel, tensors)))
        ctx.held().backward(list(map(native.array, grads)), gradients.numpy())
        return None, None, None, *_unflatten_dense_tensors(gradients, tensors)


_KNOWN = (
    *(nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, nn.ReLU, nn.Mish, nn.Dropout, nn.Sequential),
    *(nn.ModuleList, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention),
)
_EPSILON = 1e-5  # of the norms in C++
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _known(part: nn.Module) -> bool:
    """Whether it computes what its class says, and the class is torch's or the package's own."""
    return (type(part) in _KNOWN or type(part).__module__.startswith("llmdpd.")) and "forward" not in vars(part)


class _Places:
    """Where a module's parameters are found, for as long as its parts are the same objects."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.named_modules())
        self._watched = tuple((one._modules, name, child) for _, one in parts for name, child in one._modules.items())
        self._parameters = {
            f"{prefix}.{name}".lstrip("."): (one._parameters, name) for prefix, one in parts for name in one._parameters
        }
        inner = [one for _, one in parts[1:]]  # the module's own hooks are called around what is computed here
        self._known = all(map(_known, inner))
        self._hooks = tuple(getattr(one, kind) for one in inner for kind in _HOOKS)
        self._memory = defaultdict[tuple[str, ...], Memory](Memory)
        self._norms = [one for one in inner if isinstance(one, nn.LayerNorm)]

    def current(self) -> bool:
        found: bool = native.module().all_in_place(self._watched)
        return found

    def of(self, names: tuple[str, ...]) -> Weights | None:
        """None where one of them is no float32 parameter on the CPU (any more), or a part computes something else."""
        found = self.named(names)
        if found is None or not all(tensor.is_cpu for tensor in found.values()):
            return None
        arrays = self._memory[names].of(list(found.values()))
        found.arrays = list(map(native.array, found.values())) if arrays is None else arrays
        return found

    def named(self, names: tuple[str, ...]) -> Weights | None:
        """The same without arrays, on any device."""
        if not self._known or any(self._hooks) or any(norm.eps != _EPSILON for norm in self._norms):
            return None
        found = Weights()
        for name in names:
            place = self._parameters.get(name)
            tensor = None if place is None else place[0].get(place[1])
            if tensor is None or type(tensor) is not nn.Parameter or tensor.dtype is not torch.float32:
                return None
            found[name] = tensor
        return found


_places: weakref.WeakKeyDictionary[nn.Module, _Places] = weakref.WeakKeyDictionary()


def parameters(module: nn.Module, names: tuple[str, ...]) -> Weights | None:
    """The module's parameters of these names, as they are now; None where its own code has to compute.

    That is where one of them is no plain float32 parameter on the CPU, a part has hooks or is none that the C++ code
    knows, or hooks take what autograd saves (a checkpoint's), for a pass backward can't be put elsewhere.
    """
    places = _places_of(module)
    return None if places is None else places.of(names)


def device_parameters(module: nn.Module, names: tuple[str, ...]) -> list[Tensor] | None:
    """As `parameters`, of any one device."""
    places = _places_of(module)
    found = None if places is None else places.named(names)
    return None if found is None else [*found.values()]


def _places_of(module: nn.Module) -> _Places | None:
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    places = _places.get(module)
    if places is None or not places.current():
        places = _places[module] = _Places(module)
    return places
