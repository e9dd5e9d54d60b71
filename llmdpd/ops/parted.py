"""Optimiser steps and averages of weights, of which each process of a machine takes a part.

The weights, the moments and the averages lie in memory that the processes share (`ranks.share_memory`), so that nothing
has to be gathered. Each one adds up, steps and averages its own part: of the numbers of all tensors, one after the
other, an equal stretch. Where the processes can't, on several machines or without the C++ code, all take whole steps.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from llmdpd.errors import InputError
from llmdpd.ops import native, optimizer
from llmdpd.ops.memory import Arrays
from llmdpd.ops.optimizer import MOMENTS, Part
from llmdpd.utils import ranks, sharding
from llmdpd.utils.shared_memory import ALIGNED, Array


class _Piece(NamedTuple):
    """The numbers from `begin` to `end` of a tensor, of which `place` is that in a list."""

    place: int
    begin: int
    end: int

    def of(self, arrays: Arrays) -> Array:
        return arrays[self.place].reshape(-1)[self.begin : self.end]


def _shares(arrays: Arrays, count: int) -> list[list[_Piece]]:
    """What each of `count` processes has of the numbers of all arrays together, in whole lines of them."""
    begins = np.cumsum([0, *(array.size for array in arrays)])
    lines = -(-int(begins[-1]) // ALIGNED)
    shares = []
    for number in range(count):
        first, last = (lines * n // count * ALIGNED for n in (number, number + 1))
        cuts = [(max(first - begin, 0), min(last - begin, array.size)) for begin, array in zip(begins, arrays)]  # noqa: B905
        shares.append([_Piece(place, int(b), int(e)) for place, (b, e) in enumerate(cuts) if b < e])
    return shares


class _Written:
    """Sees whether tensors that processes share were written since this was made or last noted."""

    _all: ClassVar[weakref.WeakSet[_Written]] = weakref.WeakSet()

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self.note()
        self._all.add(self)

    def note(self) -> None:
        """They are as they have to be."""
        self._versions = [tensor._version for tensor in self._tensors]

    def check(self) -> None:
        """Raise `InputError` where something else has written to one: each process did, to the same memory."""
        versions = [tensor._version for tensor in self._tensors]
        if versions == self._versions:
            return
        noted = {(id(t), v) for each in self._all for t, v in zip(each._tensors, each._versions, strict=True)}
        if not noted.issuperset(zip(map(id, self._tensors), versions, strict=True)):
            raise InputError(
                "weights that processes share were written in place",
                field="method",
                found="a write beside `Method.step` and `Method.track`",
                expected="none after the first step: each process would do it to the same memory",
                hint="write to a copy, or train by one process",
            )


class _Sum:
    """Sums of gradients over the processes, of arrays of certain sizes."""

    def __init__(self, arrays: Arrays) -> None:
        self.own = ranks.rank()
        self.shares = _shares(arrays, ranks.count())
        rows = ranks.shared_rows(ranks.count() * sum(array.size for array in arrays))
        assert rows is not None, "asked for before"
        self._rows: list[list[Array]] = []  # of every reader's share, that of each writer
        begin = 0
        for share in self.shares:
            size = sum(piece.end - piece.begin for piece in share)
            self._rows.append([rows[begin + writer * size :][:size] for writer in range(ranks.count())])
            begin += ranks.count() * size
        self._others = [row for writer, row in enumerate(self._rows[self.own]) if writer != self.own]

    def pieces(self, gradients: Arrays) -> list[Arrays]:
        """The gradients in pieces, of each process's share."""
        return [[piece.of(gradients) for piece in share] for share in self.shares]

    def add_up(self, pieces: list[Arrays]) -> float:
        """Let the own pieces be the sums over the processes; the root of the sum of all pieces' squares."""
        for reader, share in enumerate(pieces):
            if reader != self.own and share:
                np.concatenate(share, out=self._rows[reader][self.own])
        ranks.meet()
        return math.sqrt(ranks.total(native.module().add_up(pieces[self.own], self._others, native.threads())))


