"""The baselines' losses against numpy's arithmetic, and that each of them learns to do better than its data."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmdpd.config.baselines import with_method
from llmdpd.config.schema import TrainConfig
from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.bc import Cloning
from llmdpd.methods.cql import CQL
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.networks import make_network
from llmdpd.methods.registry import make_agent
from llmdpd.methods.td3_bc.method import TD3BC
from llmdpd.methods.td3_bc.state_augmentation import RADConfig, S4RLConfig
from llmdpd.nn.actor import DeterministicPolicy, GaussianPolicy, SquashedGaussianPolicy
from llmdpd.nn.context import Condition, ContextConfig
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens

S, A, D = 4, 2, 6
BASELINES = ("diffusion-ql", "diffusion-bc", "bc", "td3-bc", "rad", "s4rl", "cql")


def config_of(method: str, iterations: int = 100, **parts: Any) -> TrainConfig:
    """A method's own settings on tiny networks; keywords are changes of a part's fields."""
    config = with_method(TrainConfig(), method)
    context = dataclasses.replace(config.policy.context, text=False, trajectory=False)
    config = dataclasses.replace(
        config,
        policy=PolicyConfig(hidden_dim=32, time_dim=8, action_bound=1.0, context=context),
        training=dataclasses.replace(config.training, iterations=iterations),
    )
    changes = {name: dataclasses.replace(getattr(config, name), **part) for name, part in parts.items()}
    return dataclasses.replace(config, **changes)


def agent_of(config: TrainConfig, observations: Tensor | None = None) -> Any:
    network = make_network(config.method, S, A, D if config.policy.context.text else 0, config.policy)
    network.fit(torch.randn(60, S) * 2 + 1 if observations is None else observations)
    agent = make_agent(config, network)
    with torch.no_grad():
        for name, module in agent.modules.items():
            if name.startswith("target_"):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


def batch_of(size: int = 5) -> PromptedBatch:
    return PromptedBatch(
        observations=torch.randn(size, S),
        actions=torch.rand(size, A) * 2 - 1,
        rewards=torch.randn(size),
        next_observations=torch.randn(size, S),
        terminals=(torch.arange(size) % 3 == 1).float(),
        expert_actions=torch.rand(size, A) * 2 - 1,
        timesteps=torch.arange(size),
        text=None,
        tokens=None,
    )


def numbers(net: nn.Module, *inputs: Any) -> np.ndarray:
    """An MLP with ReLU in numpy, float64: inputs [..., n] side by side."""
    x = np.concatenate([np.asarray(part, np.float64) for part in inputs], -1)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(layers):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        x = np.maximum(x, 0) if number < len(layers) - 1 else x
    return x


def value_of(loss: Tensor) -> float:
    return float(loss.detach())


def features(agent: Any, states: Tensor) -> np.ndarray:
    found: np.ndarray = agent.policy.context.features(states).numpy()
    return found


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.usefixtures("rng")
def test_cloning_is_maximum_likelihood(clone: str) -> None:
    agent, batch = agent_of(config_of("bc", bc={"clone": clone})), batch_of()
    assert isinstance(agent, Cloning)
    out = numbers(agent.policy.net, features(agent, batch.observations))
    centre, log_std = np.tanh(out[:, :A]), out[:, A:]
    actions = batch.actions if clone == "executed" else batch.expert_actions
    assert actions is not None
    z = (actions.numpy() - centre) / np.exp(log_std)
    expected = (z**2 / 2 + log_std + np.log(2 * np.pi) / 2).sum(1).mean()
    assert value_of(agent.loss(batch, agent.condition(batch, agent.encode(batch)))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("rng")
def test_td3_bc_losses() -> None:
    own = {"policy_noise": 0.0, "gamma": 0.9, "alpha": 1.7, "reward_scale": 0.5}
    agent, batch = agent_of(config_of("td3-bc", td3_bc=own)), batch_of()
    assert isinstance(agent, TD3BC)
    now, later = features(agent, batch.observations), features(agent, batch.next_observations)
    following = np.tanh(numbers(agent.target_policy.net, later))
    at_next = [numbers(q, later, following)[:, 0] for q in (agent.target_critic.q1, agent.target_critic.q2)]
    ends = batch.terminals.numpy()
    target = 0.5 * batch.rewards.numpy() + 0.9 * (1 - ends) * np.minimum(*at_next)
    values = [numbers(q, now, batch.actions)[:, 0] for q in (agent.critic.q1, agent.critic.q2)]
    expected = sum(((value - target) ** 2).mean() for value in values)
    assert value_of(agent.critic_loss([batch], agent.encode(batch))[0]) == pytest.approx(expected, rel=1e-4)
    actions = np.tanh(numbers(agent.policy.net, now))
    q = numbers(agent.critic.q1, now, actions)[:, 0]
    expected = ((actions - batch.actions.numpy()) ** 2).mean() - 1.7 * q.mean() / np.abs(q).mean()
    assert value_of(agent.actor_loss(batch, agent.encode(batch))[0]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("rng")
def test_td3s_target_noise_is_clipped_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = agent_of(config_of("td3-bc", td3_bc={"policy_noise": 1e6, "noise_clip": 0.25})), batch_of(40)
    seen: list[Tensor] = []
    minimum = agent.target_critic.minimum

    def watched(condition: Condition, actions: Tensor) -> Tensor:
        seen.append(actions)
        return cast(Tensor, minimum(condition, actions))

    monkeypatch.setattr(agent.target_critic, "minimum", watched)
    agent.critic_loss([batch], agent.encode(batch))
    acting = np.tanh(numbers(agent.target_policy.net, features(agent, batch.next_observations)))
    moved = np.abs(seen[0].numpy() - acting)
    assert moved.max() <= 0.25 + 1e-5
    assert np.abs(seen[0].numpy()).max() <= 1
    inside = np.abs(seen[0].numpy()) < 1
    np.testing.assert_allclose(moved[inside], 0.25, atol=1e-3)


@pytest.mark.usefixtures("rng")
def test_the_actor_and_the_targets_move_at_every_second_iteration() -> None:
    agent = agent_of(config_of("td3-bc"))
    slow = ("policy", "target_policy", "target_critic", "ema_policy")

    def weights(name: str) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in agent.modules[name].parameters()]

    for iteration in range(4):
        before = {name: weights(name) for name in (*slow, "critic")}
        metrics = agent.update(batch_of(), iteration)
        moved = {name: any(map(lambda a, b: not torch.equal(a, b), before[name], weights(name))) for name in before}
        turn = iteration % 2 == 1
        # The first copy of the policy is made before it ever moved.
        assert moved == {**dict.fromkeys(slow, turn), "critic": True}, iteration
        assert ("loss/actor" in metrics) == turn


@pytest.mark.usefixtures("rng")
def test_cql_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"penalty": 3.0, "draws": 2, "gamma": 0.9, "reward_scale": 2.0}
    agent, batch = agent_of(config_of("cql", cql=own)), batch_of()
    assert isinstance(agent, CQL)
    with torch.no_grad():
        agent.temperature.log.fill_(-0.7)
    drawn = torch.rand(1, 5, A) * 2 - 1, torch.randn(1, 5)
    others, density = torch.rand(6, 5, A) * 2 - 1, torch.randn(6, 5)
    monkeypatch.setattr(agent.policy, "sample", lambda condition, draws=1: drawn)
    monkeypatch.setattr(agent, "_others", lambda now, following: (others, density))
    now, later = features(agent, batch.observations), features(agent, batch.next_observations)
    critics, targets = ((c.q1, c.q2) for c in (agent.critic, agent.target_critic))
    at_next = [numbers(q, later, drawn[0][0])[:, 0] for q in targets]
    target = 2 * batch.rewards.numpy() + 0.9 * (1 - batch.terminals.numpy()) * np.minimum(*at_next)
    expected = 0.0
    for q in critics:
        value = numbers(q, now, batch.actions)[:, 0]
        there = np.stack([numbers(q, now, action)[:, 0] for action in others]) - density.numpy()
        expected += ((value - target) ** 2).mean() + 3 * (np.log(np.exp(there).sum(0)) - value).mean()
    assert value_of(agent.critic_loss(batch)[0]) == pytest.approx(expected, rel=1e-4)
    least = np.minimum(*(numbers(q, now, drawn[0][0])[:, 0] for q in critics))
    expected = (np.exp(-0.7) * drawn[1][0].numpy() - least).mean()
    assert value_of(agent.actor_loss(agent.condition(batch, agent.encode(batch)))[0]) == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )


@pytest.mark.usefixtures("rng")
def test_cqls_other_actions_come_with_their_densities() -> None:
    agent, batch = agent_of(config_of("cql", cql={"draws": 300})), batch_of()
    now, following = (
        agent.condition(batch, agent.encode(batch)),
        agent.condition(batch, agent.encode(batch), following=True),
    )
    with torch.no_grad():
        others, density = agent._others(now, following)
    assert others.shape == (900, 5, A)
    assert others[:300].abs().amax() > 0.98
    np.testing.assert_allclose(density[:300], -A * np.log(2), rtol=1e-5)
    for part, condition in ((slice(300, 600), now), (slice(600, 900), following)):
        found = agent.policy.log_probability(condition, others[part].flatten(0, 1)[:5])
        torch.testing.assert_close(found, density[part][0], rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("rng")
def test_the_temperature_follows_the_entropy() -> None:
    agent = agent_of(config_of("cql", cql={"temperature_lr": 0.1}))
    with torch.no_grad():
        agent.policy.net[-1].bias[A:] = -6.0  # nearly no entropy
    for iteration in range(3):
        agent.update(batch_of(), iteration)
    assert value_of(agent.temperature.log) > 0.1


@pytest.mark.usefixtures("rng")
def test_the_squashed_density_is_the_transformed_one() -> None:
    policy = SquashedGaussianPolicy(S, A, 0, dataclasses.replace(config_of("cql").policy, action_bound=1.5))
    condition = Condition(torch.randn(6, S), torch.zeros(6, 0))
    mean, log_std = policy.statistics(condition)
    transforms = [torch.distributions.TanhTransform(), torch.distributions.AffineTransform(0.0, 1.5)]
    exact = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()), transforms)
    actions, density = policy.sample(condition, 3)
    torch.testing.assert_close(density, exact.log_prob(actions).sum(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(policy.log_probability(condition, actions[0]), density[0], rtol=1e-3, atol=1e-3)
    assert torch.isfinite(policy.log_probability(condition, torch.full((6, A), 1.5))).all()


@pytest.mark.parametrize("kind", [GaussianPolicy, SquashedGaussianPolicy, DeterministicPolicy])
def test_actions_hang_on_their_own_seeds(kind: type, rng: np.random.Generator) -> None:
    policy = kind(S, A, 0, config_of("bc").policy)
    condition = Condition(torch.randn(6, S), torch.zeros(6, 0))
    seeds = torch.from_numpy(rng.integers(0, 2**62, 6))
    with torch.no_grad():
        drawn, mode = (policy.draw(condition, ActingConfig(samples=1, noise_scale=n), seeds) for n in (1.0, 0.0))
        again = policy.draw(Condition(condition.state[2:], torch.zeros(4, 0)), ActingConfig(samples=1), seeds[2:])
        centre = torch.tanh(policy.net(condition.state)[:, :A])
    torch.testing.assert_close(again, drawn[2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(mode, centre, rtol=0, atol=1e-5)
    assert (drawn.abs() <= 1).all()
    assert torch.equal(drawn, mode) == (kind is DeterministicPolicy)


def test_diffusion_ql_has_its_published_settings() -> None:
    config = with_method(TrainConfig(agent=LLMDPDConfig(grad_clip=7.0, eta=0.0, lr=1.0)), "diffusion-ql")
    assert config.agent == LLMDPDConfig(grad_clip=7.0, lr_final=0.0)
    assert (config.agent.eta, config.agent.lr, config.acting.samples) == (1.0, 3e-4, 50)
    assert (config.policy.context.text, config.policy.context.trajectory) == (False, False)


ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8, dropout=0.5)
PROMPTED = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=3, encoder=ENCODER)


@pytest.mark.parametrize("method", ["bc", "td3-bc", "rad", "s4rl", "cql"])
def test_under_prompts_the_policy_alone_trains_its_encoders(method: str, rng: np.random.Generator) -> None:
    config = config_of(method, s4rl={"kind": "adversarial"})
    agent = agent_of(dataclasses.replace(config, policy=dataclasses.replace(config.policy, context=PROMPTED)))
    tokens = make_tokens([(rng.normal(size=(9, S)), rng.normal(size=(9, A)))], ENCODER)
    batch = dataclasses.replace(batch_of(), text=torch.randn(1, D), tokens=tokens)
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    for iteration in range(2):
        metrics = agent.update(batch, iteration)
        assert all(torch.isfinite(value) for value in metrics.values())
    moved = [not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True)]
    assert all(moved)
    for name, module in agent.modules.items():
        if name.startswith(("target_", "ema_")):
            assert not module.training, f"{name} drops nothing out"
            assert not any(parameter.requires_grad for parameter in module.parameters())
    if method == "bc":
        return
    loss = (agent.critic_loss(batch) if method == "cql" else agent.critic_loss([batch], agent.encode(batch)))[0]
    agent.optimizers["policy_optimizer"].zero_grad(set_to_none=True)
    loss.backward()
    assert all(parameter.grad is None for parameter in agent.policy.parameters())


@pytest.mark.usefixtures("rng")
def test_labels_without_noise_do_not_drive_the_gaussian_apart() -> None:
    agent, batch = agent_of(config_of("bc", bc={"lr": 3e-3})), batch_of(40)
    batch = dataclasses.replace(batch, actions=batch.observations[:, :A].clamp(-1, 1))
    for iteration in range(400):
        metrics = agent.update(batch, iteration)
    assert float(metrics["grad/policy"]) < 1e4
    assert float(agent.policy.statistics(agent.condition(batch, agent.encode(batch)))[1].detach().min()) >= -3


def test_ways_of_acting_that_it_does_not_have_are_refused() -> None:
    policy = DeterministicPolicy(S, A, 0, config_of("td3-bc").policy)
    condition = Condition(torch.zeros(1, S), torch.zeros(1, 0))
    for acting in (ActingConfig(samples=2), ActingConfig(samples=1, precision="bf16")):
        with pytest.raises(InputError, match=r"acting\."):
            policy.draw(condition, acting, torch.zeros(1, dtype=torch.int64))


# A point that goes to a goal: see the fixture `world`

LEARNING = {
    "diffusion-ql": {
        "agent": {"lr": 2e-3, "critic_lr": 2e-3, "ema_start": 50, "ema_decay": 0.9, "critic_hidden": 32, "eta": 3.0}
    },
    "diffusion-bc": {"agent": {"lr": 2e-3, "ema_start": 50, "ema_decay": 0.9, "critic_hidden": 32}},
    "bc": {"bc": {"lr": 2e-3}},
    "td3-bc": {"td3_bc": {"lr": 2e-3, "critic_lr": 2e-3, "critic_hidden": 32}},
    "rad": {"td3_bc": {"lr": 2e-3, "critic_lr": 2e-3, "critic_hidden": 32}},
    "s4rl": {"td3_bc": {"lr": 2e-3, "critic_lr": 2e-3, "critic_hidden": 32}},
    "cql": {
        "cql": {
            **{"lr": 1e-3, "critic_lr": 2e-3, "critic_hidden": 32, "penalty": 0.3, "draws": 4},
            **{"temperature_lr": 2e-2, "reward_scale": 3.0},
        }
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("method", BASELINES)
def test_it_does_better_than_its_data(method: str, world: Any, rng: np.random.Generator) -> None:
    behaviour, steps = world.episodes(lambda state, _: world.behave(state), 300)
    data = [torch.from_numpy(np.concatenate(part)) for part in zip(*steps, strict=True)]
    iterations = 500
    config = config_of(method, iterations, **LEARNING[method])
    agent = agent_of(config, data[0])
    for iteration in range(iterations):
        rows = torch.from_numpy(rng.integers(0, len(data[0]), 128))
        state, action, reward, following, clock = (part[rows] for part in data)
        agent.update(
            PromptedBatch(
                state, action, reward.float(), following, (clock == world.STEPS - 1).float(), None, clock, None, None
            ),
            iteration,
        )
    critic = agent.critic if isinstance(agent, LLMDPD) and config.trains_critic else None
    acting = dataclasses.replace(config.acting, samples=min(config.acting.samples, 5))
    if method == "diffusion-bc":
        acting = dataclasses.replace(acting, noise_scale=0.2)  # at 1 it copies the data's noise, too
    policy = Policy(agent.ema_policy, critic, acting)
    prompts = policy.encode_prompts([None], [None])

    def act(state: np.ndarray, step: int) -> np.ndarray:
        clock, seeds = np.full(len(state), step), rng.integers(0, 2**62, len(state))
        return policy.act_many(state, prompts, None, clock, seeds)

    learned, _ = world.episodes(act, 300)
    best, _ = world.episodes(lambda state, _: world.right(state), 300)
    print("behaviour, learned, best:", behaviour, learned, best)
    # Cloning finds the mean of what was done, critics what is better.
    margin = {"diffusion-bc": 0.03, "bc": 0.1}.get(method, 0.3)
    assert learned > behaviour + margin * (best - behaviour), (behaviour, learned, best)


@pytest.mark.parametrize("kind", ["scale", "gaussian"])
@pytest.mark.usefixtures("rng")
def test_rad_changes_a_state_and_the_next_alike(kind: Any) -> None:
    agent, batch = agent_of(config_of("rad", rad={"kind": kind, "sigma": 0.1})), batch_of(200)
    (changed,) = agent.augmentation.batches(batch, partial(agent.value, prompts=agent.encode(batch)))
    if kind == "scale":
        factors = changed.observations / batch.observations
        torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=0)
        torch.testing.assert_close(changed.next_observations, batch.next_observations * factors[:, :1])
        assert RADConfig.scale_low <= factors.min() < 0.65
        assert 1.15 < factors.max() <= RADConfig.scale_high + 1e-5
    else:
        noise = changed.observations - batch.observations
        torch.testing.assert_close(changed.next_observations - batch.next_observations, noise, rtol=0, atol=1e-5)
        assert 0.08 < noise.std() < 0.12
    assert changed.actions is batch.actions


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "dropout", "mixup", "adversarial"])
@pytest.mark.usefixtures("rng")
def test_s4rl_changes_states(kind: Any) -> None:
    own = {"kind": kind, "sigma": 0.1, "width": 0.2, "step": 0.05, "copies": 3}
    agent, batch = agent_of(config_of("s4rl", s4rl=own)), batch_of(200)
    found = agent.augmentation.batches(batch, partial(agent.value, prompts=agent.encode(batch)))
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
            assert agent.value(found[0], agent.encode(batch)) < agent.value(batch, agent.encode(batch))
    if kind not in ("mixup", "adversarial"):
        assert not torch.equal(found[0].observations, found[1].observations)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("rad", "scale"), ("rad", "gaussian"), *(("s4rl", k) for k in ("gaussian", "uniform", "mixup", "adversarial"))],
)
@pytest.mark.usefixtures("rng")
def test_what_an_observation_does_not_have_stays_away(method: Any, kind: Any) -> None:
    """Meta-World shows an object that is not there as zeros: states and next states, which never have it."""
    batch = batch_of(50)
    absent = dict.fromkeys(("observations", "next_observations"))
    absent = {name: getattr(batch, name).clone() for name in absent}
    for states in absent.values():
        states[:, 1:3] = 0
    agent = agent_of(config_of(method, **{method: {"kind": kind}}))
    for changed in agent.augmentation.batches(
        dataclasses.replace(batch, **absent), partial(agent.value, prompts=agent.encode(batch))
    ):
        for name in absent:
            assert not getattr(changed, name)[:, 1:3].any()
        assert not torch.equal(changed.observations, absent["observations"])


@pytest.mark.usefixtures("rng")
def test_s4rls_critics_learn_the_mean_over_its_batches() -> None:
    agent = agent_of(config_of("s4rl", td3_bc={"policy_noise": 0.0}))
    one = batch_of()
    two = dataclasses.replace(one, observations=torch.randn(5, S), next_observations=torch.randn(5, S))
    prompts = agent.encode(one)
    with torch.no_grad():
        values = [agent.critic(agent.condition(batch, agent.encode(batch)), one.actions) for batch in (one, two)]
        following = torch.stack([agent._next_value(batch, prompts, prompts) for batch in (one, two)]).mean(0)
    target = one.rewards + 0.99 * (1 - one.terminals) * following
    expected = sum(((a + b) / 2 - target).square().mean() for a, b in zip(*values, strict=True))
    torch.testing.assert_close(agent.critic_loss([one, two], agent.encode(one))[0].detach(), expected)
    assert S4RLConfig().copies == 2
