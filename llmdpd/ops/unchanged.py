"""Whether networks and an optimiser still have the tensors, in the same memory, that something was prepared for."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from llmdpd.ops import native

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_asked = attrgetter("requires_grad")
_HOOKS_OF_TENSORS = (attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks"))


class Unchanged:
    """Sees whether parts, parameters, buffers and an optimiser's state are what and where they were when it was made.

    Args:
        learned: the network whose every parameter the optimiser steps, which computes what its classes say.
        others: networks that are written beside it.
        optimizer: of one group, which has made a step or has its state.
    """

    def __init__(self, learned: nn.Module, others: Sequence[nn.Module], optimizer: torch.optim.AdamW) -> None:
        self._optimizer, self._parameters = optimizer, list(learned.parameters())
        parts = [part for network in (learned, *others) for part in network.modules()]
        self._hooks = [getattr(part, kind) for part in learned.modules() for kind in _HOOKS]
        self._norms = [(part, part.eps) for part in learned.modules() if isinstance(part, nn.LayerNorm)]
        watched: list[tuple[Any, ...]] = [(vars(optimizer), "state", optimizer.state)]
        watched.append((vars(optimizer), "param_groups", optimizer.param_groups))
        for part in parts:
            watched += [(part._modules, name, child) for name, child in part._modules.items()]
            for kept in (part._parameters, part._buffers):
                watched += [_place(kept, name, tensor) for name, tensor in kept.items() if tensor is not None]
        for parameter in self._parameters:
            fields = optimizer.state[parameter]
            watched.append((optimizer.state, parameter, fields))
            watched += [_place(fields, name, tensor) for name, tensor in fields.items()]
        self._watched = tuple(watched)

    def holds(self) -> bool:
        """Whether all of it is, every parameter learns, and nobody has hooks at any of it."""
        (group, *further), parameters = self._optimizer.param_groups, self._parameters
        return (
            bool(native.module().all_in_place(self._watched))
            and not further
            and len(group["params"]) == len(parameters)
            and all(map(is_, group["params"], parameters))
            and all(map(_asked, parameters))
            and not any(self._hooks)
            and not any(hooks for of in _HOOKS_OF_TENSORS for hooks in map(of, parameters))
            and not (self._optimizer._optimizer_step_pre_hooks or self._optimizer._optimizer_step_post_hooks)
            and not (group["amsgrad"] or group["maximize"])
            and all(norm.eps == epsilon for norm, epsilon in self._norms)
        )


def _place(kept: dict[Any, Any], name: str, tensor: Tensor) -> tuple[Any, ...]:
    return kept, name, tensor, tensor.data_ptr(), tensor.stride()
