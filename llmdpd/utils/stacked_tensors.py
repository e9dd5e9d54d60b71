"""Tensors of several learners stacked in one, so that one launch reads or writes those of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNED = 4  # numbers, 16 bytes: where each parameter begins


class StackedTensors:
    """Room for L learners' tensors of the same shapes, float32 [L, P].

    Args:
        learners: of each its tensors, in the same order; copied.
    """

    def __init__(self, learners: Sequence[Sequence[Tensor]]) -> None:
        self.shapes = [tensor.shape for tensor in learners[0]]
        sizes = [-(-shape.numel() // _ALIGNED) * _ALIGNED for shape in self.shapes]
        self._begins = [sum(sizes[:number]) for number in range(len(sizes))]
        self.flat = torch.zeros(len(learners), sum(sizes), dtype=torch.float32, device=learners[0][0].device)
        self.views = [self._view(number) for number in range(len(sizes))]
        for row, tensors in enumerate(learners):
            for view, tensor in zip(self.views, tensors, strict=True):
                view[row] = tensor.detach()

    def _view(self, number: int) -> Tensor:
        begin, shape = self._begins[number], self.shapes[number]
        return self.flat[:, begin : begin + shape.numel()].view(-1, *shape)

    def like(self) -> StackedTensors:
        """Room of the same form, zeros."""
        other = object.__new__(StackedTensors)
        other.shapes, other._begins, other.flat = self.shapes, self._begins, torch.zeros_like(self.flat)
        other.views = [other._view(number) for number in range(len(self.shapes))]
        return other

    def holds(self, learners: Sequence[Sequence[Tensor]]) -> bool:
        """Whether these are the learners' tensors: views of this one, each in its place."""
        begin, learner = self.flat.data_ptr(), self.flat.shape[1]
        return all(
            tensor.data_ptr() == begin + self.flat.itemsize * (row * learner + place)
            for row, tensors in enumerate(learners)
            for place, tensor in zip(self._begins, tensors, strict=True)
        )

    def halves(self) -> list[Tensor]:
        """The tensors [2 L, …], where each learner has two of everything, one set after the other."""
        count = len(self.shapes) // 2
        flat = self.flat.view(2 * len(self.flat), -1)
        parts = zip(self._begins[:count], self.shapes[:count], strict=True)
        return [flat[:, begin : begin + shape.numel()].view(-1, *shape) for begin, shape in parts]


def stack_parameters(learners: Sequence[Sequence[nn.Parameter]]) -> StackedTensors:
    """Move the parameters of each learner into one tensor: each stays the object that it is, and becomes a view."""
    found = StackedTensors(learners)
    for row, parameters in enumerate(learners):
        for view, parameter in zip(found.views, parameters, strict=True):
            parameter.data = view[row]
    return found
