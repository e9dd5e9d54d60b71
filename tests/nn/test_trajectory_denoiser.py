"""The plan denoiser and its reverse chain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import alphas, philox_normal, sampler_coefficients
from llmdpd.nn.trajectory_denoiser import _BLOCK, TrajectoryConfig, TrajectoryDenoiser, reverse_trajectory, with_present

S, A, F, Z = 3, 2, 5, 4
SAMPLERS = pytest.mark.parametrize(("name", "steps"), [("ddpm", 12), ("ddim", 4), ("dpm++2m", 4)])


def make_net(horizon: int = 6, **changes: Any) -> TrajectoryDenoiser:
    sizes = {"layers": 2, "width": 16, "inner": 24, **changes}
    net = TrajectoryDenoiser(S + A, F, Z, 8, TrajectoryConfig(horizon=horizon, **sizes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(batch, S) * 2 - 1, torch.randn(batch, F), torch.randn(batch, Z)


@pytest.mark.usefixtures("rng")
def test_everything_that_it_is_given_matters() -> None:
    net, B = make_net(), 4
    _, state, prompt = inputs(B)
    plan, timesteps = torch.randn(B, 6, S + A), torch.tensor([0, 3, 7, 11])
    before = net(plan, timesteps, state, prompt)
    assert before.shape == plan.shape
    others = {
        "plan": (plan + torch.randn_like(plan), timesteps, state, prompt),
        "timesteps": (plan, timesteps + 1, state, prompt),
        "state": (plan, timesteps, state + 1, prompt),
        "prompt": (plan, timesteps, state, prompt + 1),
        "order of steps": (plan.flip(1), timesteps, state, prompt),
    }
    for name, changed in others.items():
        assert ((net(*changed) - before).abs().amax((1, 2)) > 1e-3).all(), name
    # Each step attends to every other one.
    nudged = plan.clone()
    nudged[:, -1] += 1
    assert ((net(nudged, timesteps, state, prompt) - before)[:, 0].abs().amax(1) > 1e-4).all()


@pytest.mark.usefixtures("rng")
def test_a_shared_prompt_is_each_rows_prompt() -> None:
    net = make_net()
    _, state, prompt = inputs(3)
    plan, timesteps = torch.randn(3, 6, S + A), torch.tensor([1, 2, 3])
    shared = net(plan, timesteps, state, prompt[0])
    torch.testing.assert_close(shared, net(plan, timesteps, state, prompt[:1].expand(3, -1)))
    bare = TrajectoryDenoiser(S + A, F, 0, 8, TrajectoryConfig(horizon=6, layers=1, width=8, inner=8))
    assert bare(plan, timesteps, state, torch.zeros(0)).shape == plan.shape


def test_masked_steps_have_no_effect(rng: np.random.Generator) -> None:
    net = make_net()
    _, state, prompt = inputs(5)
    plan, timesteps = torch.randn(5, 6, S + A), torch.arange(5)
    real = torch.from_numpy(rng.integers(1, 6, 5))
    mask = torch.arange(6) < real[:, None]
    before = net(plan, timesteps, state, prompt, mask)
    other = torch.where(mask[..., None], plan, 100 * torch.randn_like(plan))
    torch.testing.assert_close(net(other, timesteps, state, prompt, mask)[mask], before[mask])
    assert not torch.allclose(net(other, timesteps, state, prompt)[mask], before[mask])
    whole = torch.ones_like(mask)
    torch.testing.assert_close(net(plan, timesteps, state, prompt, whole), net(plan, timesteps, state, prompt))


@SAMPLERS
@pytest.mark.usefixtures("rng")
def test_the_present_state_stands_in_the_plan_at_every_step(
    name: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net()
    present, state, prompt = inputs(_BLOCK)
    seen: list[Tensor] = []
    denoise = net.denoise
    monkeypatch.setattr(net, "denoise", lambda x, *rest: seen.append(x.clone()) or denoise(x, *rest))
    plan = sampler_coefficients(name, steps, train_steps=12)
    with torch.no_grad():
        drawn = reverse_trajectory(net, present, state, prompt, plan, torch.arange(_BLOCK))
    assert len(seen) == steps
    for x in (*seen, drawn):
        assert torch.equal(x[:, 0, :S], present)
    assert drawn.shape == (_BLOCK, 6, S + A)
    assert (drawn.abs() <= 1).all()
    assert all(((x[:, 1:] != seen[0][:, 1:]).float().mean() > 0.9) for x in seen[1:])


@SAMPLERS
@pytest.mark.usefixtures("rng")
def test_with_the_right_noise_the_chain_ends_at_the_plan(
    name: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of one plan alone: the exact epsilon is known, and every sampler must end there."""
    net, B, T = make_net(), _BLOCK, 12
    present, state, prompt = inputs(B)
    truth = with_present(torch.rand(B, 6, S + A) * 1.6 - 0.8, present)
    bar = torch.from_numpy(np.cumprod(alphas("vp", T))).float()
    monkeypatch.setattr(net, "time_rows", lambda timesteps: bar[timesteps][:, None])
    monkeypatch.setattr(net, "denoise", lambda x, _, level: (x - level.sqrt() * truth) / (1 - level).sqrt())
    plan = sampler_coefficients(name, steps, train_steps=T)
    drawn = reverse_trajectory(net, present, state, prompt, plan, torch.arange(B))
    torch.testing.assert_close(drawn, truth, rtol=0, atol=1e-4)


@SAMPLERS
def test_a_plan_depends_on_its_own_key(rng: np.random.Generator, name: Any, steps: int) -> None:
    net, B = make_net(), 7
    present, state, prompt = inputs(B)
    seeds = torch.from_numpy(rng.integers(-(2**62), 2**62, B))
    plan = sampler_coefficients(name, steps, train_steps=12)
    with torch.no_grad():
        together = reverse_trajectory(net, present, state, prompt, plan, seeds)
        assert torch.equal(together, reverse_trajectory(net, present, state, prompt, plan, seeds))
        order = torch.from_numpy(rng.permutation(B))
        shuffled = reverse_trajectory(net, present[order], state[order], prompt[order], plan, seeds[order])
        alone = reverse_trajectory(net, present[2:3], state[2:3], prompt[2], plan, seeds[2:3])
        other = reverse_trajectory(net, present, state, prompt, plan, seeds + 1)
        nothing = reverse_trajectory(net, present[:0], state[:0], prompt[0], plan, seeds[:0])
    # But for rounding: some machines' products round a row by its place among the others.
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, together[2:3], rtol=0, atol=1e-4)
    assert nothing.shape == (0, 6, S + A)
    assert not torch.allclose(other, together, atol=1e-3)


@pytest.mark.usefixtures("rng")
def test_the_noise_is_scaled_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    present, state, prompt = inputs(_BLOCK)
    starts: list[Tensor] = []
    denoise = net.denoise
    monkeypatch.setattr(net, "denoise", lambda x, *rest: starts.append(x) or denoise(x, *rest))
    seeds = torch.arange(_BLOCK) + 5
    reverse_trajectory(
        net, present, state, prompt, sampler_coefficients("ddim", 1, train_steps=12, noise_scale=0.3), seeds
    )
    expected = 0.3 * philox_normal(seeds, _BLOCK, 6, 1, S + A)[0].float()
    torch.testing.assert_close(starts[0], with_present(expected, present))
