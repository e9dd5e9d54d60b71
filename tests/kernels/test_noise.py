"""Noise made in the kernel against its definition: with no step to take, a kept chain begins with draw 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from llmdpd.kernels.philox import box_muller  # noqa: E402

MakeCase = Callable[..., Any]
TOLERANCE = 2e-6  # absolute


@triton.jit
def normal_kernel(even, odd, first, second, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b = box_muller(tl.load(even + i).to(tl.uint32), tl.load(odd + i).to(tl.uint32))
    tl.store(first + i, a)
    tl.store(second + i, b)


@pytest.mark.parametrize(("B", "N", "A"), [(40, 1, 4), (7, 6, 1), (5, 3, 17), (21, 2, 32)])
@pytest.mark.parametrize("keyed", [False, True])
def test_the_first_draw(make_case: MakeCase, rng: np.random.Generator, B: int, N: int, A: int, keyed: bool) -> None:
    case = make_case(B=B, N=N, A=A, H=16, K=1)
    key = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, B if keyed else 1))
    _, chain = case.forward(key, keep=True)
    found = chain[0].cpu().double() / case.plan.start
    assert (found - case.noise(key)[0]).abs().max() <= TOLERANCE


def test_every_draw_is_used_in_its_order(make_case: MakeCase, key: torch.Tensor) -> None:
    """A network of zeros, no bound: the chain is then a sum of draws with known factors."""
    case = make_case(B=70, A=3, H=16, K=4, clip=None, scale=0.0)
    _, chain = case.forward(key, keep=True)
    noise, plan = case.noise(key), case.plan
    a, x0_previous = plan.start * noise[0], torch.zeros_like(noise[0])
    for k in range(plan.steps):
        x0 = plan.p[k] * a
        a = plan.A[k] * a + plan.B[k] * x0 + plan.C[k] * x0_previous + plan.S[k] * noise[k + 1]
        x0_previous = x0
        assert (chain[k + 1].cpu() - a).abs().max() <= 4 * TOLERANCE


def test_rare_words(device: torch.device) -> None:
    """Box-Muller where float32 is weakest: log near 1, the least uniform, around every eighth of a turn."""
    radii = [0, 1, 2, 2**23 - 1, 2**23, 11863282, 11863283, 2**24 - 3, 2**24 - 2, 2**24 - 1]
    angles = [eighth * 2**21 + offset for eighth in range(8) for offset in (-1, 0, 1) if eighth or offset >= 0]
    u = torch.tensor(radii * 26)[:256]
    v = torch.tensor(angles * 12)[:256]
    first, second = torch.empty(2, 256, device=device)
    normal_kernel[(1,)]((u << 8).to(device), (v << 8).to(device), first, second, 256)
    radius = torch.sqrt(-2 * torch.log((u + 1).double() * 2.0**-24))
    angle = 2 * torch.pi * v.double() * 2.0**-24
    assert (first.cpu() - radius * torch.cos(angle)).abs().max() <= TOLERANCE
    assert (second.cpu() - radius * torch.sin(angle)).abs().max() <= TOLERANCE
