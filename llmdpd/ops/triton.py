"""The Triton kernels: whether they can run here, and every call of them by the operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llmdpd.ops.arguments import ChainArguments
from llmdpd.ops.compiling import constant_when_compiled
from llmdpd.utils.device import matmul_settings

if TYPE_CHECKING:
    from llmdpd.kernels.members import Members


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


def product_settings() -> tuple[str | None, ...]:
    """How products of float32 are rounded on a device, by torch and by the kernels; a captured graph keeps its own."""
    how = None
    if unavailable() is None:
        from llmdpd import kernels

        how = kernels.fp32_products()
    return *matmul_settings(), how


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


def computes_mlps(x: Tensor, members: Sequence[Sequence[Tensor]]) -> bool:
    """Whether `mish_mlps` computes these: float32 on a CUDA device, under no mode, compiler or autocast."""
    tensors = [x, *(part for member in members for part in member)]
    return (
        len(members) <= 2
        and all(tensor.is_cuda and tensor.dtype is torch.float32 and tensor.device == x.device for tensor in tensors)
        and len(members[0][6]) <= len(members[0][0])  # outputs and hidden columns
        and unavailable() is None
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch.is_autocast_enabled("cuda")
    )


def mish_mlps(x: Tensor, members: Sequence[Sequence[Tensor]], bf16: bool) -> Tensor:
    """The outputs [M, B, O] of one or two three-layer Mish nets of the same sizes on the inputs x [B, I].

    Each member's weights are W1 [H, I], init [H] (or [B, H], of one member alone), W2, b2, W3, b3, W4, b4.
    """
    out: Tensor = _Mlps.apply(len(members), bf16, x, *(part for member in members for part in member))
    return out


class _Mlps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, bf16: bool, x: Tensor, *weights: Tensor) -> Tensor:
        from llmdpd.kernels import mish_mlp as kernel

        with on_device(x.device):
            out, packed = kernel.forward(x, _members(weights, count), bf16)
        ctx.count, ctx.bf16 = count, bf16
        ctx.save_for_backward(x, *packed, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from llmdpd.kernels import mish_mlp as kernel

        x, trunk, inputs, biases, *weights = ctx.saved_tensors
        need_x, *needed = ctx.needs_input_grad[2:]
        packed, need = kernel.Packed(trunk, inputs, biases), (need_x, any(needed))
        with on_device(x.device):
            d_x, gradients = kernel.backward(grad, x, _members(weights, ctx.count), packed, ctx.bf16, *need)
        if not gradients:
            return (None, None, d_x, *[None] * len(weights))
        return None, None, d_x, *(part[number] for number in range(ctx.count) for part in gradients)


def _members(weights: Sequence[Tensor], count: int) -> Members:
    """Members by eight weights each."""
    from llmdpd.kernels.members import Members

    return Members.of([weights[8 * number : 8 * number + 8] for number in range(count)])
