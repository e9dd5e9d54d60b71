"""The sampler's CUDA side, installed as `llmdpd.kernels`.

This version holds no Triton sampler yet; `availability()` says so, and what else would be missing here.
"""

from __future__ import annotations

import importlib.util


def availability() -> tuple[bool, str | None]:
    """Whether the Triton sampler can run here, and if not, why. Imports torch, but never triton."""
    reasons = ["this version of llmdpd has no Triton sampler yet"]
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if importlib.util.find_spec("torch") is None:
        reasons.append("torch is not installed")
    else:
        import torch

        if not torch.cuda.is_available():
            reasons.append("torch finds no CUDA device")
    return False, "; ".join(reasons)
