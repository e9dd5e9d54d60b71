"""`reverse_diffusion`: the backends against a float64 oracle, seeds, how a backend is chosen, and every refusal."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import (
    BackendUnavailableError,
    NoiseMLP,
    SamplerCoefficients,
    philox_normal,
    reverse_diffusion,
    sampler_coefficients,
)
from llmdpd.diffusion import sampler as sampler_module
from llmdpd.errors import InputError
from llmdpd.ops import inference, native

TOLERANCE = 2e-5  # relative L2 of actions in float32
BACKENDS = ["reference", "cpp"]

PLANS = {
    "ddpm-5": {"name": "ddpm", "steps": 5},
    "ddpm-15": {"name": "ddpm", "steps": 15},
    "ddpm-5-cosine": {"name": "ddpm", "steps": 5, "schedule": "cosine"},
    "ddpm-15-linear": {"name": "ddpm", "steps": 15, "schedule": "linear"},
    "ddpm-5-wide": {"name": "ddpm", "steps": 5, "clip": 3.0},
    "ddpm-5-unclipped": {"name": "ddpm", "steps": 5, "clip": None},
    "ddpm-5-quiet": {"name": "ddpm", "steps": 5, "noise_scale": 0.3},
    "ddim-5": {"name": "ddim", "steps": 5},
    "ddim-15-eta": {"name": "ddim", "steps": 15, "eta": 1.0},
    "ddim-5-of-15": {"name": "ddim", "steps": 5, "train_steps": 15, "eta": 0.5},
    "dpm-5": {"name": "dpm++2m", "steps": 5},
    "dpm-15": {"name": "dpm++2m", "steps": 15},
    "dpm-4-of-15": {"name": "dpm++2m", "steps": 4, "train_steps": 15, "noise_scale": 0.7},
    "ddim-1-of-5": {"name": "ddim", "steps": 1, "train_steps": 5},
}


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    # Of a handful of actions all may happen to lie near 0, where no relative error holds.
    size = max(float(expected.double().norm()), 0.3 * expected.numel() ** 0.5)
    return float((found.double() - expected.double()).norm()) / size


def oracle(net: NoiseMLP, state: Tensor, prompt: Tensor, plan: SamplerCoefficients, noise: Tensor, N: int) -> Tensor:
    """The reference in float64 on float64 noise [K + 1, B, N, A]."""
    return reverse_diffusion(
        copy.deepcopy(net).double(), state.double(), prompt.double(), plan, N, noise=noise.double(), backend="reference"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("sizes", [(39, 4, 24, 64, 13, 3), (3, 1, 5, 7, 1, 1), (2, 9, 0, 33, 6, 1)])
@torch.no_grad()
def test_backends_hold_the_tolerance(
    rng: np.random.Generator, make_net: Any, backend: Any, plan_name: str, sizes: tuple[int, ...]
) -> None:
    S, A, Z, H, B, N = sizes
    net = make_net(S, A, Z, H)
    plan = sampler_coefficients(**PLANS[plan_name])  # type: ignore[arg-type]
    state = torch.randn(B, S)
    for prompt in (torch.randn(Z), torch.randn(B, Z)):
        seed = int(rng.integers(2**63))
        seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, B))
        given = torch.randn(plan.steps + 1, B, N, A)
        cases: list[tuple[dict[str, Any], Tensor]] = [
            ({"seed": seed}, philox_normal(seed, B, N, plan.steps + 1, A)),
            ({"seed": seeds}, philox_normal(seeds, B, N, plan.steps + 1, A)),
            ({"noise": given}, given),
        ]
        if N == 1:
            cases.append(({"noise": given[:, :, 0]}, given))
        for options, noise in cases:
            found = reverse_diffusion(net, state, prompt, plan, N, backend=backend, **options)
            assert found.dtype == torch.float32
            assert found.shape == ((B, N, A) if N > 1 else (B, A))
            assert relative(found, oracle(net, state, prompt, plan, noise, N)) <= TOLERANCE


@torch.no_grad()
def test_bfloat16_holds_its_tolerance(rng: np.random.Generator, make_net: Any) -> None:
    net = make_net(6, 4, 5, 64)
    state, prompt, plan, seed = torch.randn(200, 6), torch.randn(5), sampler_coefficients(), int(rng.integers(2**62))
    expected = oracle(net, state, prompt, plan, philox_normal(seed, 200, 1, 6, 4), 1)
    found = reverse_diffusion(net, state, prompt, plan, seed=seed, precision="bf16")
    assert found.dtype == torch.float32
    assert 1e-4 < relative(found, expected) <= 2e-2  # bfloat16 was used, and held


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_an_action_depends_on_its_own_seed_and_row_only(rng: np.random.Generator, make_net: Any, backend: Any) -> None:
    net, plan = make_net(6, 3, 4, 21), sampler_coefficients()
    state, prompt = torch.randn(11, 6), torch.randn(11, 4)
    seeds = torch.from_numpy(rng.integers(0, 2**63, 11))

    def act(rows: Any) -> Tensor:
        return reverse_diffusion(net, state[rows], prompt[rows], plan, 2, seed=seeds[rows], backend=backend)

    whole = act(slice(None))
    order = torch.from_numpy(rng.permutation(11))
    torch.testing.assert_close(act(order), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([act(slice(0, 4)), act(slice(4, 11))]), whole, rtol=0, atol=1e-5)
    assert not torch.allclose(whole[:, 0], whole[:, 1])


@torch.no_grad()
def test_torchs_seed_governs_every_backend_alike(make_net: Any) -> None:
    # Many rows: of a few, every action may be clipped to the bound.
    net, state, prompt = make_net(3, 2, 2), torch.randn(50, 3), torch.randn(2)

    def sample(backend: Any, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        first, second = (
            reverse_diffusion(net, state, prompt, sampler_coefficients(), backend=backend) for _ in range(2)
        )
        return first, second

    for backend in BACKENDS:
        first, second = sample(backend, 7)
        assert torch.equal(sample(backend, 7)[0], first)
        assert not torch.equal(first, second)
        assert not torch.equal(sample(backend, 8)[0], first)
    assert relative(sample("cpp", 7)[0], sample("reference", 7)[0]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_numpy_seeds(rng: np.random.Generator, make_net: Any, backend: Any) -> None:
    net, state, prompt, plan = make_net(3, 2, 2), torch.randn(4, 3), torch.randn(2), sampler_coefficients()
    for seed in (5, -3, 2**63 - 1):
        one = reverse_diffusion(net, state, prompt, plan, seed=seed, backend=backend)
        other = reverse_diffusion(net, state, prompt, plan, seed=np.int64(seed), backend=backend)  # type: ignore[arg-type]
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_empty_batch(make_net: Any, backend: Any) -> None:
    net, plan = make_net(3, 2, 4), sampler_coefficients()
    assert reverse_diffusion(net, torch.zeros(0, 3), torch.ones(4), plan, backend=backend).shape == (0, 2)
    keys = torch.zeros(0, dtype=torch.int64)
    shape = reverse_diffusion(net, torch.zeros(0, 3), torch.ones(0, 4), plan, 5, seed=keys, backend=backend).shape
    assert shape == (0, 5, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_actions_are_within_the_bound(make_net: Any, backend: Any) -> None:
    net = make_net(3, 2, 4)
    plan = sampler_coefficients("ddpm", clip=0.4)
    actions = reverse_diffusion(net, 3 * torch.randn(50, 3), torch.randn(4), plan, 4, backend=backend)
    assert float(actions.abs().max()) <= 0.4 + 1e-7
    assert (actions.abs() < 0.4).any()


# How a backend is chosen


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that the chain's C++ code was called: the quick path, the operator, or the node."""
    calls: list[str] = []

    def spy(owner: Any, name: str, entry: str) -> None:
        original = getattr(owner, name)

        def called(*args: Any, **options: Any) -> Any:
            calls.append(entry)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, called)

    spy(inference.PackedNet, "run", "packed")
    spy(sampler_module.autograd, "reverse_diffusion", "operator")
    spy(sampler_module, "sample_actions", "node")
    return calls


