"""Trajectory diffusion: its loss by hand, what is ignored, the scale of states."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import alphas
from llmdpd.methods import trajectory_diffusion
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.spaces import Spaces

S, A, H = 4, 2, 5
NAME = "trajectory-diffusion"


@pytest.fixture
def batch(make_batch: Any) -> PromptedBatch:
    """A batch of two prompts; its windows end after 1 to H steps, and hold anything after their end."""
    made: PromptedBatch = make_batch(6, 2, H=H)
    return made


def losses(method: Any, batch: PromptedBatch, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    found: tuple[Tensor, Tensor] = method.diffusion_loss(batch.windows, method.condition(batch, method.encode(batch)))
    return found


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.parametrize(("bound", "weight"), [(1.0, 10.0), (0.5, 3.0)])
def test_the_loss_by_hand(
    make_method: Any, batch: PromptedBatch, calls_of: Any, clone: str, bound: float, weight: float
) -> None:
    method = make_method(NAME, clone=clone, first_action_weight=weight, **{"network.action_bound": bound})
    calls, noises = calls_of(type(method.policy.net), "forward"), calls_of(trajectory_diffusion, "randn")
    loss, first_action = losses(method, batch)
    ((_, noisy, timesteps, state, prompt, mask, predicted),) = calls
    ((*_, noise),) = noises
    windows = batch.windows
    assert windows is not None
    assert torch.equal(mask, windows.mask)
    condition = method.condition(batch, method.encode(batch))
    assert torch.equal(state, condition.state)
    assert torch.equal(prompt, condition.prompt)

    low, high = method.policy.low.double().numpy(), method.policy.high.double().numpy()
    unit = ((windows.states.double().numpy() - low) / (high - low) * 2 - 1).clip(-1, 1)
    actions = windows.actions if clone == "executed" else windows.expert_actions
    assert actions is not None
    clean = np.concatenate([unit * bound, actions.double().numpy()], -1)
    level = np.cumprod(alphas("vp", 7))[timesteps.numpy()][:, None, None]
    expected = np.sqrt(level) * clean + np.sqrt(1 - level) * noise.numpy()
    expected[:, 0, :S] = clean[:, 0, :S]  # the present state is known
    real = windows.mask.numpy()
    np.testing.assert_allclose(noisy.numpy()[real], expected[real], atol=1e-4)
    error = (predicted.detach().double().numpy() - noise.numpy()) ** 2
    weights = np.ones_like(error) * real[..., None]
    weights[:, 0] = np.repeat([0.0, weight], [S, A])
    assert float(loss.detach()) == pytest.approx((weights * error).sum() / weights.sum(), rel=1e-4)
    assert float(first_action.detach()) == pytest.approx(error[:, 0, S:].mean(), rel=1e-4)


def test_steps_past_the_end_have_no_influence(make_method: Any, batch: PromptedBatch) -> None:
    method, windows = make_method(NAME), batch.windows
    assert windows is not None
    past = ~windows.mask[..., None]
    other = dataclasses.replace(
        windows,
        states=torch.where(past, torch.full_like(windows.states, float("nan")), windows.states),
        actions=torch.where(past, torch.randn_like(windows.actions), windows.actions),
    )
    inside = dataclasses.replace(windows, actions=torch.where(past, windows.actions, -windows.actions))
    values, gradients = [], []
    for given in (windows, other, inside):
        method.policy.zero_grad()
        loss = losses(method, dataclasses.replace(batch, windows=given))[0]
        loss.backward()
        values.append(float(loss.detach()))
        gradients.append([p.grad.clone() for p in method.policy.parameters() if p.grad is not None])
    assert values[0] == values[1] != values[2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients[:2], strict=True))


@pytest.mark.parametrize("bound", [1.0, 0.3])
def test_states_are_scaled_to_the_bound(make_network: Any, bound: float) -> None:
    network = make_network(NAME, Spaces(3, 2, 6), **{"network.action_bound": bound})
    seen = torch.tensor([[0.0, 5.0, 7.0], [2.0, 5.0, 9.0], [1.0, 5.0, 7.5]])
    network.fit(seen, lambda: torch.zeros(3))
    expected = bound * torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0], [0.0, 0.0, -0.5]])
    torch.testing.assert_close(network.scaled(seen), expected)
    # Beyond the range of the training data it stops at the bound; a number that was constant there stays 0.
    beyond = network.scaled(torch.tensor([-3.0, 6.0, 100.0]))
    torch.testing.assert_close(beyond, bound * torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(network.context.features.mean, torch.tensor([1.0, 5.0, 23.5 / 3]))
    assert {"low", "high"} <= network.state_dict().keys()
