"""The baselines without history: their losses by hand, state augmentation, and that each does better than its data."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.config.presets import find_preset, with_method
from llmdpd.methods import METHODS
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.diffusion_ql import DiffusionQLConfig
from llmdpd.methods.td3_bc import RADAugmentation
from llmdpd.nn.acting import NoisyActing
from llmdpd.nn.context import Condition
from llmdpd.policy.policy import Policy

S, A = 4, 2
NAMES = ("diffusion-ql", "diffusion-bc", "bc", "td3-bc", "rad", "s4rl", "cql", "ads", "rd", "pnf", "otto")
GAUSSIAN = ("bc", "cql")
BY_BATCH = ("cql", "ads", "pnf", "otto")
"""The methods whose critics' loss takes a batch alone."""


def value_of(loss: Tensor) -> float:
    return float(loss.detach())


def features(method: Any, states: Tensor) -> np.ndarray:
    found: np.ndarray = method.policy.context.features(states).numpy()
    return found


@pytest.fixture
def numbers(q_by_hand: Any) -> Any:
    """An MLP with ReLU in numpy."""
    return partial(q_by_hand, lambda x: np.maximum(x, 0))


@pytest.mark.parametrize("clone", ["executed", "expert"])
def test_cloning_is_maximum_likelihood(make_method: Any, make_batch: Any, numbers: Any, clone: str) -> None:
    method, batch = make_method("bc", clone=clone), make_batch()
    out = numbers(method.policy.net, features(method, batch.observations))
    centre, log_std = np.tanh(out[:, :A]), out[:, A:]
    actions = batch.actions if clone == "executed" else batch.expert_actions
    z = (actions.numpy() - centre) / np.exp(log_std)
    expected = (z**2 / 2 + log_std + np.log(2 * np.pi) / 2).sum(1).mean()
    loss = method.loss(batch, method.condition(batch, method.encode(batch)))
    assert value_of(loss) == pytest.approx(expected, rel=1e-4)


