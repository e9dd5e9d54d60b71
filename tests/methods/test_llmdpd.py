"""Algorithm 1: each loss against its equation, who learns from what, and the schedules."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmdpd.diffusion import alphas, reverse_diffusion
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd import method as module
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.nn.context import Condition

MODES = pytest.mark.parametrize(("P", "sees"), [(1, False), (1, True), (3, False), (3, True)])

DROPOUT = {"text_dropout": 0.2, "trajectory_dropout": 0.2}


def condition_of(agent: LLMDPD, batch: PromptedBatch) -> Condition:
    prompts = agent.policy.encode(batch.text, batch.tokens)
    return agent.policy.condition(batch.observations, prompts, None, batch.timesteps)


def parameters(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def q_by_hand(network: nn.Module, *parts: Tensor) -> np.ndarray:
    """A Q network in float64 numpy."""
    x = np.concatenate([p.detach().double().numpy() for p in parts], -1)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(layers):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        if number < len(layers) - 1:
            x = x * np.tanh(np.logaddexp(0, x))
    return x[:, 0]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the agent asks of the sampler, and what it gets."""
    calls: list[dict[str, Any]] = []
    real = module.reverse_diffusion

    def spy(net: Any, state: Tensor, prompt: Tensor, plan: Any, precision: str) -> Tensor:
        assert precision == "fp32"
        actions = real(net, state, prompt, plan)
        calls.append({"net": net, "state": state, "prompt": prompt, "plan": plan, "actions": actions})
        return actions

    monkeypatch.setattr(module, "reverse_diffusion", spy)
    return calls


# Equation 5


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.parametrize("P", [1, 3])
def test_diffusion_loss_is_equation_5(
    make_agent: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch, P: int, clone: str
) -> None:
    agent, batch = make_agent(clone=clone), make_batch(3000, P)
    calls: list[tuple[Tensor, ...]] = []
    net = agent.policy.net
    forward = type(net).forward

    def spy(self: Any, *arguments: Tensor) -> Tensor:
        predicted = forward(self, *arguments)
        calls.append((*arguments, predicted))
        return predicted

    monkeypatch.setattr(type(net), "forward", spy)
    condition = condition_of(agent, batch)
    loss = agent.diffusion_loss(batch, condition)
    ((noisy, timesteps, state, prompt, _, predicted),) = calls
    assert torch.equal(state, condition.state)
    assert torch.equal(prompt, condition.prompt)
    bar = torch.from_numpy(np.cumprod(alphas("vp", 5)))[timesteps][:, None]
    clean = batch.actions if clone == "executed" else batch.expert_actions
    noise = (noisy.double() - bar.sqrt() * clean.double()) / (1 - bar).sqrt()
    expected = (predicted.detach().double() - noise).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    # What was drawn: k uniform in 1 … K (indices from 0), epsilon standard normal, and apart from each other.
    counts = torch.bincount(timesteps, minlength=5)
    assert len(counts) == 5
    assert float((counts - 600).abs().max()) < 6 * (3000 * 0.16) ** 0.5
    assert abs(float(noise.mean())) < 6 / 6000**0.5
    assert abs(float(noise.square().mean()) - 1) < 6 * (2 / 6000) ** 0.5
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 6 / 3000**0.5


# Equation 6


