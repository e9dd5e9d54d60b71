"""The weights of several nets of the same sizes, as one launch takes them: the first net's, and how far on the next's.

So nets may lie one after another in one tensor, as learners that are trained at once do, or two in tensors of their
own, as the two critics of a learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import Wide

NAMES = ("w1", "init", "w2", "b2", "w3", "b3", "w4", "b4")


@dataclass(frozen=True)
class Members:
    """M three-layer nets: W1 [H, I], init [H] (or a row for each input, [B, H]), W2, b2, W3, b3, W4 [O, H], b4."""

    first: Sequence[Tensor]
    """The eight of the first member. All but W1 are contiguous."""
    apart: Sequence[int]
    """Of each, how many elements after a member's the next one's begins; it may be negative."""
    count: int
    """M."""
    held: Sequence[Tensor] = ()
    """The other members' tensors, where nothing else may hold them: a distance keeps no memory."""

    @classmethod
    def of(cls, members: Sequence[Sequence[Tensor]]) -> Members:
        """Members by eight tensors each. Of one or two they are read in place where they are dense and alike."""
        placed = [_placed(parts, number == 0) for number, parts in enumerate(zip(*members, strict=True))]
        held = [part for member in members[1:] for part in member]
        return cls([part for part, _ in placed], [apart for _, apart in placed], len(members), held)

    @classmethod
    def stacked(cls, weights: Sequence[Tensor]) -> Members:
        """Members by eight tensors with a leading member dimension, of any stride: W1 [M, H, I], init [M, H] ….

        init may be rows, [M, B, H].

        Raises:
            ValueError: a member's part of a tensor is not contiguous (W1's may be any), or members' numbers differ.
        """
        count = len(weights[0])
        for name, part in zip(NAMES, weights, strict=True):
            if len(part) != count:
                raise ValueError(f"{name} of {len(part)} members, and w1 of {count}")
            if name != "w1" and not part[0].is_contiguous():
                raise ValueError(f"a member's {name} is not contiguous: strides {part[0].stride()}")
        if weights[1].ndim == 3 and not weights[1].is_contiguous():
            raise ValueError("the members' rows of init do not follow one another")
        return cls([part[0] for part in weights], [part.stride(0) for part in weights], count)

    @property
    def rows(self) -> bool:
        """Whether init is a row for each input."""
        return self.first[1].ndim == 2

    def arguments(self) -> dict[str, Tensor]:
        """The first member's tensors by the names of a kernel's arguments."""
        return dict(zip(NAMES, self.first, strict=True))

    def distances(self) -> dict[str, int]:
        """`apart` by the names of a kernel's arguments, and W1's strides."""
        found: dict[str, int] = {f"{name}_next": Wide(apart) for name, apart in zip(NAMES, self.apart, strict=True)}
        return found | {"w1_rows": self.first[0].stride(0), "w1_columns": self.first[0].stride(1)}


def _placed(parts: Sequence[Tensor], any_strides: bool) -> tuple[Tensor, int]:
    """The first of these tensors, and the distance to the second; of copies in one tensor where that does not serve."""
    first, *rest = parts
    alike = all(part.stride() == first.stride() for part in rest) and (any_strides or first.is_contiguous())
    if alike and not rest:
        return first, 0
    if alike and len(rest) == 1:
        return first, (rest[0].data_ptr() - first.data_ptr()) // first.element_size()
    together = torch.stack(list(parts))
    return together[0], together.stride(0)
