"""Statistics of observations, in one pass over blocks of rows: the same bits in memory and from the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.data.columns import BLOCK, blocks

_Double = NDArray[np.float64]
# What lies beyond these quantiles is left out where that makes the range so many times smaller.
QUANTILE, _OUTLIERS = 1e-3, 20.0


class Blocks(Protocol):
    """Rows [N, S] that come a block [at most `BLOCK`, S] at a time, each time that they are gone through."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


Observations = Tensor | Blocks


class ColumnBlocks:
    """The rows of a data set's column [N, S]."""

    def __init__(self, column: NDArray[np.float32]) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.from_numpy, blocks(self._column))


def in_blocks(observations: Observations) -> Iterator[Tensor]:
    """Rows [N, S], a block at a time."""
    return iter(observations.split(BLOCK) if isinstance(observations, Tensor) else observations)


def extent(observations: Observations) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each number, [S]."""
    parts = [(block.amin(0), block.amax(0)) for block in in_blocks(observations)]
    return torch.stack([low for low, _ in parts]).amin(0), torch.stack([high for _, high in parts]).amax(0)


@dataclass(frozen=True)
class Statistics:
    """Of each number [S]: the least, the greatest, mean and standard deviation (of all N, not N - 1)."""

    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor


def robust_statistics(observations: Observations) -> Statistics:
    """The statistics of rows [N, S], exact up to rounding (moments are summed in float64).

    Where a thousandth of the rows at either end makes a number's range more than 20 times wider, those count as the
    quantile that they lie beyond; the moments then need a second pass. Memory is for 4 N / 1000 rows.
    """
    beyond = int(len(observations) * QUANTILE)
    least, moments, ends = _Least(beyond + 1), _Moments(), _Least(beyond + 1)
    parts = []
    for block in in_blocks(observations):
        rows = block.cpu().numpy()
        parts.append((rows.min(0), rows.max(0)))
        if beyond:
            columns = np.ascontiguousarray(rows.T)
            least.add(columns)
            ends.add(-columns)
        moments.add(rows)
    low, high = np.min([low for low, _ in parts], axis=0), np.max([high for _, high in parts], axis=0)
    if beyond:
        inner_low, inner_high = least.greatest(), -ends.greatest()
        # Rare events of a number that is constant otherwise are no glitches.
        wide = (inner_high > inner_low) & (high - low > _OUTLIERS * (inner_high - inner_low))
        if wide.any():
            low, high = np.where(wide, inner_low, low), np.where(wide, inner_high, high)
            moments = _Moments()
            for block in in_blocks(observations):
                moments.add(block.cpu().numpy().clip(low, high))
    std = np.sqrt(moments.squares / len(observations))
    return Statistics(*(torch.from_numpy(part.astype(low.dtype)) for part in (low, high, moments.mean, std)))


class _Moments:
    """Mean [S] and the sum of squared distances from it [S], of rows that come in blocks."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(()), np.zeros(())

    def add(self, rows: NDArray[np.float32]) -> None:
        own: _Double = rows.astype(np.float64)
        mean = own.mean(0)
        own -= mean
        count, step = self.count + len(own), mean - self.mean
        self.squares = self.squares + np.square(own, out=own).sum(0) + step * step * (self.count * len(own) / count)
        self.mean, self.count = self.mean + step * (len(own) / count), count


class _Least:
    """The `count` least of each number."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pieces: list[list[NDArray[np.float32]]] = []
        self._sizes: list[int] = []
        self._limits: list[float] = []

    def add(self, columns: NDArray[np.float32]) -> None:
        """Take in columns [S, n]."""
        if not self._pieces:
            self._pieces = [[] for _ in columns]
            self._sizes, self._limits = [0] * len(columns), [np.inf] * len(columns)
        for number, column in enumerate(columns):
            piece = column[column < self._limits[number]]
            self._pieces[number].append(piece)
            self._sizes[number] += len(piece)
            if self._sizes[number] > 2 * self._count:  # so that each is moved about once
                kept = self._least(number)[: self._count].copy()
                self._pieces[number], self._sizes[number] = [kept], self._count
                self._limits[number] = float(kept[-1])

    def greatest(self) -> NDArray[np.float32]:
        """The greatest of them [S]; as many rows must have come."""
        return np.array([self._least(number)[self._count - 1] for number in range(len(self._pieces))])

    def _least(self, number: int) -> NDArray[np.float32]:
        """All that are kept of a number, of which the `count`-th stands in its place, the least before it."""
        kept: NDArray[np.float32] = np.concatenate(self._pieces[number])
        kept.partition(self._count - 1)
        return kept