@MODES
def test_critic_loss_is_equation_6(
    make_agent: Any, make_batch: Any, drawn: Any, monkeypatch: pytest.MonkeyPatch, P: int, sees: bool
) -> None:
    agent = make_agent(gamma=0.9, reward_scale=0.3, critic_sees_prompts=sees)
    batch = make_batch(6, P)
    clocks: list[Tensor] = []
    following = agent.ema_policy.condition
    monkeypatch.setattr(agent.ema_policy, "condition", lambda *args: clocks.append(args[3]) or following(*args))
    condition = condition_of(agent, batch)
    loss, metrics = agent.critic_loss(batch, agent.policy.encode(batch.text, batch.tokens), condition)
    ((call),) = drawn
    assert torch.equal(clocks[0], batch.timesteps + 1)  # for contexts that read the clock
    # The next action is the EMA policy's, in the next state, under the same prompts.
    assert call["net"] is agent.ema_policy.net
    assert (call["plan"].name, call["plan"].steps, call["plan"].clip) == ("ddpm", 5, 1.0)
    ema = agent.ema_policy.encode(batch.text, batch.tokens)
    expected = agent.ema_policy.condition(batch.next_observations, ema, None, batch.timesteps + 1)
    torch.testing.assert_close(call["state"], expected.state)
    torch.testing.assert_close(call["prompt"], expected.prompt)

    extra = (condition.prompt.expand(6, -1),) if sees else ()
    after = agent.policy.context.features(batch.next_observations)
    now = agent.policy.context.features(batch.observations)
    target_q = [q_by_hand(q, after, call["actions"], *extra) for q in (agent.target_critic.q1, agent.target_critic.q2)]
    q1, q2 = (q_by_hand(q, now, batch.actions, *extra) for q in (agent.critic.q1, agent.critic.q2))
    target = np.zeros(6)
    for row in range(6):
        target[row] = 0.3 * float(batch.rewards[row])
        if not batch.terminals[row]:
            target[row] += 0.9 * min(target_q[0][row], target_q[1][row])
    assert float(loss.detach()) == pytest.approx(np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2), rel=1e-4)
    assert float(metrics["q/target"]) == pytest.approx(target.mean(), rel=1e-4, abs=1e-6)
    assert float(metrics["q/mean"]) == pytest.approx(q1.mean(), rel=1e-4, abs=1e-6)
    assert 0 < int(batch.terminals.sum()) < 6


@MODES
def test_the_critics_loss_trains_the_critics_alone(make_agent: Any, make_batch: Any, P: int, sees: bool) -> None:
    agent, batch = make_agent(critic_sees_prompts=sees), make_batch(6, P)
    agent.critic_loss(batch, agent.policy.encode(batch.text, batch.tokens), condition_of(agent, batch))[0].backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in agent.critic.parameters())
    for other in (agent.policy, agent.ema_policy, agent.target_critic):
        assert all(p.grad is None for p in other.parameters())


# Equation 7


@MODES
def test_reward_objective_is_equation_7(make_agent: Any, make_batch: Any, drawn: Any, P: int, sees: bool) -> None:
    agent, batch = make_agent(critic_sees_prompts=sees), make_batch(6, P)
    condition = condition_of(agent, batch)
    first = 0
    for _ in range(120):
        objective, scale = agent.reward_objective(condition)
        call = drawn.pop()
        assert call["net"] is agent.policy.net
        extra = (condition.prompt.expand(6, -1),) if sees else ()
        q1, q2 = (q_by_hand(q, condition.state, call["actions"], *extra) for q in (agent.critic.q1, agent.critic.q2))
        if float(objective.detach()) == pytest.approx(q1.mean(), rel=1e-4, abs=1e-6):
            first += 1
            assert float(scale) == pytest.approx(np.abs(q2).mean(), rel=1e-4)
        else:
            assert float(objective.detach()) == pytest.approx(q2.mean(), rel=1e-4, abs=1e-6)
            assert float(scale) == pytest.approx(np.abs(q1).mean(), rel=1e-4)
        assert not scale.requires_grad
    # Line 9 of the algorithm: either one, at random (six standard errors of a fair coin).
    assert abs(first - 60) < 6 * 120**0.5 / 2


@MODES
def test_the_rewards_gradient_reaches_every_part_of_the_policy(
    make_agent: Any, make_batch: Any, P: int, sees: bool
) -> None:
    agent, batch = make_agent(critic_sees_prompts=sees), make_batch(6, P)
    agent.reward_objective(condition_of(agent, batch))[0].backward()
    grads = {name: p.grad for name, p in agent.policy.named_parameters()}
    reached = {
        name.split(".")[1] if name.startswith("context") else "net" for name, g in grads.items() if g is not None
    }
    assert reached == {"text_head", "trajectory_encoder", "net"}
    assert all(g is not None and bool((g != 0).any()) for name, g in grads.items() if name.startswith("net.layers"))


