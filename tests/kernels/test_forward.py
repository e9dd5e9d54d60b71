"""Actions against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.diffusion import sampler_plan

MakeCase = Callable[..., Any]
Close = Callable[..., None]
Tolerances = dict[bool, tuple[float, float]]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("B", "N", "A", "H"),
    [(1, 1, 4, 64), (17, 1, 1, 33), (5, 7, 4, 64), (3, 5, 9, 100), (18, 1, 32, 128), (2, 1, 3, 250)],
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
    case = make_case(B=B, N=N, A=A, H=H, bf16=bf16)
    found, chain = case.forward(key)
    assert found.shape == (B, N, A)
    assert chain.numel() == 0
    close(found, case.reference(case.noise(key))[0], tolerances[bf16][0])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("steps", "clip"), [(5, 1.0), (5, None), (15, 1.0)])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
def test_samplers(
    make_case: MakeCase, close: Close, tolerances: Tolerances, key: torch.Tensor, name: Any, steps: int,
    clip: float | None,
    bf16: bool,
) -> None:  # fmt: skip
    plan = sampler_plan(name, steps=steps, clip=clip)
    case = make_case(plan=plan, bf16=bf16, scale=1.0 if clip else 0.5)
    close(case.forward(key)[0], case.reference(case.noise(key))[0], tolerances[bf16][0])


@pytest.mark.parametrize("bf16", [False, True])
def test_large_widths(make_case: MakeCase, close: Close, tolerances: Tolerances, key: torch.Tensor, bf16: bool) -> None:
    case = make_case(B=3, H=300, K=2, bf16=bf16)  # padded to 512
    close(case.forward(key)[0], case.reference(case.noise(key))[0], tolerances[bf16][0])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("B", "H"), [(20, 130), (70, 130), (70, 20)])
def test_tiles_of_large_batches(
    make_case: MakeCase, close: Close, tolerances: Tolerances, key: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
    B: int,
    H: int, bf16: bool,
) -> None:  # fmt: skip
    from llmdpd.kernels import tiles

    monkeypatch.setattr(tiles, "SMS", 1)  # a device so small that few rows are many
    case = make_case(B=B, H=H, bf16=bf16)
    close(case.forward(key)[0], case.reference(case.noise(key))[0], tolerances[bf16][0])


def test_given_noise(make_case: MakeCase, close: Close, tolerances: Tolerances, key: torch.Tensor) -> None:
    case = make_case(B=6, N=3)
    noise = torch.randn(case.plan.steps + 1, 6, 3, 4, device=case.device)
    found, _ = case.forward(key, noise)
    close(found, case.reference(noise)[0], tolerances[False][0])
    assert torch.equal(case.forward(key + 1, noise)[0], found)


def test_a_key_for_each_state(
    make_case: MakeCase, close: Close, tolerances: Tolerances, rng: np.random.Generator
) -> None:
    case = make_case(B=9, N=3)
    keys = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 9))
    found, _ = case.forward(keys)
    close(found, case.reference(case.noise(keys))[0], tolerances[False][0])


def test_the_chain(make_case: MakeCase, key: torch.Tensor) -> None:
    case = make_case(B=6, N=2)
    found, chain = case.forward(key, keep=True)
    assert chain.shape == (case.plan.steps + 1, 6, 2, 4)
    assert torch.equal(chain[-1].clamp(-case.clip, case.clip), found)
    assert (chain[-1].abs() > case.clip).any()
    assert torch.equal(case.forward(key, keep=False)[0], found)


def test_no_row(make_case: MakeCase, key: torch.Tensor) -> None:
    case = make_case(B=0)
    found, chain = case.forward(key, keep=True)
    assert found.shape == (0, 1, 4)
    assert chain.shape == (case.plan.steps + 1, 0, 1, 4)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(make_case: MakeCase, key: torch.Tensor, value: float, bf16: bool) -> None:
    case = make_case(B=20, bf16=bf16)
    clean, _ = case.forward(key)
    with torch.no_grad():
        case.state[7, 2] = value
    found, _ = case.forward(key)
    others = torch.arange(20, device=case.device) != 7
    assert torch.equal(found[others], clean[others])
    assert found[7].isnan().any() or value == float("inf")


def test_strided_tensors(make_case: MakeCase, key: torch.Tensor) -> None:
    from llmdpd.kernels import reverse_diffusion as operation

    case = make_case(B=6, H=40)
    parts = {name: part.detach() for name, part in case.parts().items()}
    assert parts["action_weight"].stride(0) > 4  # a slice of the first layer's weight
    strided = {name: torch.stack([part, part], dim=-1)[..., 0] for name, part in parts.items()}
    options = {"start": 1.0, "clip": 1.0, "samples": 1, "bf16": False, "keep": False}
    plain, _ = operation.forward(**parts, table=case.table, key=key.to(case.device), noise=None, **options)
    found, _ = operation.forward(**strided, table=case.table, key=key.to(case.device), noise=None, **options)
    assert torch.equal(found, plain)
