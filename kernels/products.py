"""The weight gradients: one large matrix product each, over all rows and steps of a backward launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_float32() -> Iterator[None]:
    """cuBLAS products of float32 without tf32, whatever the process has set. A host setting: nothing is launched."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def product_of(x: Tensor, y: Tensor) -> Tensor:
    """x y of […, m, R] and […, R, n], accumulated and returned in float32."""
    if x.dtype == torch.float32:
        with exact_float32():
            return x @ y
    if not x.is_cuda:  # the interpreter's: a product in bfloat16 with a result in float32 exists on CUDA alone
        return x.float() @ y.float()
    product = torch.bmm if x.ndim == 3 else torch.mm
    return product(x, y, out_dtype=torch.float32)


def gradients(hidden: Tensor, slopes: Tensor, taken: Tensor, d_out: Tensor, H: int, A: int) -> list[Tensor]:
    """d_time_rows [K, H], dW_a [H, A], dW2, db2, dW3, db3, dW4 [A, H], db4 from what a backward launch kept.

    Shapes: `reverse_diffusion.Kept`. Rows that pad a tile are zeros in the slopes and d_out. Float32, and always
    summed in the same order.
    """
    sums = slopes[..., :H].sum(2, dtype=torch.float32)
    db2, db3 = sums[1:].sum(1)
    db4 = d_out[..., :A].sum((0, 1), dtype=torch.float32)
    hidden, slopes = hidden.flatten(1, 2)[..., :H], slopes.flatten(1, 2)[..., :H]
    taken, d_out = taken.flatten(0, 1)[:, :A], d_out.flatten(0, 1)[:, :A]
    dw2, dw3 = product_of(slopes[1:].transpose(-1, -2), hidden[:2])
    return [sums[0], product_of(slopes[0].t(), taken), dw2, db2, dw3, db3, product_of(d_out.t(), hidden[2]), db4]