class _Step:
    """How the weights of optimisers are stepped, for as long as their arrays are the same ones."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._arrays = _arrays(parts)
        self.sum = _Sum(list(chain(*(part.weights for part in parts))))
        self.written = _Written([p for part in parts for p in part.parameters])
        self.groups: list[list[_Piece]] = []
        """The own pieces of each group's tensors."""
        first = 0
        for part in parts:
            places = range(first, first := first + len(part.weights))
            own = [piece for piece in self.sum.shares[self.sum.own] if piece.place in places]
            self.groups.append([piece._replace(place=piece.place - places[0]) for piece in own])
        self.lists = [
            tuple([piece.of(arrays) for piece in pieces] for arrays in (part.weights, part.means, part.squares))
            for part, pieces in zip(parts, self.groups, strict=True)
        ]
        """Weights, means and squares of those."""

    def fits(self, parts: Sequence[Part]) -> bool:
        """Whether these are the arrays."""
        arrays = _arrays(parts)
        return len(arrays) == len(self._arrays) and all(a is b for a, b in zip(arrays, self._arrays, strict=True))


def _arrays(parts: Sequence[Part]) -> list[Arrays]:
    return [arrays for part in parts for arrays in (part.weights, part.means, part.squares)]


_steps: weakref.WeakKeyDictionary[Any, _Step] = weakref.WeakKeyDictionary()  # by the first of the optimisers


def clipped_step(optimizers: Sequence[torch.optim.Optimizer], limit: float) -> Tensor:
    """As `llmdpd.ops.optimizer.clipped_step`, down the sum of the gradients of the processes that share a batch.

    No gradient is left where each process has taken a part of the step: it would be that of a part.

    Raises:
        InputError: processes have other weights; or something else has written to weights that they share.
    """
    if not sharding.is_shared():
        refuse_alone(p for each in optimizers for group in each.param_groups for p in group["params"])
        return optimizer.clipped_step(optimizers, limit)
    parts = _parts(optimizers)
    if parts is None:
        parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        _refuse_shared(parameters)
        sharding.add_gradients(parameters)
        return optimizer.clipped_step(optimizers, limit)
    step = _steps[optimizers[0]]
    step.written.check()
    pieces = step.sum.pieces(list(chain(*(part.gradients for part in parts))))
    length = step.sum.add_up(pieces)
    gradients, scale = pieces[step.sum.own], _scale(length, limit)
    for part, group, lists in zip(parts, step.groups, step.lists, strict=True):
        counts = optimizer.counted(part)
        own, gradients = gradients[: len(group)], gradients[len(group) :]
        weights, means, squared = lists
        of_pieces = [counts[piece.place] for piece in group]
        optimizer.stepped(part.group, (weights, own, means, squared), of_pieces, scale, native.threads())
        for parameter in part.parameters:
            parameter.grad = None
    step.written.note()
    ranks.meet()
    return torch.tensor(length)


def average(targets: Sequence[Tensor], sources: Sequence[Tensor], rate: float, kept: dict[str, Any]) -> None:
    """As `llmdpd.ops.optimizer.average`.

    Raises:
        InputError: see `clipped_step`.
    """
    if not sharding.is_shared():
        refuse_alone(targets)
        optimizer.average(targets, sources, rate, kept)
        return
    known, arrays = kept.get("own"), optimizer.averaged(targets, sources, kept)
    if known is None or arrays is None or any(a is not b for a, b in zip(known[0], arrays, strict=True)):
        if arrays is None or not ranks.share_memory("averages of weights", targets):
            _refuse_shared(targets)
            optimizer.average(targets, sources, rate, kept)
            return
        arrays = optimizer.averaged(targets, sources, kept)
        assert arrays is not None, "they were arrays before"
        own = _shares(arrays[0], ranks.count())[ranks.rank()]
        pieces = tuple([piece.of(each) for piece in own] for each in arrays)
        known = kept["own"] = arrays, pieces, _Written(targets)
    _, pieces, written = known
    written.check()
    ranks.meet()  # before that one may still read them
    native.module().average(*pieces, rate, native.threads())
    increment_version(list(targets))
    written.note()
    ranks.meet()