def test_auto_takes_cpp_with_and_without_gradient(make_net: Any, native_calls: list[str]) -> None:
    net, state, prompt, plan = make_net(3, 2, 4), torch.randn(4, 3), torch.randn(4), sampler_coefficients()
    with torch.no_grad():
        plain = reverse_diffusion(net, state, prompt, plan, seed=1)
    assert native_calls == ["packed"]
    learning = reverse_diffusion(net, state, prompt, plan, seed=1)
    assert native_calls == ["packed", "node"]
    assert learning.requires_grad
    assert not plain.requires_grad
    assert relative(learning.detach(), plain) <= TOLERANCE


def test_a_gradient_for_the_prompt_alone(make_net: Any, native_calls: list[str]) -> None:
    net = make_net(3, 2, 4).requires_grad_(False)
    reverse_diffusion(net, torch.randn(4, 3), torch.randn(4), sampler_coefficients())
    prompt = torch.randn(4, requires_grad=True)
    reverse_diffusion(net, torch.randn(4, 3), prompt, sampler_coefficients(clip=None)).sum().backward()
    assert native_calls == ["packed", "node"]
    assert prompt.grad is not None
    assert bool((prompt.grad != 0).any())


def test_a_repeated_call_gives_the_bits_of_the_first(make_net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first packs and checks everything, the next goes the short way."""
    net = make_net(3, 2, 4).requires_grad_(False)
    for shape in [(1, 3), (0, 3), (7, 3)]:
        for options in ({"seed": 5}, {"seed": 5, "samples": 3}, {"seed": -5, "precision": "bf16"}):
            state, prompt = torch.randn(shape), torch.randn(4)
            with monkeypatch.context() as patch:
                patch.setattr(inference, "sample_again", lambda *_: None)
                careful = reverse_diffusion(net, state, prompt, sampler_coefficients(), **options)
            monkeypatch.setattr(inference, "sample", None)
            assert torch.equal(reverse_diffusion(net, state, prompt, sampler_coefficients(), **options), careful)
            monkeypatch.undo()


def test_auto_takes_the_reference_in_float64(make_net: Any, native_calls: list[str]) -> None:
    net = make_net(3, 2, 4, dtype=torch.float64).requires_grad_(False)
    state, prompt = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert reverse_diffusion(net, state, prompt, sampler_coefficients()).dtype == torch.float64
    assert native_calls == []


def test_auto_without_the_compiled_module(
    make_net: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sampler_module._log_once.cache_clear()
    monkeypatch.setattr(native, "available", lambda: (False, "no module; pip install ."))
    net = make_net(3, 2, 4)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="llmdpd"):
        reverse_diffusion(net, torch.randn(4, 3), torch.randn(4), sampler_coefficients())
        with pytest.raises(BackendUnavailableError, match="pip install"):
            reverse_diffusion(net, torch.randn(4, 3), torch.randn(4), sampler_coefficients(), backend="cpp")
    assert "no module; pip install ." in caplog.text


def test_a_named_backend_that_cannot_run_says_why(make_net: Any) -> None:
    net, state, prompt, plan = make_net(3, 2, 4), torch.randn(4, 3), torch.randn(4), sampler_coefficients()
    noise = torch.randn(6, 4, 2, requires_grad=True)
    with pytest.raises(BackendUnavailableError, match="gradient for given noise"):
        reverse_diffusion(net, state, prompt, plan, noise=noise, backend="cpp")
    double = make_net(3, 2, 4, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(BackendUnavailableError, match="float32"):
        reverse_diffusion(double, state.double(), prompt.double(), plan, backend="cpp")
    with pytest.raises(BackendUnavailableError, match=r"triton backend cannot run: \w"):
        reverse_diffusion(net, state, prompt, plan, backend="triton")


# What is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "cuda"}, "backend"),
    "precision": ({"precision": "fp16"}, "precision"),
    "samples": ({"samples": 0}, "samples"),
    "state's width": ({"state": torch.ones(4, 5)}, "state"),
    "state of another dtype than the net": ({"state": torch.ones(4, 3, dtype=torch.float64)}, "state"),
    "prompt's width": ({"prompt": torch.ones(3)}, "prompt"),
    "prompt's batch": ({"prompt": torch.ones(5, 4)}, "prompt"),
    "prompt of another dtype": ({"prompt": torch.ones(4, dtype=torch.float64)}, "prompt"),
    "prompt elsewhere": ({"prompt": torch.ones(4, device="meta")}, "prompt"),
    "noise and seed": ({"noise": torch.ones(6, 4, 2), "seed": 1}, "seed"),
    "seeds of another length": ({"seed": torch.ones(3, dtype=torch.int64)}, "seed"),
    "seeds of another dtype": ({"seed": torch.ones(4)}, "seed"),
    "a fraction as seed": ({"seed": 0.5}, "seed"),
    "a word as seed": ({"seed": "1"}, "seed"),
    "noise of too few steps": ({"noise": torch.ones(5, 4, 2)}, "noise"),
    "noise of another batch": ({"noise": torch.ones(6, 3, 2)}, "noise"),
    "noise without samples": ({"noise": torch.ones(6, 4, 2), "samples": 2}, "noise"),
    "noise of another dtype": ({"noise": torch.ones(6, 4, 2, dtype=torch.float64)}, "noise"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("backend", ["auto", "reference", "cpp"])
def test_refused_with_the_fields_name(make_net: Any, what: str, backend: str) -> None:
    options, field = REFUSED[what]
    arguments = {"state": torch.ones(4, 3), "prompt": torch.ones(4), "backend": backend, **options}
    with torch.no_grad(), pytest.raises(InputError) as error:
        reverse_diffusion(make_net(3, 2, 4), plan=sampler_coefficients(), **arguments)
    assert error.value.field == field
    assert error.value.found is not None
    assert error.value.expected is not None
