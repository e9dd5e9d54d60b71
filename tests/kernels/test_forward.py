"""Actions against the float64 reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd import kernels
from llmdpd.diffusion import sampler_coefficients
from llmdpd.errors import InputError

MakeCase = Callable[..., Any]
both_precisions = pytest.mark.parametrize("bf16", [False, True])


@both_precisions
@pytest.mark.parametrize(
    ("B", "N", "A", "H"),
    [
        (1, 1, 4, 64),
        (17, 1, 1, 33),
        (5, 7, 4, 64),
        (3, 5, 9, 100),
        (18, 1, 32, 128),
        (2, 1, 3, 250),
        (3, 1, 4, 300),
        (2, 1, 70, 33),
    ],
)
def test_shapes(make_case: MakeCase, key: torch.Tensor, B: int, N: int, A: int, H: int, bf16: bool) -> None:
    assert make_case(B=B, N=N, A=A, H=H, bf16=bf16).check_actions(key).shape == (B, N, A)


@both_precisions
@pytest.mark.parametrize(("steps", "clip"), [(3, 1.0), (3, None), (9, 1.0)])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
def test_samplers(
    make_case: MakeCase, key: torch.Tensor, name: Any, steps: int, clip: float | None, bf16: bool
) -> None:
    plan = sampler_coefficients(name, steps=steps, clip=clip)
    make_case(plan=plan, bf16=bf16, scale=1.0 if clip else 0.5).check_actions(key)


@both_precisions
@pytest.mark.parametrize(("B", "H"), [(20, 130), (70, 130), (70, 20)])
def test_tiles_of_large_batches(
    make_case: MakeCase, key: torch.Tensor, monkeypatch: pytest.MonkeyPatch, B: int, H: int, bf16: bool
) -> None:
    from llmdpd.kernels import tiles

    monkeypatch.setattr(tiles, "SMS", 1)  # a device so small that few rows are many
    make_case(B=B, H=H, bf16=bf16).check_actions(key)


def test_given_noise(make_case: MakeCase, close: Callable[..., None], key: torch.Tensor) -> None:
    case = make_case(B=6, N=3)
    noise = torch.randn(case.plan.steps + 1, 6, 3, 4, device=case.device)
    found, _ = case.forward(key, noise)
    close(found, case.reference(noise)[0], 2e-5)
    assert torch.equal(case.forward(key + 1, noise)[0], found)


def test_a_key_for_each_state(make_case: MakeCase, rng: np.random.Generator) -> None:
    make_case(B=9, N=3).check_actions(torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 9)))


def test_the_chain(make_case: MakeCase, key: torch.Tensor) -> None:
    case = make_case(B=6, N=2)
    found, tape = case.forward(key, keep=True)
    assert tape.shape == (case.plan.steps + 1, 6, 2, 4)
    assert torch.equal(tape[-1].clamp(-case.plan.clip, case.plan.clip), found)
    assert (tape[-1].abs() > case.plan.clip).any()
    assert torch.equal(case.forward(key, keep=False)[0], found)


def test_no_row(make_case: MakeCase, key: torch.Tensor) -> None:
    case = make_case(B=0)
    found, tape = case.forward(key, keep=True)
    assert found.shape == (0, 1, 4)
    assert tape.shape == (case.plan.steps + 1, 0, 1, 4)


@both_precisions
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(make_case: MakeCase, key: torch.Tensor, value: float, bf16: bool) -> None:
    case = make_case(B=20, bf16=bf16)
    clean, _ = case.forward(key)
    with torch.no_grad():
        case.state[7, 2] = value
    found, _ = case.forward(key)
    others = torch.arange(20, device=case.device) != 7
    assert torch.equal(found[others], clean[others])
    assert found[7].isnan().any() if np.isnan(value) else not torch.equal(found[7], clean[7])


def test_strided_tensors(make_case: MakeCase, key: torch.Tensor) -> None:
    from llmdpd.kernels import reverse_diffusion as operation

    _, chain = make_case(B=6, H=40).call(key)
    assert chain.W_a.stride(0) > 4  # a slice of the first layer's weight
    tensors = {
        "state": chain.state,
        "W_s": chain.W_s,
        "u_z": chain.u_z,
        "tau": chain.tau,
        "W_a": chain.W_a,
        "table": chain.table,
        "key": chain.key,
    }
    spread = {name: torch.stack([part, part], dim=-1)[..., 0] for name, part in tensors.items()}
    trunk = [torch.stack([part, part], dim=-1)[..., 0] for part in chain.trunk]
    plain, _ = operation.forward(chain, False)
    found, _ = operation.forward(chain._replace(trunk=trunk, **spread), False)
    assert torch.equal(found, plain)


def test_a_prompt_for_all_and_a_key_by_value(
    make_case: MakeCase, close: Callable[..., None], key: torch.Tensor
) -> None:
    from llmdpd.kernels import reverse_diffusion as operation

    case = make_case(B=19, N=2, A=3, H=33)
    case = dataclasses.replace(case, prompt=case.prompt.detach()[0].clone())
    _, chain = case.call(key)
    assert chain.u_z.ndim == 1
    packed, actions = operation.pack(chain), torch.empty(19, 2, 3, device=case.device)
    packed.launch.run()
    operation.forward_launch(packed, chain, actions, chain.state.new_empty(0), seed=int(key)).run()
    close(actions, case.reference(case.noise(key))[0], 2e-5)
    assert torch.equal(actions, operation.forward(chain, False)[0])


def test_products_of_float32(make_case: MakeCase, close: Callable[..., None], key: torch.Tensor) -> None:
    """`tf32x3` and `ieee` hold float32's tolerance; plain tf32 would not."""
    errors = {}
    case = make_case(B=40, H=100, K=5, scale=1.0)
    expected, _ = case.reference(case.noise(key))
    for how in ("tf32x3", "ieee", "tf32"):
        kernels._fp32_products = how  # the setter refuses the last
        try:
            errors[how] = float((case.forward(key)[0].cpu() - expected).norm() / expected.norm())
        finally:
            kernels.set_fp32_products("tf32x3")
    assert max(errors["tf32x3"], errors["ieee"]) < 2e-5 < errors["tf32"], errors
    with pytest.raises(InputError, match="no such product"):
        kernels.set_fp32_products("tf32")
