"""The sampler's CUDA side, installed as `llmdpd.kernels`: Triton kernels for the reverse chain, forward and backward.

Importing this imports neither triton nor torch; `llmdpd.kernels.reverse_diffusion` does both.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Literal, get_args

from llmdpd.errors import InputError
from llmdpd.version import __version__

TRITON_FROM, TRITON_BEFORE = (3, 6), (3, 10)
"""Versions of triton that the kernels are compiled with in tests."""

CAPABILITY_FROM = (8, 0)

Fp32Products = Literal["tf32x3", "ieee"]
_fp32_products: Fp32Products = "tf32x3"


def fp32_products() -> Fp32Products:
    """How the kernels multiply float32 matrices; see `set_fp32_products`."""
    return _fp32_products


def set_fp32_products(how: Fp32Products) -> None:
    """Set how the kernels multiply float32 matrices, from the next launch on; a captured CUDA graph keeps its own.

    `tf32x3`, the default: on tensor cores, each product as a sum of three of tf32 halves, which keeps 21 of float32's
    24 bits and holds its tolerances. `ieee`: by float32 multiply-adds, several times slower.

    Raises:
        InputError: another word. Plain tf32, which keeps 11 bits, would not hold the tolerances.
    """
    global _fp32_products
    if how not in get_args(Fp32Products):
        raise InputError("no such product", field="fp32 products", found=how, expected=get_args(Fp32Products))
    _fp32_products = how


def availability() -> tuple[bool, str | None]:
    """Whether the Triton sampler can run here, and if not, why and what would help. Imports torch, but never triton.

    It can on a CUDA device, and with TRITON_INTERPRET=1 (set before triton is imported) on CPU tensors, far slower.
    """
    reason = _triton_unavailable() or _torch_unavailable()
    return reason is None, reason


def interpreted() -> bool:
    """Whether triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_unavailable() -> str | None:
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed: pip install triton (a CUDA build of torch on Linux brings it along)"
    version = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if not TRITON_FROM <= version < TRITON_BEFORE:
        return f"triton {found} is installed, and 3.6 to 3.9 are supported"
    if interpreted() and version < (3, 7):
        return f"TRITON_INTERPRET=1 needs triton 3.7 or newer, and {found} is installed"
    return None


def _torch_unavailable() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch can't be imported ({error})"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (torch.cuda.is_available() is false)"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY_FROM:
        found = f"{capability[0]}.{capability[1]}"
        return f"{torch.cuda.get_device_name()} is of compute capability {found}, and 8.0 is needed"
    try:
        from llmdpd import _cuda
    except ImportError as error:
        return f"the launcher of kernels can't be imported ({error}); install llmdpd on Linux: pip install ."
    if _cuda.__version__ != __version__:
        return f"the launcher of kernels is of version {_cuda.__version__}, llmdpd of {__version__}: pip install ."
    return None
