"""Whether networks and optimisers still have the tensors, in the same memory, that something was prepared for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from llmdpd.ops import native

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_asked = attrgetter("requires_grad")
_HOOKS_OF_TENSORS = (attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks"))


def hooks_of(parts: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """Where the hooks of these modules are kept, one dictionary a kind; empty ones where there are none."""
    return [getattr(part, kind) for part in parts for kind in _HOOKS]


def places(module: nn.Module, seen: Callable[[Tensor], bool]) -> list[tuple[Any, ...]] | None:
    """What must stay in place of a module, for `_native.all_in_place`; None where a change would not be seen.

    seen: whether one of a parameter or buffer would be.

    Tuples (dict, name, module), and (dict, name, tensor, pointer, strides) for parameters and buffers; (dict, name,
    None) where one is absent.
    """
    found: list[tuple[Any, ...]] = []
    for part in module.modules():
        found += [(part._modules, name, child) for name, child in part._modules.items()]
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                if tensor is not None and not seen(tensor):
                    return None
                found.append((kept, name, None) if tensor is None else (*_place(kept, name, tensor), tensor.stride()))
    return found


def has_version(tensor: Tensor) -> bool:
    """Whether autograd counts the writes to a tensor."""
    return not tensor.is_inference()


class Unwritten:
    """Sees, by place and by autograd's counter of writes, whether weights are what they were when it was made.

    Args:
        modules: those that have them. watched: their `places`; None where a change would not be seen.
    """

    def __init__(self, modules: Sequence[nn.Module], watched: Sequence[tuple[Any, ...]] | None) -> None:
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self._watched = None if watched is None else tuple(watched)
        self._tensors = [*self.parameters, *(buffer for module in modules for buffer in module.buffers())]
        self._versions = [] if watched is None else [tensor._version for tensor in self._tensors]

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Unwritten:
        """Of all weights of these modules; without the C++ module, which looks at their places, none lasts."""
        if not native.available()[0]:
            return cls(modules, None)
        found = [places(module, has_version) for module in modules]
        known = [part for part in found if part is not None]
        return cls(modules, [*chain(*known)] if len(known) == len(found) else None)

    @property
    def lasting(self) -> bool:
        """Whether a change can be seen; if not, what was made of the weights must not be kept."""
        return self._watched is not None

    def unchanged(self) -> bool:
        return (
            self._watched is not None
            and [tensor._version for tensor in self._tensors] == self._versions
            and bool(native.module().all_in_place(self._watched))
        )


class Unchanged:
    """Sees whether parts, parameters, buffers and optimisers' states are what and where they were when it was made.

    Args:
        learned: networks with the optimisers that step their every parameter, of one group each, whose state is there.
            They compute what their classes say.
        others: networks that are written beside them.
    """

    def __init__(self, learned: Sequence[tuple[nn.Module, torch.optim.Optimizer]], others: Sequence[nn.Module]) -> None:
        self._learned = [(optimizer, list(network.parameters())) for network, optimizer in learned]
        self._parameters = [*chain(*(parameters for _, parameters in self._learned))]
        parts = [part for network, _ in learned for part in network.modules()]
        self._hooks = hooks_of(parts)
        self._norms = [(part, part.eps) for part in parts if isinstance(part, nn.LayerNorm)]
        watched: list[tuple[Any, ...]] = []
        for part in [*parts, *chain(*(network.modules() for network in others))]:
            watched += [(part._modules, name, child) for name, child in part._modules.items()]
            for kept in (part._parameters, part._buffers):
                watched += [(*_place(kept, n, t), t.stride()) for n, t in kept.items() if t is not None]
        for optimizer, parameters in self._learned:
            watched += [(vars(optimizer), name, vars(optimizer)[name]) for name in ("state", "param_groups")]
            for parameter in parameters:
                fields = optimizer.state[parameter]
                watched.append((optimizer.state, parameter, fields))
                watched += [_place(fields, name, tensor) for name, tensor in fields.items()]
        self._watched = tuple(watched)

    def holds(self) -> bool:
        """Whether all of it is, every parameter learns, and nobody has hooks at any of it."""
        return (
            bool(native.module().all_in_place(self._watched))
            and all(_steps_alike(optimizer, parameters) for optimizer, parameters in self._learned)
            and all(map(_asked, self._parameters))
            and not any(self._hooks)
            and not any(hooks for of in _HOOKS_OF_TENSORS for hooks in map(of, self._parameters))
            and all(norm.eps == epsilon for norm, epsilon in self._norms)
        )


def _steps_alike(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether it, an AdamW, steps these parameters as a group and as it does by default, and calls nobody."""
    group, *further = optimizer.param_groups
    return (
        not further
        and len(group["params"]) == len(parameters)
        and all(map(is_, group["params"], parameters))
        and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        and not (group["amsgrad"] or group["maximize"])
    )


def _place(kept: dict[Any, Any], name: str, tensor: Tensor) -> tuple[Any, ...]:
    return kept, name, tensor, tensor.data_ptr()


def same_objects(found: Sequence[object], before: Sequence[object]) -> bool:
    """Whether these are the very objects of before, in the same order."""
    return len(found) == len(before) and all(map(is_, found, before))
