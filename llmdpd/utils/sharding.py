"""A batch that the processes of a run share: each one's rows, random numbers, means and gradients.

The batch and every random number are those of one process: each draws for the whole batch and keeps what belongs to its
own rows. Gradients are summed over the processes, and so is what a loss has of the whole batch, such as a mean that
scales it. So the number of processes changes nothing but rounding.

While no share is `active` all of this is what torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from llmdpd.errors import InputError
from llmdpd.utils import ranks

_aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """Which of `whole` rows a process has: their places, int64 [n]."""

    whole: int
    own: Tensor

    def of(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The own rows of a tensor, of which dimension `dim` is those of the whole batch, or several such blocks."""
        blocks = whole.unflatten(dim, (-1, self.whole))
        return blocks.index_select(dim + 1, self.own.to(whole.device)).flatten(dim, dim + 1)

    def whole_shape(self, shape: Sequence[int], dim: int = 0) -> tuple[int, ...]:
        """The shape for the whole batch of what has this one for the own rows."""
        # Without rows of its own a process draws all the same, so that its generator stays where the others' are.
        blocks, rest = divmod(shape[dim], len(self.own)) if len(self.own) else (1, 0)
        assert rest == 0, (tuple(shape), dim, len(self.own))
        return (*shape[:dim], blocks * self.whole, *shape[dim + 1 :])


@dataclass(frozen=True)
class Share:
    """A process's share of batches of B transitions in P equal groups, one a prompt.

    Where the number of processes divides P each has whole prompts; where P divides it, a part of one; else a part of
    each of some.
    """

    rows: Rows
    prompts: Rows


def share_of(rank: int, count: int, batch_size: int, prompts: int) -> Share:
    """The share of process `rank` of `count`.

    Raises:
        InputError: the batch can't be shared out evenly.
    """
    groups = math.gcd(count, prompts)
    parts, size = count // groups, batch_size // prompts
    if size % parts:
        least = prompts * parts
        raise InputError(
            "the batch cannot be shared out evenly among the processes",
            field="method.batch_size",
            found=f"{batch_size} under {prompts} prompts, for {count} processes",
            expected=f"a multiple of {least}",
            hint=f"for example --method.batch-size {max(round(batch_size / least), 1) * least}, or other processes",
        )
    group, part = divmod(rank, parts)
    own = torch.arange(prompts).view(groups, -1)[group]
    rows = torch.arange(batch_size).view(prompts, parts, -1)[own, part].flatten()
    return Share(Rows(batch_size, rows), Rows(prompts, own))


_share: Share | None = None
_rows: Rows | None = None


@contextmanager
def active(share: Share) -> Iterator[None]:
    """While the block runs, batches are this process's share, and random numbers are drawn by its rows."""
    global _share
    before, _share = _share, share
    try:
        with _drawing_by(share.rows):
            yield
    finally:
        _share = before


@contextmanager
def by_prompt() -> Iterator[None]:
    """While the block runs, random numbers are drawn by the share's prompts, not by its transitions."""
    with _drawing_by(None if _share is None else _share.prompts):
        yield


@contextmanager
def by_transition() -> Iterator[None]:
    """While the block runs, random numbers are drawn by the share's transitions again."""
    with _drawing_by(None if _share is None else _share.rows):
        yield


@contextmanager
def alike() -> Iterator[None]:
    """While the block runs, every process draws the same random numbers."""
    with _drawing_by(None):
        yield


@contextmanager
def among(selected: Tensor) -> Iterator[Tensor]:
    """Gives the places, within the own rows, of those rows of the batch where `selected` [B] holds (B of the whole).

    While the block runs, random numbers are drawn for these rows.
    """
    if _share is None:
        yield selected.nonzero()[:, 0]
        return
    numbers = selected.long().cumsum(0) - 1
    own = _share.rows.own.to(selected.device)
    places = selected[own].nonzero()[:, 0]
    with _drawing_by(Rows(int(selected.sum()), numbers[own[places]])):
        yield places


@contextmanager
def _drawing_by(rows: Rows | None) -> Iterator[None]:
    global _rows
    before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = before


def is_shared() -> bool:
    """Whether batches are a process's share."""
    return _share is not None


def whole_batch(own: int) -> int:
    """The rows of the whole batch, of which `own` are here."""
    return own if _share is None else _share.rows.whole


def own_rows(count: int, device: torch.device) -> Tensor:
    """The places in the whole batch, int64 [count], of the `count` rows that are here."""
    return torch.arange(count, device=device) if _share is None else _share.rows.own.to(device)


