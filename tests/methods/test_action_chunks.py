"""Policies with chunks: equation 5 over the steps of an episode by hand, what counts nothing, and that it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmdpd.diffusion import alphas
from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.nn.context import Condition
from llmdpd.policy.policy import Policy

A, H = 2, 5


def condition_of(agent: LLMDPD, batch: PromptedBatch) -> Condition:
    prompts = agent.policy.encode(batch.text, batch.tokens)
    return agent.policy.condition(batch.observations, prompts, None, batch.timesteps)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every call of a noise network, and what it gave."""
    from llmdpd.diffusion import NoiseMLP

    calls: list[tuple[Any, ...]] = []
    forward = NoiseMLP.forward

    def spy(self: Any, *arguments: Any) -> Tensor:
        predicted = forward(self, *arguments)
        calls.append((*arguments, predicted))
        return predicted

    monkeypatch.setattr(NoiseMLP, "forward", spy)
    return calls


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.parametrize("P", [1, 3])
def test_the_loss_by_hand(
    make_agent: Any, make_batch: Any, forwards: Any, monkeypatch: pytest.MonkeyPatch, P: int, clone: str
) -> None:
    agent, batch = make_agent(chunk=H, clone=clone, eta=0.0), make_batch(12, P, H=H)
    drawn: list[Tensor] = []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1])
    loss = float(agent.diffusion_loss(batch, condition_of(agent, batch)).detach())
    ((noisy, timesteps, state, prompt, _, predicted),) = forwards
    (noise,) = drawn
    expected = condition_of(agent, batch)
    assert torch.equal(state, expected.state)
    assert torch.equal(prompt, expected.prompt)
    bar = np.cumprod(alphas("vp", 5))
    actions = batch.windows.actions if clone == "executed" else batch.windows.expert_actions
    total = count = 0.0
    for b in range(12):
        level = bar[int(timesteps[b])]
        for h in range(H):
            for a in range(A):
                n = h * A + a
                value = np.sqrt(level) * float(actions[b, h, a]) + np.sqrt(1 - level) * float(noise[b, n])
                assert float(noisy[b, n]) == pytest.approx(value, abs=1e-5)
                if batch.windows.mask[b, h]:
                    total += (float(predicted[b, n].detach()) - float(noise[b, n])) ** 2
                    count += 1
    assert count == A * int(batch.windows.mask.sum())
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_steps_past_the_end_count_nothing(make_agent: Any, make_batch: Any) -> None:
    agent, batch = make_agent(chunk=H, eta=0.0), make_batch(8, H=H)
    mask = torch.ones(8, H, dtype=torch.bool)
    mask[:, 3:] = False
    batch = dataclasses.replace(batch, windows=dataclasses.replace(batch.windows, mask=mask))
    agent.diffusion_loss(batch, condition_of(agent, batch)).backward()
    last = agent.policy.net.linears[-1]
    of_steps = last.weight.grad.abs().sum(1).reshape(H, A)
    assert bool((of_steps[:3] > 0).all())
    assert float(of_steps[3:].max()) == 0.0


def test_a_chunk_of_one_is_equation_5_as_it_was_bit_for_bit(make_agent: Any, make_batch: Any) -> None:
    agent, batch = make_agent(chunk=1, clone="expert"), make_batch(9, H=3)
    condition = condition_of(agent, batch)
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    loss = agent.diffusion_loss(batch, condition)
    torch.manual_seed(seed)
    timesteps = torch.randint(5, (9,))
    noise = torch.randn_like(batch.expert_actions)
    level = agent.policy.alpha_bar[timesteps, None]
    noisy = level.sqrt() * batch.expert_actions + (1 - level).sqrt() * noise
    assert torch.equal(loss, F.mse_loss(agent.policy.net(noisy, timesteps, *condition), noise))


def test_the_reward_term_is_refused(make_agent: Any) -> None:
    with pytest.raises(InputError, match="clone alone") as error:
        make_agent(chunk=2, eta=0.1)
    assert error.value.field == "agent.eta"
    assert "0.1" in str(error.value.found)
    assert "2 actions" in str(error.value.found)
    make_agent(chunk=2, eta=0.0)
    make_agent(chunk=1, eta=0.1)


def test_it_learns_every_step_of_a_chunk_in_its_place(
    make_agent: Any, make_batch: Any, rng: np.random.Generator
) -> None:
    """The expert's action at the h-th step of a chunk is the h-th row of a table; past the end stands its contrary."""
    table = torch.from_numpy(rng.choice([-0.8, -0.3, 0.3, 0.8], (3, A)).astype(np.float32))
    agent = make_agent(250, chunk=3, eta=0.0, clone="expert", lr=1e-2, lr_final=0.1, ema_decay=0.9, ema_start=0)
    for iteration in range(250):
        batch = make_batch(64, H=3)
        right = torch.where(batch.windows.mask[..., None], table, -table)
        windows = dataclasses.replace(batch.windows, expert_actions=right)
        agent.update(dataclasses.replace(batch, windows=windows), iteration)
    policy = Policy(agent.ema_policy, None, ActingConfig(samples=1))
    batch = make_batch(200)
    prompts = policy.network.encode(batch.text, batch.tokens)
    steps, seeds = np.zeros(200, np.int64), rng.integers(0, 2**62, 200)
    drawn = policy.draw_many(batch.observations.numpy(), prompts, None, steps, seeds)
    assert drawn.shape == (200, 3, A)
    np.testing.assert_allclose(np.median(drawn, axis=0), table, atol=0.15)