def test_its_gradient_is_that_of_finite_differences(make_agent: Any, make_batch: Any) -> None:
    """Through the chain into one weight of the text head and one of the network, in float64."""
    agent, batch = make_agent(), make_batch(4)
    for network in (agent.policy, agent.critic):
        network.double()
    batch = dataclasses.replace(
        batch,
        observations=batch.observations.double(),
        text=batch.text.double(),
        tokens=dataclasses.replace(
            batch.tokens,
            states=batch.tokens.states.double(),
            actions=batch.tokens.actions.double(),
            phase=batch.tokens.phase.double(),
        ),
    )

    def objective() -> Tensor:
        torch.manual_seed(3)
        return agent.reward_objective(condition_of(agent, batch))[0]

    for weight in (agent.policy.context.text_head[0].weight, agent.policy.net.layers[1].weight):
        (gradient,) = torch.autograd.grad(objective(), weight)
        with torch.no_grad():
            place = divmod(int(gradient.abs().argmax()), weight.shape[1])
            weight[place] += 1e-6
            up = objective()
            weight[place] -= 2e-6
            down = objective()
            weight[place] += 1e-6
        assert float(gradient[place]) == pytest.approx(float((up - down).detach()) / 2e-6, rel=1e-3)


# Equation 8


@pytest.mark.parametrize("eta", [0.7, 2.0])
def test_actor_loss_is_equation_8(
    make_agent: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch, eta: float
) -> None:
    agent, batch = make_agent(eta=eta), make_batch()
    seen: list[tuple[Tensor, Tensor]] = []
    real = agent.reward_objective
    monkeypatch.setattr(agent, "reward_objective", lambda condition: seen.append(real(condition)) or seen[-1])
    metrics = agent.update(batch, 0)
    ((objective, scale),) = seen
    expected = float(metrics["loss/diffusion"]) - eta / float(scale) * float(objective.detach())
    assert float(metrics["loss/actor"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["reward/objective"]) == pytest.approx(float(objective.detach()))
    assert set(metrics) == {
        *("loss/critic", "loss/diffusion", "loss/actor", "reward/objective"),
        *("q/mean", "q/target", "grad/critic", "grad/policy"),
    }
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


def test_the_actors_step_leaves_no_gradient_in_the_critics(make_agent: Any, make_batch: Any) -> None:
    agent, batch = make_agent(), make_batch()
    before = parameters(agent.critic)
    agent._update_actor(batch, condition_of(agent, batch), True)
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(p.requires_grad for p in agent.critic.parameters())
    assert equal(parameters(agent.critic), before)


def test_the_reward_term_raises_the_critics_value(make_agent: Any, make_batch: Any) -> None:
    """The sign of equation 8: with the critics held, the drawn actions' value climbs."""
    agent, batch = make_agent(eta=20.0, lr=3e-3, critic_lr=0.0, tau=0.0), make_batch(64)
    with torch.no_grad():
        agent.critic.q1[0].weight[:, -2:] *= 20  # untrained critics hardly look at the action
        agent.critic.q2.load_state_dict(agent.critic.q1.state_dict())  # and pull each its way

    def values(actions: Tensor) -> Tensor:
        """Of actions [20, 64, A], mean over both critics."""
        state = agent.policy.context.features(batch.observations).expand(20, -1, -1)
        return torch.stack(agent.critic(state, actions, torch.zeros(20, 64, 0))).mean(0)

    @torch.no_grad()
    def drawn_value() -> float:
        state, prompt = condition_of(agent, batch)
        plan = agent.policy.plan
        actions = reverse_diffusion(agent.policy.net, state, prompt, plan, samples=20, seed=1)
        return float(values(actions.transpose(0, 1)).mean())

    spread = float(values(torch.rand(20, 64, 2) * 2 - 1).detach().std(0).mean())  # what an action can change
    before = drawn_value()
    for iteration in range(60):
        agent.update(batch, iteration)
    after = drawn_value()
    assert after > before + 0.3 * spread


# Updates


@MODES
def test_targets_follow_by_polyak_alone(make_agent: Any, make_batch: Any, P: int, sees: bool) -> None:
    agent, batch = make_agent(tau=0.1, critic_lr=1e-2, critic_sees_prompts=sees), make_batch(6, P)
    old_target, old_critic = parameters(agent.target_critic), parameters(agent.critic)
    agent.update(batch, 1)
    new_critic = parameters(agent.critic)
    assert not equal(new_critic, old_critic)
    for target, old, new in zip(parameters(agent.target_critic), old_target, new_critic, strict=True):
        torch.testing.assert_close(target, 0.9 * old + 0.1 * new)


def test_ema_copies_first_then_averages_at_its_marks(make_agent: Any, make_batch: Any) -> None:
    agent, batch = make_agent(ema_every=3, ema_start=6, ema_decay=0.8, lr=1e-2), make_batch()
    for iteration in range(14):
        before = parameters(agent.ema_policy)
        agent.update(batch, iteration)
        now, policy = parameters(agent.ema_policy), parameters(agent.policy)
        if iteration % 3:
            assert equal(now, before)
        elif iteration < 6:
            assert equal(now, policy)
        else:
            for ema, old, new in zip(now, before, policy, strict=True):
                torch.testing.assert_close(ema, 0.8 * old + 0.2 * new)
    assert not agent.ema_policy.training
    assert not any(p.requires_grad for p in agent.ema_policy.parameters())


@pytest.mark.parametrize(("warmup", "final"), [(0, 1.0), (0, 0.1), (10, 0.1), (4, 1.0)])
def test_rates_warm_up_and_decay_per_iteration(make_agent: Any, make_batch: Any, warmup: int, final: float) -> None:
    agent = make_agent(40, lr=2e-3, critic_lr=5e-4, lr_warmup=warmup, lr_final=final)
    batch = make_batch()
    for iteration in (0, 1, 3, 9, 20, 39):
        agent.update(batch, iteration)
        factor = final + (1 - final) * (1 + math.cos(math.pi * iteration / 40)) / 2
        if warmup:
            factor *= min(1.0, (iteration + 1) / warmup)
        assert agent.policy_optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * factor, rel=1e-5)
        assert agent.critic_optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * factor, rel=1e-5)


