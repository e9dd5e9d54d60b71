"""Tensors as arrays of the same memory, made once for as long as the tensors stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.ops import native

Arrays = list[NDArray[np.float32]]


class Memory:
    """The arrays of tensors that are asked for again and again: a tenth of what making them takes."""

    def __init__(self) -> None:
        self._places: list[list[Any]] = []
        self._arrays: Arrays | None = None

    def of(self, tensors: Sequence[Tensor]) -> Arrays | None:
        """None where the C++ code can't write into one of them."""
        places = [list(map(of, tensors)) for of in (Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous)]
        if places != self._places:
            # The arrays keep their memory from being given to another tensor: the same pointer is the same memory.
            # Where there are none, the next tensors there may be plain ones.
            plain = all(map(_plain, tensors))
            self._places = places if plain else []
            self._arrays = [t.detach().numpy() for t in tensors] if plain else None
        return self._arrays


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() and native.aligned(tensor)
