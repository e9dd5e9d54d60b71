"""Decision Transformers: the loss, scaled returns and time, demonstrations, acting as in training, and the request."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.methods.batch import StepWindows
from llmdpd.methods.decision_transformer import cloning_loss
from llmdpd.nn.acting import ActingConfig
from llmdpd.nn.context import ALL_KEPT, EncodedPrompts, Keep
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import make_tokens
from llmdpd.prompts.useful_part import Recorded

S, A, K = 4, 2, 5


def windows_of(count: int) -> tuple[torch.Tensor, ...]:
    """Returns, states, actions, clock of windows."""
    states, actions = torch.randn(count, K, S), torch.rand(count, K, A)
    return 20 * torch.randn(count, K), states, actions, torch.arange(K).expand(count, -1)


def test_the_loss_is_the_mean_square_over_real_steps(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("dt"), make_batch(6, 2, H=K)
    torch.nn.init.zeros_(method.policy.head.weight)
    answer = 1.5 * np.tanh(method.policy.head.bias.detach().double().numpy())
    actions, mask = batch.windows.actions.double().numpy(), batch.windows.mask.numpy()
    assert not mask.all()
    loss = cloning_loss(method.policy, batch)
    assert float(loss.detach()) == pytest.approx(((actions - answer) ** 2)[mask].mean(), rel=1e-5)
    past = torch.where(batch.windows.mask[..., None], batch.windows.actions, 9.0)
    other = dataclasses.replace(batch, windows=dataclasses.replace(batch.windows, actions=past))
    torch.testing.assert_close(cloning_loss(method.policy, other), loss)


@torch.no_grad()
def test_returns_are_scaled_and_time_is_embedded(make_network: Any) -> None:
    model = make_network("dt")
    assert float(model.return_scale) == 30.0
    returns, states, actions, clock = windows_of(2)
    found = model(returns, states, actions, clock)
    assert not torch.allclose(model(returns, states, actions, clock + 3), found, atol=1e-5)
    # Past the last embedded time step they all are the last one.
    late = [model(returns, states, actions, torch.full_like(clock, at)) for at in (39, 40, 1000)]
    assert torch.equal(late[0], late[1])
    assert torch.equal(late[0], late[2])


@torch.no_grad()
def test_each_window_reads_the_whole_of_its_own_demonstration(
    make_network: Any, make_pairs: Any, rng: np.random.Generator
) -> None:
    model, pairs = make_network("prompt-dt"), make_pairs(3, 6)
    rewards = [rng.normal(size=len(states)).astype(np.float32) for states, _ in pairs]

    def encode(which: list[int], keep: Keep = ALL_KEPT) -> EncodedPrompts:
        tokens = make_tokens([Recorded(*pairs[n], rewards[n]) for n in which], model.reads.encoder, returns=True)
        return model.encode(None, tokens, keep)

    parts = windows_of(4)
    both = model(*parts, encode([0, 1]))
    index = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(model(*parts, encode([0, 1]), index), both)
    for number in (0, 1):
        own = index == number
        alone = model(*(part[own] for part in parts), encode([number]))
        torch.testing.assert_close(alone, both[own], rtol=1e-4, atol=1e-5)
    for part in (pairs[0][0], pairs[0][1], rewards[0]):
        part[-1] += 5.0
        changed = model(*parts, encode([0, 1]))
        part[-1] -= 5.0
        assert not torch.equal(changed[:2], both[:2])
        torch.testing.assert_close(changed[2:], both[2:])
    # It is embedded apart from the episode's own past.
    states, actions = (torch.from_numpy(part)[None] for part in pairs[1])
    earned = torch.from_numpy(rewards[1][::-1].cumsum()[::-1].copy())[None]
    own_past = (earned, states, actions, torch.arange(6)[None])
    joined = model(*(torch.cat([past, now[:1]], 1) for past, now in zip(own_past, parts, strict=True)))[:, 6:]
    assert not torch.allclose(joined, model(*(part[:1] for part in parts), encode([1])), atol=1e-6)
    # A demonstration that is left out is as if there were none.
    dropped = model(*parts, encode([0, 1], Keep(trajectory=torch.tensor([[0.0], [1.0]]))))
    torch.testing.assert_close(dropped[:2], model(*parts)[:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_acts_as_it_was_trained(make_network: Any, rng: np.random.Generator) -> None:
    """Step by step with its memory, the actions are those of one pass over the whole window."""
    model, steps = make_network("dt"), K + 3
    policy = Policy("dt", model, None, ActingConfig()).prompt(target_return=12.0)
    states, rewards = rng.normal(size=(steps, 2, S)).astype(np.float32), rng.normal(size=(steps, 2)).astype(np.float32)
    executed, asked = np.zeros((steps, 2, A), np.float32), np.full((steps, 2), 12.0, np.float32)
    for step in range(steps):
        if step:
            asked[step] = asked[step - 1] - rewards[step - 1]
        returned = policy.act(states[step], reward=rewards[step - 1] if step else None)
        executed[step] = returned
        returned *= 100  # what was returned is the caller's
        seen = slice(max(step - K + 1, 0), step + 1)
        window = (torch.from_numpy(part[seen]).transpose(0, 1) for part in (asked, states, executed))
        expected = model(*window, torch.arange(step + 1)[seen].expand(2, -1))[:, -1]
        np.testing.assert_allclose(executed[step], expected.numpy(), rtol=1e-4, atol=1e-5)
    policy.reset()
    np.testing.assert_allclose(policy.act(states[0]), executed[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_gives_the_return_that_is_asked_for(make_method: Any, make_batch: Any) -> None:
    """One step, in which an action earns its first number: asked for 0.6, the action is 0.6."""
    sizes = {"network.action_bound": 1.0, "network.sequence.context": 1, "network.sequence.layers": 1}
    method = make_method("dt", 300, lr=1e-2, lr_warmup=20, lr_final=0.1, **sizes)
    method.policy.return_scale.fill_(1.0)
    method.ema_policy.return_scale.fill_(1.0)
    for iteration in range(300):
        states, actions = torch.randn(64, 1, S), torch.rand(64, 1, A) * 2 - 1
        windows = StepWindows(states, actions, None, torch.ones(64, 1, dtype=torch.bool), actions[..., 0])
        batch = dataclasses.replace(make_batch(64), timesteps=torch.zeros(64).long(), windows=windows)
        method.update(batch, iteration)
    policy = Policy("dt", method.acting_network, None, ActingConfig())
    for asked in (-0.6, 0.0, 0.6):
        actions = policy.prompt(target_return=asked).act(torch.randn(50, S).numpy())
        assert np.abs(actions[:, 0] - asked).mean() < 0.15
        assert np.abs(actions[:, 1]).mean() < 0.3, "the return says nothing of the second"