def _parts(optimizers: Sequence[torch.optim.Optimizer]) -> list[Part] | None:
    """What is stepped, in memory that the processes share, as `_steps` has it; None where they can't."""
    parts = optimizer.steppable(optimizers)
    if parts is None:
        return None
    known = _steps.get(optimizers[0])
    if known is not None and known.fits(parts):
        return parts
    moments = [each.state[p][name] for each, p in _stepped(optimizers) for name in MOMENTS]
    total = sum(array.size for part in parts for array in part.weights)
    if ranks.shared_rows(ranks.count() * total) is None:
        return None
    if not ranks.share_memory("weights", [*(p for part in parts for p in part.parameters), *moments]):
        return None
    parts = optimizer.steppable(optimizers)
    assert parts is not None, "they were so before"
    _steps[optimizers[0]] = _Step(parts)
    return parts


def _stepped(optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[torch.optim.Optimizer, Tensor]]:
    return [(e, p) for e in optimizers for group in e.param_groups for p in group["params"] if p.grad is not None]


def _scale(length: float, limit: float) -> float:
    """What gradients of this norm are multiplied by."""
    share = limit / (length + 1e-6) if limit else 1.0
    return 1.0 if share > 1.0 else share  # NaN stays


def steps_by_parts(stepped: torch.optim.Optimizer) -> bool:
    """Whether the optimiser, of one group, has been stepped by parts, and all that it steps lies in shared memory."""
    if stepped not in _steps:
        return False
    moments = [stepped.state[p].get(name) for p in _parameters(stepped) for name in MOMENTS]
    tensors = [*_parameters(stepped), *(moment for moment in moments if moment is not None)]
    return len(tensors) == 3 * len(_parameters(stepped)) and ranks.shares_all_memory(tensors)


class PreparedStep:
    """As `clipped_step`, of an optimiser that `steps_by_parts`, all of whose tensors stay where they are.

    Args:
        stepped: the optimiser, of one group.
        gradients: of all its parameters; they stay where they are, too.
        limit: see `clipped_step`.
    """

    def __init__(self, stepped: torch.optim.Optimizer, gradients: Sequence[Tensor], limit: float) -> None:
        self._optimizer, self._limit = stepped, limit
        self._group, self._parameters = stepped.param_groups[0], _parameters(stepped)
        weights = [native.array(parameter) for parameter in self._parameters]
        means, squares = (
            [native.array(stepped.state[parameter][name]) for parameter in self._parameters] for name in MOMENTS
        )
        self._sum = _Sum(weights)
        self._gradients = self._sum.pieces([native.array(gradient) for gradient in gradients])
        own = self._sum.shares[self._sum.own]
        of_weights, of_means, of_squares = ([piece.of(arrays) for piece in own] for arrays in (weights, means, squares))
        self._lists = of_weights, self._gradients[self._sum.own], of_means, of_squares

    def run(self) -> Tensor:
        """Step with gradients that were written, when the step has been counted; their norm."""
        written, count = _steps[self._optimizer].written, float(self._optimizer.state[self._parameters[0]]["step"])
        written.check()
        length = self._sum.add_up(self._gradients)
        counts = [count] * len(self._lists[0])
        optimizer.stepped(self._group, self._lists, counts, _scale(length, self._limit), native.threads())
        increment_version(self._parameters)
        written.note()
        ranks.meet()
        return torch.tensor(length)


def _parameters(stepped: torch.optim.Optimizer) -> list[Tensor]:
    return list(stepped.param_groups[0]["params"])


def refuse_alone(tensors: Iterable[Tensor]) -> None:
    """Hold that none of them is memory of all processes, where this one steps them alone.

    Raises:
        InputError: one is; every process would take the step, in the same memory.
    """
    if ranks.shared_memory_once(tensors):
        raise InputError(
            "weights that processes share can't be stepped by one alone",
            field="method",
            found="a step while the processes share no batch",
            expected="one as part of the run that they are joined in",
            hint="load the weights anew, from a checkpoint or a policy",
        )


def _refuse_shared(tensors: Sequence[Tensor]) -> None:
    """Hold that none of them is memory of all processes, where each takes the whole step."""
    if ranks.shares_memory(tensors):
        raise InputError(
            "weights that processes share can't be stepped by parts any more",
            field="method",
            found="an optimiser's step or its tensors have changed",
            expected="AdamW without hooks, as at the first step",
        )
