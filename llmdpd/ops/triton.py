"""The Triton kernels: whether they can run here, and every call of them by the operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.ops.arguments import ChainArguments
from llmdpd.ops.compiling import constant_when_compiled


def availability() -> tuple[bool, str | None]:
    """Whether the kernels can run here, interpreted or not; if not, why and what would help."""
    try:
        from llmdpd import kernels
    except ImportError as error:
        return False, f"llmdpd.kernels can't be imported ({error}); install llmdpd: pip install ."
    return kernels.availability()


@constant_when_compiled
def unavailable() -> str | None:
    """Why the kernels cannot serve `reverse_diffusion` here; None where they can."""
    return _unavailable()


@lru_cache(maxsize=1)  # looking up a package's version costs several times the whole chain of a small batch
def _unavailable() -> str | None:
    available, reason = availability()
    if not available:
        return reason
    from llmdpd import kernels

    return "TRITON_INTERPRET is set, which is for the kernels' own tests" if kernels.interpreted() else None


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """The device as the current one; and neither tf32 nor autocast may round a product here."""
    from llmdpd.kernels.products import exact_float32

    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current, exact_float32(), torch.autocast(device.type, enabled=False):
        yield


def chain_forward(chain: ChainArguments, keep: bool) -> tuple[Tensor, Tensor]:
    """a_0 [B, N, A], and where `keep`, a_K … a_0 before its bound: [K + 1, B, N, A]."""
    from llmdpd.kernels import reverse_diffusion as kernel

    with on_device(chain.state.device):
        return kernel.forward(chain, keep)


def chain_backward(grad: Tensor, tape: Tensor, chain: ChainArguments, need_state: bool) -> list[Tensor]:
    """The gradients of the first six arguments, the trunk last, from that of a_0 [B, N, A]."""
    from llmdpd.kernels import reverse_diffusion as kernel

    with on_device(chain.state.device):
        u = F.linear(chain.state, chain.W_s) + chain.u_z
        d_u, *rest = kernel.backward(grad, u, chain, tape)
        d_state = d_u @ chain.W_s if need_state else chain.state.new_empty(0)
        d_u_z = d_u.sum(0) if chain.u_z.ndim == 1 else d_u
        return [d_state, d_u.t() @ chain.state, d_u_z, *rest]
