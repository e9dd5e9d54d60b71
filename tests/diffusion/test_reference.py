"""The reference chain: the paper's equation 4, Diffusion-QL's loop, exact gradients, and known data distributions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, SamplerCoefficients, alphas, reverse_diffusion, sampler_coefficients
from llmdpd.diffusion.reference import reverse_diffusion_reference

F64 = torch.float64


def noise_of(plan: SamplerCoefficients, B: int, A: int, N: int = 1) -> Tensor:
    return torch.randn(plan.steps + 1, B, N, A, dtype=F64)


def epsilon(net: NoiseMLP, actions: Tensor, i: int, state: Tensor, prompt: Tensor) -> Tensor:
    """The network's noise from the concatenation [a, t, s, z], anew at each step."""
    time = net.time_embedding(torch.tensor([i])).expand(len(actions), -1)
    x = torch.cat([actions, time, state, prompt.expand(len(actions), -1)], 1)
    for layer in list(net.layers)[:-1]:
        x = torch.nn.functional.mish(layer(x))
    return net.layers[-1](x)


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
@pytest.mark.parametrize("K", [1, 2, 5, 15])
@torch.no_grad()
def test_one_unclipped_step_is_equation_4(rng: np.random.Generator, make_net: Any, K: int, schedule: Any) -> None:
    net = make_net(7, 3, 4, dtype=F64)
    plan = sampler_coefficients("ddpm", steps=K, schedule=schedule, clip=None)
    alpha = alphas(schedule, K)
    state, prompt = torch.randn(6, 7, dtype=F64), torch.randn(6, 4, dtype=F64)
    for row, i in enumerate(range(K - 1, -1, -1)):
        rows = {name: getattr(plan, name)[row : row + 1] for name in ("timesteps", *"peABCS")}
        step = dataclasses.replace(plan, **rows)
        a_k, xi = noise_of(step, 6, 3)
        bar, bar_before = np.prod(alpha[: i + 1]), np.prod(alpha[:i])
        eps = epsilon(net, a_k[:, 0], i, state, prompt)
        mean = (a_k[:, 0] - (1 - alpha[i]) / np.sqrt(1 - bar) * eps) / np.sqrt(alpha[i])
        sigma2 = (1 - bar_before) / (1 - bar) * (1 - alpha[i])
        found = reverse_diffusion(net, state, prompt, step, noise=torch.stack([a_k, xi]))
        # 1e-9 relative to the step's largest intermediate: x0 is reached by a division by sqrt(bar).
        scale = float(mean.abs().max()) / np.sqrt(bar)
        torch.testing.assert_close(found, mean + np.sqrt(sigma2) * xi[:, 0], rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
@pytest.mark.parametrize(("K", "bound"), [(5, 1.0), (15, 0.7), (2, 3.0)])
@torch.no_grad()
def test_chain_is_diffusion_qls_loop(
    rng: np.random.Generator, make_net: Any, K: int, bound: float, schedule: Any
) -> None:
    net = make_net(5, 4, 3, dtype=F64)
    state, prompt = torch.randn(9, 5, dtype=F64), torch.randn(3, dtype=F64)
    plan = sampler_coefficients("ddpm", steps=K, schedule=schedule, clip=bound)
    noise = noise_of(plan, 9, 4)
    bar = np.concatenate([[1.0], np.cumprod(alphas(schedule, K))])
    x = noise[0, :, 0]
    for draw, k in enumerate(range(K, 0, -1), start=1):
        beta = 1 - bar[k] / bar[k - 1]
        x0 = (x - np.sqrt(1 - bar[k]) * epsilon(net, x, k - 1, state, prompt)) / np.sqrt(bar[k])
        x0 = x0.clamp(-bound, bound)
        mean = beta * np.sqrt(bar[k - 1]) / (1 - bar[k]) * x0
        mean = mean + (1 - bar[k - 1]) * np.sqrt(1 - beta) / (1 - bar[k]) * x
        variance = beta * (1 - bar[k - 1]) / (1 - bar[k])
        x = mean + (np.sqrt(variance) * noise[draw, :, 0] if k > 1 else 0.0)
    expected = x.clamp(-bound, bound)
    torch.testing.assert_close(reverse_diffusion(net, state, prompt, plan, noise=noise), expected, rtol=1e-9, atol=1e-9)
    assert (expected.abs() < bound).any()  # else only the clip was compared


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m"])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_gradients(rng: np.random.Generator, make_net: Any, name: Any, clip: float | None) -> None:
    """Of state, prompt and every weight, through the whole chain, against finite differences in float64."""
    net = make_net(2, 2, 3, 5, 4, dtype=F64)
    plan = sampler_coefficients(name, steps=3, schedule="cosine" if clip is None else "vp", clip=clip)
    state = torch.randn(2, 2, dtype=F64, requires_grad=True)
    prompt = torch.randn(3, dtype=F64, requires_grad=True)
    noise = 0.5 * noise_of(plan, 2, 2, 2)
    parameters = list(net.parameters())

    def chain(state: Tensor, prompt: Tensor, *parameters: Tensor) -> Tensor:
        return reverse_diffusion(net, state, prompt, plan, samples=2, noise=noise)

    assert torch.autograd.gradcheck(chain, (state, prompt, *parameters), atol=1e-5, rtol=1e-3)
    gradients = torch.autograd.grad(chain(state, prompt).sum(), [state, prompt, *parameters])
    if clip is None:
        assert all(bool((g != 0).any()) for g in gradients)


class GaussianEpsilon:
    """The exact E[eps | a_k] for data from N(mu, s^2), in place of a network."""

    def __init__(self, mu: Tensor, s: float, train_steps: int) -> None:
        self.mu, self.s = mu, s
        self.bar = torch.from_numpy(np.cumprod(alphas("vp", train_steps)))

    def context(self, state: Tensor, prompt: Tensor) -> Tensor:
        return torch.zeros(len(state), 1, dtype=F64)

    def time_rows(self, timesteps: Tensor) -> Tensor:
        return self.bar[timesteps][:, None]

    def denoise(self, actions: Tensor, context: Tensor, bar: Tensor) -> Tensor:
        return (1 - bar).sqrt() * (actions - bar.sqrt() * self.mu) / (bar * self.s**2 + 1 - bar)

    def ode(self, noise: Tensor) -> Tensor:
        """Where the probability-flow ODE takes a_K, exactly."""
        bar = self.bar[-1]
        return self.mu + self.s * (noise - bar.sqrt() * self.mu) / (bar * self.s**2 + 1 - bar).sqrt()

    def run(self, plan: SamplerCoefficients, noise: Tensor) -> Tensor:
        empty = torch.zeros(noise.shape[1], 0, dtype=F64)
        return reverse_diffusion_reference(self, empty, empty, plan, noise)[:, 0]  # type: ignore[arg-type]


@pytest.fixture
def gaussian(rng: np.random.Generator) -> GaussianEpsilon:
    return GaussianEpsilon(torch.from_numpy(rng.uniform(-1, 1, 2)), float(rng.uniform(0.2, 0.6)), 1000)


@pytest.mark.parametrize(
    ("name", "steps", "eta"), [("ddpm", 1000, 0.0), ("ddim", 200, 0.0), ("ddim", 1000, 1.0), ("dpm++2m", 50, 0.0)]
)
def test_samples_have_the_datas_mean_and_variance(gaussian: GaussianEpsilon, name: Any, steps: int, eta: float) -> None:
    plan = sampler_coefficients(name, steps=steps, clip=None, train_steps=1000, eta=eta)
    draws = gaussian.run(plan, noise_of(plan, 4000, 2))
    assert (
        float((draws.mean(0) - gaussian.mu).abs().max()) < 6 * gaussian.s / np.sqrt(4000) + 0.01
    )  # six standard errors, and the discretisation
    np.testing.assert_allclose(draws.std(0), gaussian.s, rtol=0.1)


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_second_order_beats_first(gaussian: GaussianEpsilon, steps: int) -> None:
    errors = {}
    for name in ("ddim", "dpm++2m"):
        plan = sampler_coefficients(name, steps=steps, clip=None, train_steps=1000)  # type: ignore[arg-type]
        noise = noise_of(plan, 500, 2)
        errors[name] = float((gaussian.run(plan, noise) - gaussian.ode(noise[0, :, 0])).norm() / noise[0].norm())
    assert errors["dpm++2m"] < 0.5 * errors["ddim"]


@pytest.mark.parametrize(("name", "counts"), [("ddim", (10, 50, 250)), ("dpm++2m", (4, 12, 50))])
def test_error_falls_with_steps(gaussian: GaussianEpsilon, name: Any, counts: tuple[int, ...]) -> None:
    errors = []
    for steps in counts:
        plan = sampler_coefficients(name, steps=steps, clip=None, train_steps=1000)
        noise = noise_of(plan, 300, 2)
        errors.append(float((gaussian.run(plan, noise) - gaussian.ode(noise[0, :, 0])).norm() / noise[0].norm()))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.01