def here(places: Tensor, count: int) -> Tensor:
    """Those of these places in the whole batch that are here, as places among the `count` own rows."""
    if _share is None:
        return places
    numbers = torch.full((_share.rows.whole,), -1, dtype=torch.int64, device=places.device)
    numbers[own_rows(count, places.device)] = torch.arange(count, device=places.device)
    found = numbers[places]
    return found[found >= 0]


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int], dim: int = 0) -> Tensor:
    """Random numbers of this shape by `draw`, whose dimension `dim` is the own rows, or several blocks of them."""
    if _rows is None:
        return draw(tuple(shape))
    return _rows.of(draw(_rows.whole_shape(shape, dim)), dim)


def randn(shape: Sequence[int], device: torch.device, dim: int = 0) -> Tensor:
    """As `torch.randn`: see `drawn`."""
    return drawn(lambda whole: torch.randn(whole, device=device), shape, dim)


def rand(shape: Sequence[int], device: torch.device, dim: int = 0) -> Tensor:
    """As `torch.rand`: see `drawn`."""
    return drawn(lambda whole: torch.rand(whole, device=device), shape, dim)


def randint(high: int, shape: Sequence[int], device: torch.device, dim: int = 0) -> Tensor:
    """As `torch.randint` from 0: see `drawn`."""
    return drawn(lambda whole: torch.randint(high, whole, device=device), shape, dim)


def mean(value: Tensor) -> Tensor:
    """The mean over the processes of a number, or of several, without gradient.

    Of means over the own rows it is the mean over the batch; a sum over the own rows by the mean of such sums' weights
    is what each process adds to a weighted mean.
    """
    return value if _share is None else ranks.mean(value.detach().float())


def means(values: Sequence[Tensor]) -> list[Tensor]:
    """The means over the processes of tensors, whose gradient goes to every process's own."""
    if _share is None:
        return list(values)
    together: Tensor = _Mean.apply(torch.cat([value.flatten() for value in values]))
    parts = together.split([value.numel() for value in values])
    return [part.view_as(value) for part, value in zip(parts, values, strict=True)]


class _Mean(torch.autograd.Function):
    """The mean over the processes. The loss of all is the mean of theirs, so that the gradient's is its mean, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return ranks.mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ranks.mean(gradient)


def own_mean(values: Tensor, whole: int, dim: int = -1) -> Tensor:
    """Of the mean over `whole` chosen rows what those that are here bring into it: a loss, as each process has one."""
    return values.sum(dim) / (whole if _share is None else whole / ranks.count())


def gathered(values: Tensor) -> Tensor:
    """Numbers [B] of the whole batch from those of the own rows, without gradient."""
    if _share is None:
        return values
    whole = values.new_zeros(_share.rows.whole)
    whole[_share.rows.own.to(values.device)] = values.detach()
    ranks.add_up(whole)
    return whole


def backward(loss: Tensor) -> None:
    """As `loss.backward()`, of a mean over the own rows: see `add_gradients`."""
    (loss if _share is None else loss / ranks.count()).backward()


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their sums over the processes: after `backward`, those of the whole batch's mean."""
    if _share is None:
        return
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    together = torch.cat([parameter.grad.flatten() for parameter in learning if parameter.grad is not None])
    ranks.add_up(together)
    for parameter, part in zip(learning, together.split([p.numel() for p in learning]), strict=True):
        parameter.grad = part.view_as(parameter)


@contextmanager
def dropout() -> Iterator[None]:
    """While the block runs, torch's modules draw their dropout by the rows of the share."""
    with ExitStack() as modes:
        if _rows is not None:
            modes.enter_context(_Dropout(_rows))
            modes.enter_context(sdpa_kernel(SDPBackend.MATH))  # others draw within one kernel
        yield


class _Dropout(TorchDispatchMode):
    """Draws the masks of dropout for the whole batch, and keeps those of the own rows."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self._of = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _aten.bernoulli_.float:
            return args[0].copy_(self._of.of(self._whole(args[0]).bernoulli_(*args[1:], **(kwargs or {}))))
        if func is _aten.native_dropout.default and args[2]:
            scaled, kept = (self._of.of(part) for part in func(self._whole(args[0]).fill_(1), *args[1:]))
            return args[0] * scaled, kept
        return func(*args, **(kwargs or {}))

    def _whole(self, like: Tensor) -> Tensor:
        """Memory for the whole batch in the order of `like`, in which a mask would be drawn."""
        order = sorted(range(like.dim()), key=lambda d: (like.stride(d), like.shape[d]), reverse=True)
        return torch.empty_permuted(self._of.whole_shape(like.shape), order, dtype=like.dtype, device=like.device)
