"""MCQ+ADS: both regressions by hand, the step through a step by differences, and what makes a split the hardest."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.errors import InputError
from llmdpd.utils.bounds import check_config

S, A = 4, 2


@pytest.fixture
def numbers(q_by_hand: Any) -> Any:
    """An MLP with ReLU in numpy."""
    return partial(q_by_hand, lambda x: np.maximum(x, 0))


def regression_of(method: Any, batch: Any) -> Any:
    return method.regression(batch, method.encode(batch), method.policy)


def test_mcqs_regressions(make_method: Any, make_batch: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = make_method("ads", samples=3, gamma=0.9, reward_scale=2.0, data_weight=0.7), make_batch(6)
    with torch.no_grad():
        method.temperature.log.fill_(-0.7)
    sampled, density, tried = torch.rand(1, 12, A) * 2 - 1, torch.randn(1, 12), torch.rand(36, A) * 2 - 1
    monkeypatch.setattr(method.policy, "rsample", lambda condition: (sampled, density))
    monkeypatch.setattr(method.behaviour, "sample", lambda state: tried)
    both = method.policy.context.features(torch.cat([batch.observations, batch.next_observations])).numpy()
    now, later = both[:6], both[6:]
    targets = (method.target_critic.q1, method.target_critic.q2)
    value = np.minimum(*(numbers(q, later, sampled[0, 6:])[:, 0] for q in targets))
    value -= np.exp(-0.7) * density[0, 6:].numpy()
    target = 2 * batch.rewards.numpy() + 0.9 * (1 - batch.terminals.numpy()) * value
    known = [numbers(q, np.tile(both, (3, 1)), tried)[:, 0].reshape(3, 12).max(0) for q in targets]
    expected = 0.0
    for q in (method.critic.q1, method.critic.q2):
        data = (numbers(q, now, batch.actions)[:, 0] - target) ** 2
        policy = (numbers(q, both, sampled[0])[:, 0] - np.minimum(*known)) ** 2
        expected += 0.7 * data.mean() + 0.3 * policy.mean()
    method.schedule(0)  # before the split begins
    assert float(method.critic_loss(batch)[0].detach()) == pytest.approx(expected, rel=1e-4)


def test_what_validates_is_learned_through_the_step_ahead(make_method: Any, make_batch: Any) -> None:
    """The gradient of L_training(theta) + w L_validation(theta - a grad L_training(theta)), by differences."""
    method = make_method("ads", inner_lr=0.05, validation_weight=0.8)
    data = regression_of(method, make_batch(20))
    data = data._replace(actions=data.actions.double(), targets=data.targets.double())
    data = data._replace(condition=type(data.condition)(*(part.double() for part in data.condition)))
    method.critic.double()
    training, validation = torch.arange(14), torch.arange(14, 20)

    def total() -> torch.Tensor:
        loss = method.errors(data.rows(training)).mean(1).sum()
        return loss + 0.8 * method.errors(data.rows(validation), method.looked_ahead(loss)).mean(1).sum()

    weight = method.critic.q1[0].weight
    (gradient,) = torch.autograd.grad(total(), weight)
    where = divmod(int(gradient.abs().argmax()), weight.shape[1])
    found = []
    for change in (1e-6, -2e-6):
        with torch.no_grad():
            weight[where] += change
        found.append(float(total().detach()))
    assert (found[0] - found[1]) / 2e-6 == pytest.approx(float(gradient[where]), rel=1e-4)


def test_the_hardest_split_is_what_training_on_the_rest_leaves_worst(make_method: Any, make_batch: Any) -> None:
    method = make_method("ads", split="adversarial", split_step=5e-3, split_rounds=3, training_share=0.75)
    data = regression_of(method, make_batch(40))
    parameters = {name: p.detach() for name, p in method.critic.named_parameters()}
    training = torch.randperm(40)[:30]
    found = method.hardness(data, parameters, training)
    loss = method.errors(data.rows(training), {n: p.requires_grad_() for n, p in parameters.items()})[0].mean()
    gradients = torch.autograd.grad(loss, [p for n, p in parameters.items() if n.startswith("q1")])
    with torch.no_grad():
        before = method.errors(data)[0]
        for parameter, gradient in zip(method.critic.q1.parameters(), gradients, strict=True):
            parameter -= 5e-3 * gradient
        after = method.errors(data)[0]
        for parameter, gradient in zip(method.critic.q1.parameters(), gradients, strict=True):
            parameter += 5e-3 * gradient
    change = after - before
    torch.testing.assert_close(found.detach() - before, change, rtol=0.1, atol=0.1 * float(change.abs().max()))
    training, validation = method.split(data)
    assert (len(training), len(validation)) == (30, 10)
    assert sorted(torch.cat([training, validation]).tolist()) == list(range(40))
    assert before[validation].mean() > 2 * before[training].mean()


def test_a_split_at_random_differs_and_begins_in_time(make_method: Any, make_batch: Any, calls_of: Any) -> None:
    method, batch = make_method("ads", iterations=10, start=0.5), make_batch(20)
    splits = calls_of(method, "split")
    for iteration in range(10):
        metrics = method.update(batch, iteration)
        assert len(splits) == max(0, iteration - 4)
        assert all(torch.isfinite(value) for value in metrics.values())
    parts = [(set(training.tolist()), set(validation.tolist())) for _, (training, validation) in splits]
    assert all(len(training) == 16 and len(validation) == 4 for training, validation in parts)
    assert all(training | validation == set(range(20)) for training, validation in parts)
    assert len({tuple(sorted(validation)) for _, validation in parts}) > 1


@pytest.mark.parametrize("split", ["random", "adversarial"])
@pytest.mark.parametrize(("share", "rows"), [(0.99, 3), (0.0, 2), (0.5, 2)])
def test_both_parts_of_every_split_have_transitions(
    make_method: Any, make_batch: Any, split: str, share: float, rows: int
) -> None:
    method = make_method("ads", start=0.0, split=split, training_share=share)
    assert all(len(part) >= 1 for part in method.split(regression_of(method, make_batch(rows))))
    assert all(torch.isfinite(value) for value in method.update(make_batch(rows), 0).values())


@pytest.mark.parametrize(("field", "value"), [("training_share", 1.0), ("batch_size", 1)])
def test_a_split_without_a_part_is_refused(make_config: Any, field: str, value: float) -> None:
    with pytest.raises(InputError) as refused:
        check_config(make_config("ads", **{field: value}))
    assert refused.value.field == field


def test_the_actor_ahead_is_a_step_away_and_the_actor_stays(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("ads", lr=1e-3), make_batch(30)
    condition = method.condition(batch, method.encode(batch)).detached()
    before = [p.clone() for p in method.policy.parameters()]
    ahead = method.actor_ahead(condition, dict(method.critic.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, method.policy.parameters(), strict=True))
    pairs = zip(ahead.net.parameters(), method.policy.net.parameters(), strict=True)
    moved = torch.cat([(a - b).detach().flatten() for a, b in pairs])
    assert float(moved.abs().max()) == pytest.approx(1e-3, rel=0.02)
    assert float((moved.abs() > 0.9e-3).float().mean()) > 0.5, "Adam's first step has the rate's length"
    values = []
    for actor in (method.policy, ahead):
        torch.manual_seed(0)
        with torch.no_grad():
            actions, density = (part.flatten(0, 1) for part in actor.rsample(condition, 200))
            many = type(condition)(*(part.expand(30, -1).repeat(200, 1) for part in condition))
            values.append(float((method.critic.minimum(many, actions) - density).mean()))
    assert values[1] > values[0]


def test_the_vae_learns_what_is_done_in_a_state(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("ads", behaviour_lr=3e-3), make_batch(60)
    state = method.condition(batch, method.encode(batch)).joined().detach()
    distances = []
    for step in range(900):
        if step in (0, 899):
            found = method.behaviour.sample(state).detach()
            assert (found.abs() <= 1).all()
            distances.append(float((found - 0.5 * batch.actions).square().mean()))
        method.step("behaviour", method.behaviour.loss(state, 0.5 * batch.actions))
    assert distances[1] < 0.5 * distances[0]
