"""Compiled kernels on a device: loaded once, and launched by the CUDA driver from C++ (`llmdpd._cuda`).

Triton's own launcher looks at every argument again at each launch, which takes longer than a small chain.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = "libcuda.so.1"


class Place(NamedTuple):
    """Where a kernel is launched."""

    device: int
    stream: int
    """The driver's handle of the device's current stream."""
    capability: int
    """10 x major + minor."""


def place_of(tensor: Tensor) -> Place:
    """The device of a tensor and its current stream."""
    index = tensor.device.index
    return Place(index, torch._C._cuda_getCurrentRawStream(index), capability(index))


@functools.cache
def capability(index: int) -> int:
    """Compute capability of a CUDA device, 10 x major + minor."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def generator(device: int) -> torch.Generator:
    """The device's generator of random numbers, which `torch.manual_seed` governs."""
    return torch.cuda.default_generators[device]


@functools.cache
def _driver(library: str) -> Any:
    from llmdpd import _cuda

    return _cuda.Driver(library)


_kernels: dict[Hashable, Any] = {}  # a captured graph may launch them as long as the process lives


def loaded(key: Hashable, place: Place, kinds: str, compiled: Callable[[], Any]) -> Any:
    """The kernel of this key on the device of a place, which has `launch(programs, members, stream, arguments)`.

    kinds: its arguments', a letter each (`csrc/bind_cuda.cpp`). compiled: makes what triton compiles of it.

    Raises:
        RuntimeError: the driver can't be loaded, or refuses the kernel.
    """
    key = key, place.device
    kernel = _kernels.get(key)
    if kernel is None:
        found = compiled()
        check(found, kinds)
        from llmdpd import _cuda

        metadata = found.metadata
        binary, shared = (found.asm["cubin"], metadata.name, place.device), (32 * metadata.num_warps, metadata.shared)
        kernel = _kernels[key] = _cuda.Kernel(_driver(LIBRARY), *binary, *shared, kinds)
    return kernel


def check(compiled: Any, kinds: str) -> None:
    """Raise `RuntimeError` where a compiled kernel takes other arguments than these and two scratch memories."""
    metadata = compiled.metadata
    entry = compiled.asm["ptx"].split(f".entry {metadata.name}(", 1)[1].split(")", 1)[0]
    taken = re.findall(r"\.param \.(\w)(\d+)", entry)
    expected = [{"p": "64", "l": "64", "i": "32", "f": "32"}[kind] for kind in kinds] + ["64", "64"]
    if [bits for _, bits in taken] != expected or metadata.num_ctas != 1:
        raise RuntimeError(f"this triton compiles other arguments than llmdpd passes: {entry.strip()}, for {kinds}")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError("this triton compiles kernels that need scratch memory, which llmdpd gives none")
