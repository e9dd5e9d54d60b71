"""The compiled module: whether it is there, and torch's tensors as it takes them."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.ops.compiling import constant_when_compiled
from llmdpd.version import __version__

_threads: int | None = None
MAX_ROWS = 1 << 32  # the row is one 32-bit word of the noise's counter
MAX_SAMPLES = (1 << 31) - 1


@lru_cache(maxsize=1)
def _load() -> ModuleType | str:
    """The compiled module, or why it can't be had and what would mend it."""
    mend = "install llmdpd with a C++17 compiler (GCC or Clang) at hand: pip install ."
    try:
        from llmdpd import _native
    except ImportError as error:
        return f"the C++ module can't be imported ({error}); {mend}"
    if _native.__version__ != __version__:
        return f"the C++ module is of version {_native.__version__}, llmdpd of {__version__}; {mend}"
    return _native


@constant_when_compiled
def available() -> tuple[bool, str | None]:
    """Whether the C++ code can run here, and if not, why and what would mend it."""
    module = _load()
    return (False, module) if isinstance(module, str) else (True, None)


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not there; the message is `available()`'s reason.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def threads() -> int:
    """Threads that the C++ code takes for one call: what `set_threads` said, else as many as torch takes."""
    return _threads if _threads is not None else torch.get_num_threads()


def set_threads(count: int | None) -> None:
    """Give the C++ code as many threads from here on; None: as many as torch takes.

    Its results do not depend on it. Unlike torch's, its threads do not wait for one of them that the system has not
    given a core: on a busy machine a call takes no longer than alone.
    """
    global _threads
    if count is not None and count < 1:
        raise InputError("at least one thread", field="threads", found=count, expected="1 or more")
    _threads = count


def array(tensor: Tensor, name: str = "tensor") -> NDArray[np.float32]:
    """The tensor's memory as a C-contiguous float32 array, without a copy where it is one.

    Raises:
        InputError: another dtype or device, or not dense.
    """
    if (
        tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.data_ptr() % 4 == 0
    ):
        found_array: NDArray[np.float32] = tensor.detach().numpy()
        return found_array
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
        found = f"{tensor.dtype} on {tensor.device}{layout}"
        raise InputError("the C++ sampler computes in float32 on the CPU", field=name, found=found)
    dense = tensor.detach().contiguous()
    if not aligned(dense):
        dense = dense.clone()
    copied: NDArray[np.float32] = dense.numpy()
    return copied


def aligned(tensor: Tensor) -> bool:
    """Whether its numbers lie where numbers may: not so in a tensor made at an odd byte of a buffer."""
    return tensor.data_ptr() % tensor.element_size() == 0


def rows(tensor: Tensor) -> NDArray[np.float32]:
    """A matrix whose rows are contiguous, at any distance from each other: a slice of columns is not copied."""
    if (tensor.shape[1] > 1 and tensor.stride(1) != 1) or tensor.stride(0) < tensor.shape[1] or not aligned(tensor):
        return array(tensor)
    view: NDArray[np.float32] = tensor.detach().numpy()
    return view


def keys(seed: Tensor) -> NDArray[np.uint64]:
    """Noise keys int64 [1] or [B] as the C++ code takes them."""
    dense = seed.detach().contiguous()
    return (dense if aligned(dense) else dense.clone()).numpy().view(np.uint64)