def test_td3_bc_losses(make_method: Any, make_batch: Any, numbers: Any) -> None:
    method = make_method("td3-bc", policy_noise=0.0, gamma=0.9, alpha=1.7, reward_scale=0.5)
    batch = make_batch()
    now, later = features(method, batch.observations), features(method, batch.next_observations)
    following = np.tanh(numbers(method.target_policy.net, later))
    at_next = [numbers(q, later, following)[:, 0] for q in (method.target_critic.q1, method.target_critic.q2)]
    target = 0.5 * batch.rewards.numpy() + 0.9 * (1 - batch.terminals.numpy()) * np.minimum(*at_next)
    values = [numbers(q, now, batch.actions)[:, 0] for q in (method.critic.q1, method.critic.q2)]
    expected = sum(((value - target) ** 2).mean() for value in values)
    assert value_of(method.critic_loss([batch], method.encode(batch))[0]) == pytest.approx(expected, rel=1e-4)
    actions = np.tanh(numbers(method.policy.net, now))
    q = numbers(method.critic.q1, now, actions)[:, 0]
    expected = ((actions - batch.actions.numpy()) ** 2).mean() - 1.7 * q.mean() / np.abs(q).mean()
    loss = method.actor_loss(batch, method.encode(batch))[0]
    assert value_of(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_td3s_target_noise_is_clipped_twice(make_method: Any, make_batch: Any, numbers: Any, calls_of: Any) -> None:
    method, batch = make_method("td3-bc", policy_noise=1e6, noise_clip=0.25), make_batch(40)
    calls = calls_of(method.target_critic, "minimum")
    method.critic_loss([batch], method.encode(batch))
    ((_, actions, _),) = calls
    acting = np.tanh(numbers(method.target_policy.net, features(method, batch.next_observations)))
    moved = np.abs(actions.numpy() - acting)
    assert moved.max() <= 0.25 + 1e-5
    assert np.abs(actions.numpy()).max() <= 1
    np.testing.assert_allclose(moved[np.abs(actions.numpy()) < 1], 0.25, atol=1e-3)


def test_the_actor_and_the_targets_move_at_every_second_iteration(make_method: Any, make_batch: Any) -> None:
    method = make_method("td3-bc")
    slow = ("policy", "target_policy", "target_critic")
    for iteration in range(4):
        before = {name: [p.clone() for p in method.modules[name].parameters()] for name in (*slow, "critic")}
        metrics = method.update(make_batch(), iteration)
        moved = {
            name: any(not torch.equal(a, b) for a, b in zip(old, method.modules[name].parameters(), strict=True))
            for name, old in before.items()
        }
        turn = iteration % 2 == 1
        assert moved == {**dict.fromkeys(slow, turn), "critic": True}, iteration
        assert ("loss/actor" in metrics) == turn


def test_cql_losses(make_method: Any, make_batch: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = make_method("cql", penalty=3.0, samples=2, gamma=0.9, reward_scale=2.0), make_batch()
    with torch.no_grad():
        method.temperature.log.fill_(-0.7)
    sampled = torch.rand(1, 6, A) * 2 - 1, torch.randn(1, 6)
    others, density = torch.rand(6, 6, A) * 2 - 1, torch.randn(6, 6)
    monkeypatch.setattr(method.policy, "rsample", lambda condition, count=1: sampled)
    monkeypatch.setattr(method, "_others", lambda now, following: (others, density))
    now, later = features(method, batch.observations), features(method, batch.next_observations)
    critics, targets = ((c.q1, c.q2) for c in (method.critic, method.target_critic))
    at_next = [numbers(q, later, sampled[0][0])[:, 0] for q in targets]
    target = 2 * batch.rewards.numpy() + 0.9 * (1 - batch.terminals.numpy()) * np.minimum(*at_next)
    expected = 0.0
    for q in critics:
        value = numbers(q, now, batch.actions)[:, 0]
        there = np.stack([numbers(q, now, action)[:, 0] for action in others]) - density.numpy()
        expected += ((value - target) ** 2).mean() + 3 * (np.log(np.exp(there).sum(0)) - value).mean()
    assert value_of(method.critic_loss(batch)[0]) == pytest.approx(expected, rel=1e-4)
    least = np.minimum(*(numbers(q, now, sampled[0][0])[:, 0] for q in critics))
    expected = (np.exp(-0.7) * sampled[1][0].numpy() - least).mean()
    loss = method.actor_loss(method.condition(batch, method.encode(batch)))[0]
    assert value_of(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_cqls_other_actions_come_with_their_densities(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("cql", samples=300), make_batch(5)
    now, following = (method.condition(batch, method.encode(batch), later) for later in (False, True))
    with torch.no_grad():
        others, density = method._others(now, following)
    assert others.shape == (900, 5, A)
    assert others[:300].abs().amax() > 0.98
    np.testing.assert_allclose(density[:300], -A * np.log(2), rtol=1e-5)
    for part, condition in ((slice(300, 600), now), (slice(600, 900), following)):
        found = method.policy.log_probability(condition, others[part].flatten(0, 1)[:5])
        torch.testing.assert_close(found, density[part][0], rtol=1e-2, atol=1e-2)


def test_the_temperature_follows_the_entropy(make_method: Any, make_batch: Any) -> None:
    method = make_method("cql", temperature_lr=0.1)
    with torch.no_grad():
        method.policy.net[-1].bias[A:] = -6.0  # nearly no entropy
    for iteration in range(3):
        method.update(make_batch(), iteration)
    assert value_of(method.temperature.log) > 0.1


def test_the_squashed_density_is_the_transformed_one(make_network: Any) -> None:
    policy = make_network("cql", **{"network.action_bound": 1.5})
    condition = Condition(torch.randn(6, S), torch.zeros(6, 0))
    mean, log_std = policy.statistics(condition)
    transforms = [torch.distributions.TanhTransform(), torch.distributions.AffineTransform(0.0, 1.5)]
    exact = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()), transforms)
    actions, density = policy.rsample(condition, 3)
    torch.testing.assert_close(density, exact.log_prob(actions).sum(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(policy.log_probability(condition, actions[0]), density[0], rtol=1e-3, atol=1e-3)
    assert torch.isfinite(policy.log_probability(condition, torch.full((6, A), 1.5))).all()


@pytest.mark.parametrize("name", ["bc", "cql", "td3-bc"])
def test_an_action_depends_on_its_own_seed(name: str, make_network: Any, rng: np.random.Generator) -> None:
    policy = make_network(name)
    condition = Condition(torch.randn(6, S), torch.zeros(6, 0))
    seeds = torch.from_numpy(rng.integers(0, 2**62, 6))
    with torch.no_grad():
        sampled, mode = (policy.action(condition, NoisyActing(scale), seeds) for scale in (1.0, 0.0))
        again = policy.action(Condition(condition.state[2:], torch.zeros(4, 0)), NoisyActing(1.0), seeds[2:])
        centre = torch.tanh(policy.net(condition.state)[:, :A])
    torch.testing.assert_close(again, sampled[2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(mode, centre, rtol=0, atol=1e-5)
    assert (sampled.abs() <= 1).all()
    assert torch.equal(sampled, mode) == (name not in GAUSSIAN)


def test_diffusion_ql_has_its_published_settings() -> None:
    start = find_preset("metaworld")
    config = with_method(start, "diffusion-ql").method
    assert isinstance(config, DiffusionQLConfig)
    assert (config.eta, config.lr, config.lr_final, config.acting.samples) == (1.0, 3e-4, 0.0, 50)
    assert (config.grad_clip, config.batch_size, config.prompts_per_batch) == (1.0, 480, 12)  # the preset's
    context = config.network.context
    assert (context.text, context.trajectory, context.text_dropout, context.trajectory_dropout) == (False, False, 0, 0)
    assert (config.network.chunk, config.network.diffusion_steps, config.clone) == (1, 5, "executed")


@pytest.mark.parametrize("name", ["bc", "td3-bc", "rad", "s4rl", "rd", *BY_BATCH])
def test_under_prompts_the_policys_loss_alone_trains_its_encoders(name: str, make_method: Any, make_batch: Any) -> None:
    more = {"states.kind": "adversarial"} if name == "s4rl" else {}
    prompts = {"network.context.text": True, "network.context.trajectory": True, "network.context.encoder.dropout": 0.5}
    method, batch = make_method(name, **prompts, **more), make_batch(H=4)
    before = [parameter.detach().clone() for parameter in method.policy.parameters()]
    for iteration in range(2):
        metrics = method.update(batch, iteration)
        assert all(torch.isfinite(value) for value in metrics.values())
    assert not any(torch.equal(a, b) for a, b in zip(before, method.policy.parameters(), strict=True))
    for part, module in method.modules.items():
        if part.startswith(("target_", "ema_")):
            assert not module.training, f"{part} has no dropout"
            assert not any(parameter.requires_grad for parameter in module.parameters())
    if name == "bc":
        return
    given = (batch,) if name in BY_BATCH else (batch if name == "rd" else [batch], method.encode(batch))
    loss = method.critic_loss(*given)[0]
    method.optimizers["policy_optimizer"].zero_grad(set_to_none=True)
    loss.backward()
    assert all(parameter.grad is None for parameter in method.policy.parameters())


def test_labels_without_noise_keep_the_gaussian_wide(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("bc", lr=3e-3), make_batch(40)
    batch = dataclasses.replace(batch, actions=batch.observations[:, :A].clamp(-1, 1))
    for iteration in range(400):
        metrics = method.update(batch, iteration)
    assert float(metrics["grad/policy"]) < 1e4
    log_std = method.policy.statistics(method.condition(batch, method.encode(batch)))[1]
    assert float(log_std.detach().min()) >= -3


_RATES = {"lr": 2e-3, "critic_lr": 2e-3}
_CQL = {"lr": 1e-3, "critic_lr": 2e-3, "penalty": 0.3, "samples": 4, "temperature_lr": 2e-2, "reward_scale": 3.0}
_EMA = {"lr": 2e-3, "ema_start": 50, "ema_decay": 0.9, "critic_hidden": 32, "network.hidden_dim": 32}
_UNPROMPTED = {"network.context.text": False, "network.context.trajectory": False}
LEARNING: dict[str, dict[str, Any]] = {
    "diffusion-ql": {**_EMA, **_UNPROMPTED, "critic_lr": 2e-3, "eta": 3.0, "acting.samples": 5},
    # Noise of 1 would copy that of the data too.
    "diffusion-bc": {**_EMA, **_UNPROMPTED, "acting.samples": 1, "acting.noise_scale": 0.2},
    "bc": {"lr": 2e-3},
    **{name: _RATES for name in ("td3-bc", "rad", "s4rl")},
    **{name: _CQL for name in ("cql", "pnf", "otto")},
    "rd": _RATES,
    "ads": {**_RATES, "start": 0.0, "samples": 4, "temperature_lr": 2e-2, "reward_scale": 3.0},
}


def windows(parts: list[np.ndarray], rows: Tensor, horizon: int) -> StepWindows | None:
    """The steps of whole episodes' `parts` [episodes, T, …] from these on, counted through."""
    if not horizon:
        return None
    length = parts[0].shape[1]
    episode, first = (rows // length)[:, None], (rows % length)[:, None]
    steps = (first + torch.arange(horizon)).clamp_max(length - 1)
    states, actions, rewards = (torch.from_numpy(part) for part in parts[:3])
    returns = rewards.flip(1).cumsum(1).flip(1)
    mask = first + torch.arange(horizon) < length
    return StepWindows(states[episode, steps], actions[episode, steps], None, mask, returns[episode, steps])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_does_better_than_its_data(
    name: str, make_method: Any, make_network: Any, world: Any, rng: np.random.Generator
) -> None:
    behaviour, parts = world.episodes(world.behave, 300)
    data = [torch.from_numpy(part.reshape(-1, *part.shape[2:])) for part in parts]
    network = make_network(name, **LEARNING[name])
    network.fit(data[0], lambda: data[2])
    iterations = 1500 if name == "diffusion-ql" else 500  # a critic's gradient through a chain is slow to tell
    method = make_method(name, iterations, network, **LEARNING[name])
    for iteration in range(iterations):
        rows = torch.from_numpy(rng.integers(0, len(data[0]), 128))
        state, action, reward, following, clock = (part[rows] for part in data)
        ends = (clock == world.STEPS - 1).float()
        batch = PromptedBatch(state, action, reward, following, ends, None, clock, None, None)
        method.update(dataclasses.replace(batch, windows=windows(parts, rows, network.window.horizon)), iteration)
    policy = Policy(name, method.acting_network, method.acting_critic, method.config.acting)
    # Cloning finds the mean of what was done, critics what is better.
    world.check(policy.prompt(), behaviour, {"diffusion-bc": 0.03, "bc": 0.1}.get(name, 0.3))


def augmented(method: Any, batch: PromptedBatch) -> list[PromptedBatch]:
    found: list[PromptedBatch] = method.augmentation.batches(batch, partial(method.value, prompts=method.encode(batch)))
    return found


@pytest.mark.parametrize("kind", ["scale", "gaussian"])
def test_rad_changes_a_state_and_the_next_alike(kind: str, make_method: Any, make_batch: Any) -> None:
    method, batch = make_method("rad", **{"states.kind": kind, "states.sigma": 0.1}), make_batch(200)
    (changed,) = augmented(method, batch)
    if kind == "scale":
        factors = changed.observations / batch.observations
        torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=0)
        torch.testing.assert_close(changed.next_observations, batch.next_observations * factors[:, :1])
        assert RADAugmentation.scale_low <= factors.min() < 0.65
        assert 1.15 < factors.max() <= RADAugmentation.scale_high + 1e-5
    else:
        noise = changed.observations - batch.observations
        torch.testing.assert_close(changed.next_observations - batch.next_observations, noise, rtol=0, atol=1e-5)
        assert 0.08 < noise.std() < 0.12
    assert changed.actions is batch.actions


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "dropout", "mixup", "adversarial"])
def test_s4rl_changes_states(kind: str, make_method: Any, make_batch: Any) -> None:
    sizes = {"states.sigma": 0.1, "states.width": 0.2, "states.step": 0.05, "states.copies": 3}
    method, batch = make_method("s4rl", **{"states.kind": kind, **sizes}), make_batch(200)
    found = augmented(method, batch)
    assert len(found) == (1 if kind == "adversarial" else 3)
    now, later = ((getattr(found[0], n) - getattr(batch, n)) for n in ("observations", "next_observations"))
    if kind == "gaussian":
        assert 0.08 < now.std() < 0.12
        assert not torch.allclose(now, later, atol=1e-3)
    elif kind == "uniform":
        assert 0.17 < now.abs().max() <= 0.2 + 1e-5
        assert 0.17 < later.abs().max() <= 0.2 + 1e-5
    elif kind == "dropout":
        lost = (found[0].observations == 0).sum(1)
        assert lost.max() == 1
        assert 0.3 < lost.float().mean() < 0.7
    elif kind == "mixup":
        between = batch.next_observations - batch.observations
        share = (now * between).sum(1, keepdim=True) / between.square().sum(1, keepdim=True)
        torch.testing.assert_close(now, share * between, rtol=0, atol=1e-4)
        assert ((share > -1e-4) & (share < 1 + 1e-4)).all()
        assert torch.equal(found[0].next_observations, batch.next_observations)
    else:
        torch.testing.assert_close(now.abs(), torch.full_like(now, 0.05), rtol=0, atol=1e-4)
        with torch.no_grad():
            values = [method.value(one, method.encode(batch)) for one in (found[0], batch)]
        assert values[0] < values[1]
    if kind not in ("mixup", "adversarial"):
        assert not torch.equal(found[0].observations, found[1].observations)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rad", "scale"), ("rad", "gaussian"), *(("s4rl", k) for k in ("gaussian", "uniform", "mixup", "adversarial"))],
)
def test_numbers_that_an_observation_lacks_stay_zero(name: str, kind: str, make_method: Any, make_batch: Any) -> None:
    """Meta-World shows an object that is absent as zeros, in states and next states."""
    batch, parts = make_batch(50), ("observations", "next_observations")
    absent = {part: getattr(batch, part).clone() for part in parts}
    for states in absent.values():
        states[:, 1:3] = 0
    for changed in augmented(make_method(name, **{"states.kind": kind}), dataclasses.replace(batch, **absent)):
        assert not any(getattr(changed, part)[:, 1:3].any() for part in parts)
        assert not torch.equal(changed.observations, absent["observations"])


def test_s4rls_critics_learn_the_mean_over_its_batches(make_method: Any, make_batch: Any) -> None:
    method, one = make_method("s4rl", policy_noise=0.0), make_batch(5)
    two = dataclasses.replace(one, observations=torch.randn(5, S), next_observations=torch.randn(5, S))
    prompts = method.encode(one)
    with torch.no_grad():
        values = [method.critic(method.condition(batch, prompts), one.actions) for batch in (one, two)]
        following = torch.stack([method._next_value(batch, prompts, prompts) for batch in (one, two)]).mean(0)
    target = one.rewards + 0.99 * (1 - one.terminals) * following
    expected = sum(((a + b) / 2 - target).square().mean() for a, b in zip(*values, strict=True))
    torch.testing.assert_close(method.critic_loss([one, two], prompts)[0].detach(), expected)
    assert METHODS["s4rl"].Config().states.copies == 2  # type: ignore[attr-defined]
