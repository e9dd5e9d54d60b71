"""Policies with action chunks: equation 5 over the steps of an episode by hand, what is ignored, what is learned."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmdpd.diffusion import NoiseMLP, alphas
from llmdpd.errors import InputError
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.policy_network import States

A, H = 2, 5


def loss_of(method: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = method.diffusion_loss(batch, method.condition(batch, method.encode(batch)))
    return loss


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.parametrize("P", [1, 3])
def test_the_loss_by_hand(make_method: Any, make_batch: Any, calls_of: Any, P: int, clone: str) -> None:
    method, batch = make_method(clone=clone, eta=0.0, **{"network.chunk": H}), make_batch(12, P, H=H)
    forwards, noises = calls_of(NoiseMLP, "forward"), calls_of(torch, "randn")
    loss = float(loss_of(method, batch).detach())
    ((_, noisy, timesteps, state, prompt, _, predicted),) = forwards
    ((_, _, noise),) = noises
    expected = method.condition(batch, method.encode(batch))
    assert torch.equal(state, expected.state)
    assert torch.equal(prompt, expected.prompt)
    bar = np.cumprod(alphas("vp", 5))
    actions = batch.windows.actions if clone == "executed" else batch.windows.expert_actions
    total = count = 0.0
    for b, h, a in np.ndindex(12, H, A):
        level, n = bar[int(timesteps[b])], h * A + a
        value = np.sqrt(level) * float(actions[b, h, a]) + np.sqrt(1 - level) * float(noise[b, n])
        assert float(noisy[b, n]) == pytest.approx(value, abs=1e-5)
        if batch.windows.mask[b, h]:
            total += (float(predicted[b, n].detach()) - float(noise[b, n])) ** 2
            count += 1
    assert count == A * int(batch.windows.mask.sum()) < 12 * H * A
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_steps_past_the_end_are_ignored(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(eta=0.0, **{"network.chunk": H}), make_batch(8, H=H)
    mask = torch.ones(8, H, dtype=torch.bool)
    mask[:, 3:] = False
    loss_of(method, dataclasses.replace(batch, windows=dataclasses.replace(batch.windows, mask=mask))).backward()
    of_steps = method.policy.net.linears[-1].weight.grad.abs().sum(1).reshape(H, A)
    assert bool((of_steps[:3] > 0).all())
    assert float(of_steps[3:].max()) == 0.0


def test_a_chunk_of_one_is_equation_5_bit_for_bit(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(clone="expert"), make_batch(9, H=3)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    loss = loss_of(method, batch)
    torch.manual_seed(seed)
    timesteps = torch.randint(5, (9,))
    noise = torch.randn_like(batch.expert_actions)
    level = method.policy.alpha_bar[timesteps, None]
    noisy = level.sqrt() * batch.expert_actions + (1 - level).sqrt() * noise
    condition = method.condition(batch, method.encode(batch))
    assert torch.equal(loss, F.mse_loss(method.policy.net(noisy, timesteps, *condition), noise))


def test_critics_and_chunks_exclude_each_other(make_method: Any, make_network: Any) -> None:
    with pytest.raises(InputError, match="clone alone") as error:
        make_method(eta=0.1, **{"network.chunk": 2})
    assert error.value.field == "eta"
    assert "0.1 with chunks of 2 actions" in str(error.value.found)
    with pytest.raises(InputError, match="single actions") as error:
        make_network("llmdpd", **{"network.chunk": 2}).make_critic(hidden=16)
    assert error.value.field == "network.chunk"
    with pytest.raises(InputError, match="more numbers") as error:
        make_network("llmdpd", **{"network.chunk": 40_000})
    assert error.value.field == "network.chunk"
    make_method(eta=0.1)


def test_it_learns_every_step_of_a_chunk_in_its_place(
    make_method: Any, make_batch: Any, rng: np.random.Generator
) -> None:
    """The expert's action at the h-th step of a chunk is the h-th row of a table, past the end its negative."""
    table = torch.from_numpy(rng.choice([-0.8, -0.3, 0.3, 0.8], (3, A)).astype(np.float32))
    learning = {"lr": 1e-2, "lr_final": 0.1, "ema_decay": 0.9, "ema_start": 0}
    method = make_method(iterations=600, eta=0.0, clone="expert", **learning, **{"network.chunk": 3})
    for iteration in range(600):
        batch = make_batch(64, H=3)
        expert = torch.where(batch.windows.mask[..., None], table, -table)
        windows = dataclasses.replace(batch.windows, expert_actions=expert)
        method.update(dataclasses.replace(batch, windows=windows), iteration)
    batch, policy = make_batch(200), method.acting_network
    states = States(batch.observations, None, batch.timesteps)
    with torch.no_grad():
        seeds = torch.from_numpy(rng.integers(0, 2**62, 200))
        sampled = policy.sample(states, method.encode(batch, policy), BestOfN(samples=1), seeds)
    assert sampled.shape == (200, 3, A)
    np.testing.assert_allclose(np.median(sampled, axis=0), table, atol=0.15)
