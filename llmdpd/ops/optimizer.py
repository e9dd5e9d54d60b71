"""Optimiser steps and averages of weights over all tensors at once: in C++ on the CPU, else by PyTorch."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from llmdpd.ops import native
from llmdpd.ops.autograd import eager_on_cpu

Arrays = list[NDArray[np.float32]]


class _Memory:
    """Tensors as arrays of the same memory, made once for as long as they stay where they are."""

    def __init__(self) -> None:
        self._pointers: list[tuple[int, int]] = []
        self._arrays: Arrays | None = None

    def of(self, tensors: Sequence[Tensor]) -> Arrays | None:
        """None where the C++ code can't write into one of them."""
        pointers = [(tensor.data_ptr(), tensor.numel()) for tensor in tensors]
        if pointers != self._pointers:
            # The arrays keep their memory from being given to another tensor: the same pointer is the same memory.
            plain = all(map(_plain, tensors))
            self._pointers, self._arrays = pointers, [t.detach().numpy() for t in tensors] if plain else None
        return self._arrays


_kept: weakref.WeakKeyDictionary[Any, defaultdict[str, _Memory]] = weakref.WeakKeyDictionary()


def clipped_step(optimizers: Sequence[torch.optim.Optimizer], limit: float) -> Tensor:
    """One step of each AdamW after its gradients were computed, and the norm of all gradients together.

    limit: what the norm is cut to before the steps (`torch.nn.utils.clip_grad_norm_`); 0: it is left as it is.
    """
    parameters = [p for optimizer in optimizers for p in _parameters(optimizer) if p.grad is not None]
    if not _computes(optimizers, parameters):
        if limit:
            norm = nn.utils.clip_grad_norm_(parameters, limit)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for optimizer in optimizers:
            optimizer.step()
        return norm
    threads = native.threads()
    length = math.sqrt(native.module().sum_of_squares(_gradients(parameters), threads))
    share = limit / (length + 1e-6) if limit else 1.0
    for optimizer in optimizers:
        _step(optimizer, 1.0 if share > 1.0 else share, threads)  # NaN stays
    return torch.tensor(length)


def average(targets: Sequence[Tensor], sources: Sequence[Tensor], rate: float, kept: dict[str, Any]) -> None:
    """target ← target + rate (source - target), of each pair; `kept` belongs to the caller, for these pairs alone."""
    memory: defaultdict[str, _Memory] = kept.setdefault("memory", defaultdict(_Memory))
    to, by = memory["targets"].of(targets), memory["sources"].of(sources)
    if native.available()[0] and to is not None and by is not None and all(map(eager_on_cpu, targets[:1])):
        native.module().average(to, by, rate, native.threads())
        increment_version(list(targets))
    else:
        torch._foreach_lerp_(list(targets), list(sources), rate)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() and native.aligned(tensor)


def _computes(optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor]) -> bool:
    if not native.available()[0] or not all(type(optimizer) is torch.optim.AdamW for optimizer in optimizers):
        return False
    if any(each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in optimizers):
        return False  # torch's own step calls them
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    moments = [
        state[name] for each in optimizers for state in each.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    plain = all(map(_plain, parameters)) and all(map(_plain, moments)) and all(map(eager_on_cpu, parameters[:1]))
    return plain and not any(group["amsgrad"] or group["maximize"] for group in groups)


def _gradients(parameters: Sequence[Tensor]) -> Arrays:
    return [p.grad.contiguous().numpy() for p in parameters if p.grad is not None]


def _step(optimizer: torch.optim.Optimizer, scale: float, threads: int) -> None:
    """As torch's AdamW, with the same state."""
    memory = _kept.setdefault(optimizer, defaultdict(_Memory))
    for number, group in enumerate(optimizer.param_groups):
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if not optimizer.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32), **zeros}
        if not parameters:
            continue
        states = [optimizer.state[p] for p in parameters]
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1)
        # One that had no gradient now and then is behind the others.
        by_count: defaultdict[float, list[int]] = defaultdict(list)
        for place, count in enumerate(torch.stack(counts).tolist()):
            by_count[count].append(place)
        for count, places in by_count.items():
            some, own = [parameters[i] for i in places], [states[i] for i in places]
            kept = memory if len(by_count) == 1 else defaultdict(_Memory)
            native.module().adamw(
                kept[f"weights {number}"].of(some),
                _gradients(some),
                kept[f"means {number}"].of([state["exp_avg"] for state in own]),
                kept[f"squares {number}"].of([state["exp_avg_sq"] for state in own]),
                *(float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], count, scale, threads),
            )
            increment_version(some)  # as every write in place: autograd refuses a gradient by weights of before
