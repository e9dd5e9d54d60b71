"""Many passes on arrays as one node of autograd's graph, and parameters by name for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmdpd.ops import native
from llmdpd.ops.passes import Array, Arrays

Backward = Callable[[Sequence[Array], dict[str, Array]], None]
"""From the gradients of the results, in order, to those of what was given: written to the arrays of these names."""
Compute = Callable[[Arrays], tuple[list[Array], Backward]]


def node(compute: Compute, given: Mapping[str, Tensor], read: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """What `compute` makes of tensors by name, given to it as arrays; differentiable once in all of them.

    read: tensors without gradient whose memory the pass backward reads too: autograd refuses them once written.
    """
    results: tuple[Tensor, ...] = _Node.apply(compute, tuple(given), tuple(read), *given.values())
    return results


class _Held(np.ndarray[Any, Any]):
    """An array that holds a pass backward.

    As a tensor that autograd has saved, it makes autograd release the pass with all its arrays as it releases any
    tensor: after a backward pass that does not retain the graph, and not only with the last reference to a result.
    """

    backward: Backward


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Compute, names: tuple[str, ...], read: tuple[Tensor, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        held = np.zeros(1, np.float32).view(_Held)
        results, held.backward = compute(dict(zip(names, map(native.array, tensors), strict=True)))
        ctx.names, ctx.held = names, weakref.ref(held)
        ctx.save_for_backward(*tensors, *read, torch.from_numpy(held))
        return tuple(map(torch.from_numpy, results))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # autograd refuses those that were written meanwhile, and a second pass
        gradients = _like(dict(zip(ctx.names, tensors, strict=False)))
        ctx.held().backward([native.array(grad) for grad in grads], dict(gradients))
        return None, None, None, *map(torch.from_numpy, gradients.values())


def _like(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Arrays of these shapes in one stretch of memory, without values."""
    memory = np.empty(sum(map(Tensor.numel, tensors.values())), np.float32)
    arrays, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel()
        arrays[name] = memory[start:end].reshape(tensor.shape)
    return arrays


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
        self._norms = [one for one in inner if isinstance(one, nn.LayerNorm)]

    def current(self) -> bool:
        found: bool = native.module().all_in_place(self._watched)
        return found

    def of(self, names: Iterable[str]) -> dict[str, Tensor] | None:
        """None where one of them is no float32 parameter on the CPU (any more), or a part computes something else."""
        if not self._known or any(self._hooks) or any(norm.eps != _EPSILON for norm in self._norms):
            return None
        found: dict[str, Tensor] = {}
        for name in names:
            place = self._parameters.get(name)
            tensor = None if place is None else place[0].get(place[1])
            if tensor is None or type(tensor) is not nn.Parameter or tensor.dtype is not torch.float32:
                return None
            if not tensor.is_cpu:
                return None
            found[name] = tensor
        return found


_places: weakref.WeakKeyDictionary[nn.Module, _Places] = weakref.WeakKeyDictionary()


def parameters(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor] | None:
    """The module's parameters of these names, as they are now; None where its own code has to compute.

    That is where one of them is no plain float32 parameter on the CPU, a part has hooks or is none that the C++ code
    knows, or hooks take what autograd saves (a checkpoint's), for a pass backward can't be put elsewhere.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    places = _places.get(module)
    if places is None or not places.current():
        places = _places[module] = _Places(module)
    return places.of(names)