def test_gradients_are_clipped_by_norm(make_agent: Any, make_batch: Any) -> None:
    def norm(network: nn.Module) -> float:
        return float(torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm())

    agent, batch = make_agent(grad_clip=0.01), make_batch()
    metrics = agent.update(batch, 0)
    assert float(metrics["grad/policy"]) > 0.01  # as they were
    assert norm(agent.policy) == pytest.approx(0.01, rel=1e-3)
    assert norm(agent.critic) == pytest.approx(0.01, rel=1e-3)
    agent = make_agent(grad_clip=0.0)
    metrics = agent.update(batch, 0)
    assert norm(agent.policy) == pytest.approx(float(metrics["grad/policy"]), rel=1e-4)
    assert norm(agent.critic) == pytest.approx(float(metrics["grad/critic"]), rel=1e-4)


def test_weight_decay_is_the_policys(make_agent: Any) -> None:
    agent = make_agent(weight_decay=0.3)
    assert agent.policy_optimizer.param_groups[0]["weight_decay"] == 0.3
    assert agent.critic_optimizer.param_groups[0]["weight_decay"] == 0
    owned = {id(p) for group in agent.policy_optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in agent.policy.parameters()}


def test_cloning_alone_has_no_use_for_critics(
    make_agent: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the sampler was called")

    agent, batch = make_agent(eta=0.0), make_batch()
    monkeypatch.setattr(module, "reverse_diffusion", never)
    before = parameters(agent.critic), parameters(agent.target_critic), parameters(agent.policy)
    metrics = agent.update(batch, 0)
    assert set(metrics) == {"loss/diffusion", "loss/actor", "grad/policy"}
    assert torch.equal(metrics["loss/actor"], metrics["loss/diffusion"])
    assert equal(parameters(agent.critic), before[0])
    assert equal(parameters(agent.target_critic), before[1])
    assert not equal(parameters(agent.policy), before[2])


@pytest.mark.parametrize("switches", [{"text": False}, {"trajectory": False}, {"text": False, "trajectory": False}])
def test_ablations_run(make_agent: Any, make_batch: Any, switches: dict[str, bool]) -> None:
    agent = make_agent(context=switches, critic_sees_prompts=True)
    for P in (1, 3):
        metrics = agent.update(make_batch(6, P), 0)
        assert all(math.isfinite(float(m)) for m in metrics.values())


def test_defaults_are_diffusion_qls() -> None:
    config = LLMDPDConfig()
    assert (config.lr, config.critic_lr, config.gamma, config.tau, config.eta) == (3e-4, 3e-4, 0.99, 0.005, 1.0)
    assert (config.ema_decay, config.ema_every, config.ema_start) == (0.995, 5, 1000)
    assert config.clone == "executed"
    assert not config.critic_sees_prompts


def test_the_same_seed_is_the_same_run_bit_for_bit(make_agent: Any, make_batch: Any) -> None:
    first, batches = (
        make_agent(context=DROPOUT),
        [make_batch(6, P) for P in (1, 3, 1)],
    )
    second = copy.deepcopy(first)
    # Optimisers hold the first one's parameters; the copy gets its own.
    other = LLMDPD(second.policy, first.config, 100)
    for name in other.modules:
        other.modules[name].load_state_dict(first.modules[name].state_dict())
    results = []
    for agent in (first, other):
        torch.manual_seed(11)
        results.append([agent.update(batch, i) for i, batch in enumerate(batches)])
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    for name in first.modules:
        assert equal(parameters(first.modules[name]), parameters(other.modules[name]))


def test_modules_and_optimisers_are_all_that_learns(make_agent: Any) -> None:
    agent = make_agent()
    assert set(agent.modules) == {"policy", "ema_policy", "critic", "target_critic"}
    assert agent.optimizers == {
        "policy_optimizer": agent.policy_optimizer,
        "critic_optimizer": agent.critic_optimizer,
    }
    assert agent.modules["ema_policy"] is agent.ema_policy


def test_an_iteration_in_bf16_is_nearly_that_in_fp32(make_agent: Any, make_batch: Any) -> None:
    batch = make_batch(32, 1)
    exact, rounded = make_agent(), make_agent(precision="bf16")
    for name, network in rounded.modules.items():
        network.load_state_dict(exact.modules[name].state_dict())
    found = []
    for agent in (exact, rounded):
        torch.manual_seed(5)
        found.append(agent.update(batch, 0))
    for name, value in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=0.1, abs=0.02), name
    assert any(float(found[1][name]) != float(value) for name, value in found[0].items())
    assert all(parameter.dtype == torch.float32 for parameter in rounded.policy.parameters())


def test_critics_read_one_networks_context(make_agent: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new state alike, though the next action is another network's: a retrieval context has weights."""
    agent, batch = make_agent(context={"kind": "retrieval"}, critic_sees_prompts=True), make_batch(6, 3)
    read: list[Tensor] = []
    for critic in (agent.critic, agent.target_critic):
        forward = critic.forward

        def spy(state: Tensor, *rest: Any, forward: Any = forward) -> Any:
            read.append(state)
            return forward(state, *rest)

        monkeypatch.setattr(critic, "forward", spy)
    prompts = agent.policy.encode(batch.text, batch.tokens)
    agent.critic_loss(batch, prompts, condition_of(agent, batch))
    new, old = read
    torch.testing.assert_close(old, condition_of(agent, batch).state)
    after = agent.policy.condition(batch.next_observations, prompts, None, batch.timesteps + 1).state
    torch.testing.assert_close(new, after)
    average = agent.ema_policy.encode(batch.text, batch.tokens)
    other = agent.ema_policy.condition(batch.next_observations, average, None, batch.timesteps + 1).state
    assert (new - other).abs().max() > 1e-3
