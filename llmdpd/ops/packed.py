"""Names that `llmdpd.methods.acting` still imports; this file goes when it calls `llmdpd.ops.packing.best_of_n`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.ops import native
from llmdpd.ops.arguments import check_shapes as check_inputs
from llmdpd.ops.packing import packed, packed_critic

__all__ = ["check_inputs", "noise_keys", "packed", "packed_critic"]


def noise_keys(seed: Tensor, batch: int) -> NDArray[np.uint64]:
    """A seed for each state, int64 [B]."""
    return native.keys(seed)
