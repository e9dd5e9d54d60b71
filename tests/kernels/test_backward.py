"""Every gradient against the float64 reference's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmdpd.diffusion import sampler_coefficients

MakeCase = Callable[..., Any]
both_precisions = pytest.mark.parametrize("bf16", [False, True])


@both_precisions
@pytest.mark.parametrize(
    ("B", "N", "A", "H"), [(40, 1, 4, 64), (17, 1, 1, 33), (9, 5, 3, 100), (18, 2, 32, 64), (17, 1, 12, 100)]
)
def test_shapes(make_case: MakeCase, key: torch.Tensor, B: int, N: int, A: int, H: int, bf16: bool) -> None:
    make_case(B=B, N=N, A=A, H=H, bf16=bf16, scale=1.0, clip=None if bf16 else 0.9).check_gradients(key)


@both_precisions
def test_large_widths(make_case: MakeCase, key: torch.Tensor, bf16: bool) -> None:
    make_case(B=16, H=300, K=1, bf16=bf16, scale=1.0).check_gradients(key)  # padded to 512


@both_precisions
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
def test_samplers(make_case: MakeCase, key: torch.Tensor, name: Any, clip: float | None, bf16: bool) -> None:
    make_case(B=20, plan=sampler_coefficients(name, steps=3, clip=clip), bf16=bf16, scale=0.5).check_gradients(key)


@both_precisions
@pytest.mark.parametrize("H", [20, 130])
def test_tiles_of_large_batches(
    make_case: MakeCase, key: torch.Tensor, monkeypatch: pytest.MonkeyPatch, H: int, bf16: bool
) -> None:
    from llmdpd.kernels import tiles

    monkeypatch.setattr(tiles, "SMS", 1)
    make_case(B=70, H=H, bf16=bf16, scale=1.0).check_gradients(key)


def test_in_several_launches(make_case: MakeCase, key: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmdpd.kernels import reverse_diffusion as operation

    case = make_case(B=20, N=2, scale=1.0)
    whole = case.check_gradients(key)
    # Two tiles of 16 rows at a time, of three: the last launch has one without a row.
    monkeypatch.setattr(operation, "SCRATCH_BYTES", 200_000)
    parts = case.check_gradients(key)
    assert any(not torch.equal(parts[name], whole[name]) for name in whole)  # summed in another order: it took several


def test_twice_the_same_bits_and_no_setting_changed(make_case: MakeCase, key: torch.Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    case = make_case(B=40)
    _, tape = case.forward(key, keep=True)
    grad_actions = torch.randn(tape.shape[1:], device=case.device)
    first, second = case.gradients(tape, grad_actions), case.gradients(tape, grad_actions)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.get_float32_matmul_precision() == before


def test_no_row(make_case: MakeCase, key: torch.Tensor) -> None:
    case = make_case(B=0)
    _, tape = case.forward(key, keep=True)
    found = case.gradients(tape, torch.zeros(0, 1, 4, device=case.device))
    assert all((gradient == 0).all() for gradient in found.values())
