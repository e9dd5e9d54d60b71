"""RD: its critics' loss by hand from each member's own network, and that features are told apart."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmdpd.nn.context import Condition
from llmdpd.nn.critic import EnsembleQ

S, A = 4, 2


def member(critic: EnsembleQ, which: int) -> nn.Sequential:
    """One of the ensemble's networks as layers of its own."""
    layers: list[nn.Module] = []
    for layer in (*critic.hidden, critic.last):
        own = nn.Linear(layer.weight.shape[1], layer.weight.shape[2])
        own.weight, own.bias = nn.Parameter(layer.weight[which].T), nn.Parameter(layer.bias[which, 0])
        layers += [own, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture
def numbers(q_by_hand: Any) -> Any:
    """An MLP with ReLU in numpy."""
    return partial(q_by_hand, lambda x: np.maximum(x, 0))


def test_the_ensemble_is_its_members(numbers: Any) -> None:
    critic = EnsembleQ(4, S, A, 3, (17, 5))
    state, prompt, action = torch.randn(7, S), torch.randn(7, 3), torch.randn(7, A)
    values = critic(Condition(state, prompt), action).detach()
    assert values.shape == (4, 7)
    for which in range(4):
        expected = numbers(member(critic, which), state, prompt, action)[:, 0]
        np.testing.assert_allclose(values[which], expected, rtol=1e-4, atol=1e-5)
    assert len({float(value) for value in values[:, 0]}) == 4, "each begins from weights of its own"


def test_rds_loss(make_method: Any, make_batch: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"policy_noise": 0.0, "gamma": 0.9, "uncertainty": 1.5, "distinction": 0.3, "reward_scale": 0.5}
    method, batch = make_method("rd", **sizes), make_batch(8)
    near = torch.arange(8) % 2 == 0
    partner = torch.where(near[:, None], torch.rand(8, A), batch.actions)
    monkeypatch.setattr(method, "partners", lambda data, own: (partner, near))
    features = method.policy.context.features
    now, later = features(batch.observations).numpy(), features(batch.next_observations).numpy()
    following = np.tanh(numbers(method.target_policy.net, later))
    own = np.tanh(numbers(method.policy.net, now))
    members = range(3)
    at_next = np.stack([numbers(member(method.target_critic, i), later, following)[:, 0] for i in members])
    value = at_next.mean(0) - 1.5 * at_next.std(0)
    target = 0.5 * batch.rewards.numpy() + 0.9 * (1 - batch.terminals.numpy()) * value
    expected = 0.0
    for i in members:
        network = member(method.critic, i)
        expected += ((numbers(network, now, batch.actions)[:, 0] - target) ** 2).mean()
        hidden = [np.maximum(numbers(network[:-1], now, action), 0) for action in (own, partner)]
        expected += 0.3 * (hidden[0] * hidden[1]).sum(1).mean()
    assert float(method.critic_loss(batch, method.encode(batch))[0].detach()) == pytest.approx(expected, rel=1e-4)


def test_the_generator_steps_in_near_the_data(make_method: Any) -> None:
    method = make_method("rd", near=0.2, **{"network.action_bound": 1.5})
    data = torch.rand(400, A) * 2 - 1
    own = data + torch.where(torch.arange(400) % 2 == 0, 0.29, 0.31)[:, None]
    partner, near = method.partners(data, own)
    assert near.tolist() == [place % 2 == 0 for place in range(400)]
    assert torch.equal(partner[~near], data[~near])
    assert 1.4 < float(partner[near].abs().max()) <= 1.5
    assert float((partner[near] - data[near]).abs().mean()) > 0.3


def test_the_features_are_told_apart(make_method: Any, make_batch: Any) -> None:
    products = []
    for distinction in (0.0, 1.0):
        torch.manual_seed(0)
        method, batch = make_method("rd", distinction=distinction, critic_lr=3e-3), make_batch(40)
        for iteration in range(60):
            metrics = method.update(batch, iteration)
        products.append(float(metrics["loss/distinction"]))
    assert products[1] < 0.2 * products[0]


def test_the_actor_goes_by_the_lowered_value_and_waits_its_turn(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("rd", uncertainty=3.0, policy_every=3, lr=3e-3), make_batch(30)
    condition = method.condition(batch, method.encode(batch)).detached()
    values = []
    for iteration in range(60):
        before = [p.clone() for p in method.policy.parameters()]
        with torch.no_grad():
            values.append(float(method.lowered(method.critic(condition, method.policy(condition))).mean()))
        method.schedule(iteration)
        loss = method.actor_loss(batch, method.encode(batch))
        assert all(p.grad is None for p in method.critic.parameters()), "the actor's loss trains the actor alone"
        method.step("policy", loss)
        assert not all(torch.equal(a, b) for a, b in zip(before, method.policy.parameters(), strict=True))
    assert values[-1] > values[0]
    metrics = [method.update(batch, iteration) for iteration in range(3)]
    assert ["loss/actor" in each for each in metrics] == [False, False, True]
