"""Learners of one process that differ by their seed, and do their iterations at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch


class Stacked(Protocol):
    """See `Learner.stacked`."""

    def update(
        self, batches: Sequence[PromptedBatch], iteration: int, generators: Sequence[torch.Generator]
    ) -> list[dict[str, Tensor]]:
        """The iteration of each learner on its batch, which draws by its generator; their metrics."""
