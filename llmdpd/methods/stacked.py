"""Learners of one process that differ by their seed, and do their iterations at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch


class Stacked(Protocol):
    """See `Learner.stacked`."""

    def update(
        self, batches: Sequence[PromptedBatch], iteration: int, generators: Sequence[torch.Generator]
    ) -> list[dict[str, Tensor]]:
        """The iteration of each learner on its batch, which samples by its generator; their metrics."""


def side_by_side(batches: Sequence[PromptedBatch]) -> PromptedBatch:
    """Batches of the same shapes as one, each tensor with a leading dimension of learners."""
    parts = [batch.tensors() for batch in batches]
    # Of one the tensors themselves, without a copy.
    joined = {n: p[None] if len(parts) == 1 else torch.stack([own[n] for own in parts]) for n, p in parts[0].items()}
    return batches[0].with_tensors(joined)


def of_each(metrics: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each learner's own of metrics [L]."""
    rows = {name: values.unbind() for name, values in metrics.items()}
    return [{name: values[n] for name, values in rows.items()} for n in range(len(next(iter(rows.values()))))]
