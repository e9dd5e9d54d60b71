"""Optimiser steps and averages of weights over all tensors at once: in C++ on the CPU, else by PyTorch."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from llmdpd.ops import native
from llmdpd.ops.autograd import eager_on_cpu
from llmdpd.ops.memory import Arrays, Memory

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter beside the number of its steps: the means of gradients and of their squares."""


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """AdamW's state of a parameter, zeros where it has made no step."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
    return state


class Part(NamedTuple):
    """What one parameter group steps: its parameters that have a gradient, and arrays of theirs in the same order."""

    group: dict[str, Any]
    parameters: list[Tensor]
    weights: Arrays
    gradients: Arrays
    means: Arrays
    squares: Arrays
    counts: Arrays


_kept: weakref.WeakKeyDictionary[Any, defaultdict[str, Memory]] = weakref.WeakKeyDictionary()


def clipped_step(optimizers: Sequence[torch.optim.Optimizer], limit: float) -> Tensor:
    """One step of each AdamW after its gradients were computed, and the norm of all gradients together.

    limit: what the norm is cut to before the steps (`torch.nn.utils.clip_grad_norm_`); 0: it is left as it is.
    """
    parts = steppable(optimizers)
    if parts is None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if limit:
            norm = nn.utils.clip_grad_norm_(parameters, limit)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for optimizer in optimizers:
            optimizer.step()
        return norm
    threads = native.threads()
    gradients = [gradient for part in parts for gradient in part.gradients]
    length = math.sqrt(native.module().sum_of_squares(gradients, threads))
    share = limit / (length + 1e-6) if limit else 1.0
    for part in parts:
        _step(part, 1.0 if share > 1.0 else share, threads)  # NaN stays
    return torch.tensor(length)


def average(targets: Sequence[Tensor], sources: Sequence[Tensor], rate: float, kept: dict[str, Any]) -> None:
    """target ← target + rate (source - target), of each pair; `kept` belongs to the caller, for these pairs alone."""
    arrays = averaged(targets, sources, kept)
    if arrays is None:
        torch._foreach_lerp_(list(targets), list(sources), rate)
    else:
        native.module().average(*arrays, rate, native.threads())
        increment_version(list(targets))


def averaged(
    targets: Sequence[Tensor], sources: Sequence[Tensor], kept: dict[str, Any]
) -> tuple[Arrays, Arrays] | None:
    """Arrays of both for the C++ code; None where it can't take them. `kept`: see `average`."""
    memory: defaultdict[str, Memory] = kept.setdefault("memory", defaultdict(Memory))
    to, by = memory["targets"].of(targets), memory["sources"].of(sources)
    if not native.available()[0] or to is None or by is None or not all(map(eager_on_cpu, targets[:1])):
        return None
    return to, by


def steppable(optimizers: Sequence[torch.optim.Optimizer]) -> list[Part] | None:
    """What the C++ code steps; None where it can't: by torch's own step then, which calls hooks too."""
    if not native.available()[0] or not all(type(optimizer) is torch.optim.AdamW for optimizer in optimizers):
        return None
    if any(each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in optimizers):
        return None
    parts = [
        _part(optimizer, group, str(number))
        for optimizer in optimizers
        for number, group in enumerate(optimizer.param_groups)
    ]
    some = [part for part in parts if part is not None]
    return some if len(some) == len(parts) else None


def _part(optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str) -> Part | None:
    memory = _kept.setdefault(optimizer, defaultdict(Memory))
    parameters = [p for p in group["params"] if p.grad is not None]
    weights = memory[f"weights {name}"].of(parameters)
    if weights is None or group["amsgrad"] or group["maximize"] or not all(map(eager_on_cpu, parameters[:1])):
        return None
    states = [state_of(optimizer, p) for p in parameters]
    means, squares, counts = (
        memory[f"{key} {name}"].of([state[key] for state in states]) for key in (*MOMENTS, "step")
    )
    if means is None or squares is None or counts is None:
        return None
    gradients = [p.grad.contiguous().numpy() for p in parameters]
    return Part(group, parameters, weights, gradients, means, squares, counts)


def _step(part: Part, scale: float, threads: int) -> None:
    """As torch's AdamW, with the same state."""
    lists = (part.weights, part.gradients, part.means, part.squares)
    stepped(part.group, lists, counted(part), scale, threads)


def counted(part: Part) -> list[float]:
    """Count a step of every parameter, in the optimiser's state and for autograd; the counts."""
    for count in part.counts:
        count += 1  # in place
    if part.parameters:
        increment_version(part.parameters)  # as every write in place: autograd refuses a gradient by weights of before
    return list(map(float, part.counts))


def stepped(
    group: dict[str, Any], lists: tuple[Arrays, ...], counts: Sequence[float], scale: float, threads: int
) -> None:
    """Step weights by gradients, means and squares, four lists of as many arrays as there are counts of steps."""
    by_count = defaultdict[float, list[int]](list)
    for place, count in enumerate(counts):
        by_count[count].append(place)  # one that had no gradient now and then is behind the others
    for done, places in by_count.items():
        some = lists if len(by_count) == 1 else tuple([arrays[place] for place in places] for arrays in lists)
        native.module().adamw(
            *some,
            *(float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], done, scale, threads),
        )
