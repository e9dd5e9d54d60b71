"""Every gradient against the float64 reference's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmdpd.diffusion import sampler_plan

MakeCase = Callable[..., Any]
Close = Callable[..., None]
Tolerances = dict[bool, tuple[float, float]]


EDGE = 0.1
"""bf16 rounds an estimate that lies this near to the clip's edge to the other side of it now and then, and its whole
gradient appears or goes. Rows that have such an estimate get no gradient to pull back, so that they add nothing."""


def check(case: Any, close: Close, tolerance: float, key: torch.Tensor) -> dict[str, torch.Tensor]:
    _, chain = case.forward(key, keep=True)
    grad_actions = torch.randn(chain.shape[1:], device=case.device)
    noise = case.noise(key)
    if case.bf16:
        away = case.distance_from_the_edge(noise).to(case.device) > EDGE  # [B, N]
        assert away.any()
        grad_actions *= away[..., None]
    _, expected = case.reference(noise, grad_actions)
    found = case.gradients(chain, grad_actions)
    for name, gradient in expected.items():
        close(found[name], gradient.value, tolerance, name, gradient.size)
    return found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("B", "N", "A", "H"), [(40, 1, 4, 64), (17, 1, 1, 33), (9, 5, 3, 100), (18, 2, 32, 64), (17, 1, 12, 250)]
)
def test_shapes(
    make_case: MakeCase,
    close: Close,
    tolerances: Tolerances,
    key: torch.Tensor,
    B: int,
    N: int,
    A: int,
    H: int,
    bf16: bool,
) -> None:
    case = make_case(B=B, N=N, A=A, H=H, bf16=bf16, scale=1.0, clip=None if bf16 else 0.9)
    check(case, close, tolerances[bf16][1], key)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
def test_samplers(
    make_case: MakeCase,
    close: Close,
    tolerances: Tolerances,
    key: torch.Tensor,
    name: Any,
    clip: float | None,
    bf16: bool,
) -> None:
    case = make_case(B=20, plan=sampler_plan(name, steps=5, clip=clip), bf16=bf16, scale=0.5)
    check(case, close, tolerances[bf16][1], key)


@pytest.mark.parametrize("bf16", [False, True])
def test_large_widths(make_case: MakeCase, close: Close, tolerances: Tolerances, key: torch.Tensor, bf16: bool) -> None:
    check(make_case(B=16, H=300, K=2, bf16=bf16, scale=1.0), close, tolerances[bf16][1], key)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("H", [20, 130])
def test_tiles_of_large_batches(
    make_case: MakeCase, close: Close, tolerances: Tolerances, key: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
    H: int,
    bf16: bool,
) -> None:  # fmt: skip
    from llmdpd.kernels import tiles

    monkeypatch.setattr(tiles, "SMS", 1)
    check(make_case(B=70, H=H, bf16=bf16, scale=1.0), close, tolerances[bf16][1], key)


def test_in_several_launches(
    make_case: MakeCase, close: Close, tolerances: Tolerances, key: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmdpd.kernels import reverse_diffusion as operation

    case = make_case(B=20, N=2, scale=1.0)
    whole = check(case, close, tolerances[False][1], key)
    monkeypatch.setattr(
        operation, "SCRATCH_BYTES", 200_000
    )  # two tiles of 16 rows at a time, of three: the last has none
    parts = check(case, close, tolerances[False][1], key)
    assert any(not torch.equal(parts[name], whole[name]) for name in whole)  # summed in another order: it took several


def test_twice_the_same_bits(make_case: MakeCase, key: torch.Tensor) -> None:
    case = make_case(B=40)
    _, chain = case.forward(key, keep=True)
    grad_actions = torch.randn(chain.shape[1:], device=case.device)
    first, second = case.gradients(chain, grad_actions), case.gradients(chain, grad_actions)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_row(make_case: MakeCase, key: torch.Tensor) -> None:
    case = make_case(B=0)
    _, chain = case.forward(key, keep=True)
    found = case.gradients(chain, torch.zeros(0, 1, 4, device=case.device))
    assert all((gradient == 0).all() for gradient in found.values())


def test_tf32_settings_are_left_alone(make_case: MakeCase, key: torch.Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    case = make_case(B=3)
    case.gradients(case.forward(key, keep=True)[1], torch.zeros(3, 1, 4, device=case.device))
    assert torch.get_float32_matmul_precision() == before
