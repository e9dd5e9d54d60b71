"""Many passes on arrays as one node of autograd's graph, and parameters by name for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmdpd.ops import native
from llmdpd.ops.passes import Array, Arrays

Backward = Callable[[Sequence[Array], dict[str, Array]], None]
"""From the gradients of the results, in order, to those of what was given: written to the arrays of these names."""
Compute = Callable[[Arrays], tuple[list[Array], Backward]]


def node(compute: Compute, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What `compute` makes of tensors by name, given to it as arrays; differentiable once in all of them."""
    results: tuple[Tensor, ...] = _Node.apply(compute, tuple(given), *given.values())
    return results


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        results, ctx.passes = compute(dict(zip(names, map(native.array, tensors), strict=True)))
        ctx.names = names
        ctx.save_for_backward(*tensors)
        return tuple(map(torch.from_numpy, results))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # autograd refuses weights that were written meanwhile
        gradients = _like(dict(zip(ctx.names, tensors, strict=True)))
        ctx.passes([native.array(grad) for grad in grads], dict(gradients))
        return None, None, *map(torch.from_numpy, gradients.values())


def _like(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Arrays of these shapes in one stretch of memory, without values."""
    memory = np.empty(sum(map(Tensor.numel, tensors.values())), np.float32)
    arrays, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel()
        arrays[name] = memory[start:end].reshape(tensor.shape)
    return arrays


class _Places:
    """Where a module's parameters are found, for as long as its parts are the same objects."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.named_modules())
        self._watched = tuple((one._modules, name, child) for _, one in parts for name, child in one._modules.items())
        self._parameters = {
            f"{prefix}.{name}".lstrip("."): (one._parameters, name) for prefix, one in parts for name in one._parameters
        }

    def current(self) -> bool:
        found: bool = native.module().all_in_place(self._watched)
        return found

    def of(self, names: Iterable[str]) -> dict[str, Tensor] | None:
        """None where one of them is no parameter (any more), as that of a layer which computes its weight."""
        found: dict[str, Tensor] = {}
        for name in names:
            place = self._parameters.get(name)
            tensor = None if place is None else place[0].get(place[1])
            if tensor is None or type(tensor) is not nn.Parameter:
                return None
            found[name] = tensor
        return found


_places: weakref.WeakKeyDictionary[nn.Module, _Places] = weakref.WeakKeyDictionary()


def parameters(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor] | None:
    """The module's parameters of these names, as they are now; None where one of them is no plain parameter."""
    places = _places.get(module)
    if places is None or not places.current():
        places = _places[module] = _Places(module)
    return places.of(names)
