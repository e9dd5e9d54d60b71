"""Algorithm 1: each loss against its equation, what each loss trains, and the updates."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmdpd.diffusion import alphas, reverse_diffusion
from llmdpd.errors import InputError
from llmdpd.methods.llmdpd import method as module
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.nn.context import Condition
from llmdpd.utils.bounds import check_config

MODES = pytest.mark.parametrize(("P", "sees"), [(1, False), (1, True), (3, False), (3, True)])


def mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.logaddexp(0, x))


def condition_of(method: LLMDPD, batch: Any) -> Condition:
    return method.condition(batch, method.encode(batch))


def critic_loss_of(method: LLMDPD, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    prompts = method.encode(batch)
    return method.critic_loss(batch, prompts, method.condition(batch, prompts))


def parameters(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.parametrize("P", [1, 3])
def test_diffusion_loss_is_equation_5(make_method: Any, make_batch: Any, calls_of: Any, P: int, clone: str) -> None:
    method, batch = make_method(clone=clone), make_batch(3000, P)
    calls = calls_of(type(method.policy.net), "forward")
    condition = condition_of(method, batch)
    loss = method.diffusion_loss(batch, condition)
    ((_, noisy, timesteps, state, prompt, _, predicted),) = calls
    assert torch.equal(state, condition.state)
    assert torch.equal(prompt, condition.prompt)
    bar = torch.from_numpy(np.cumprod(alphas("vp", 5)))[timesteps][:, None]
    clean = batch.actions if clone == "executed" else batch.expert_actions
    noise = (noisy.double() - bar.sqrt() * clean.double()) / (1 - bar).sqrt()
    expected = (predicted.detach().double() - noise).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    # The samples: k uniform in 1 … K (indices from 0), epsilon standard normal, and independent of each other.
    counts = torch.bincount(timesteps, minlength=5)
    assert len(counts) == 5
    assert float((counts - 600).abs().max()) < 6 * (3000 * 0.16) ** 0.5
    assert abs(float(noise.mean())) < 6 / 6000**0.5
    assert abs(float(noise.square().mean()) - 1) < 6 * (2 / 6000) ** 0.5
    assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 6 / 3000**0.5


@MODES
def test_critic_loss_is_equation_6_and_trains_the_critics_alone(
    make_method: Any, make_batch: Any, calls_of: Any, q_by_hand: Any, P: int, sees: bool
) -> None:
    method = make_method(gamma=0.9, reward_scale=0.3, critic_sees_prompts=sees)
    batch, q_value = make_batch(6, P), partial(q_by_hand, mish)
    samples, conditions = calls_of(module, "reverse_diffusion"), calls_of(method.ema_policy, "condition")
    loss, metrics = critic_loss_of(method, batch)
    ((net, state, prompt, coefficients, noise, precision, actions),) = samples
    assert noise is None, "it is given where several processes share the batch"
    ((observations, _, _, clock, expected),) = conditions
    # The next action is the EMA policy's, in the next state at the next time step, under the same prompts.
    assert net is method.ema_policy.net
    assert (coefficients.name, coefficients.steps, coefficients.clip, precision) == ("ddpm", 5, 1.0, "fp32")
    assert torch.equal(observations, batch.next_observations)
    assert torch.equal(clock, batch.timesteps + 1)
    ema = method.ema_policy.encode(batch.text, batch.tokens)
    own = method.ema_policy.context.condition(batch.next_observations, ema, None, batch.timesteps + 1)
    torch.testing.assert_close((state, prompt), tuple(own))
    assert torch.equal(state, expected.state)

    extra = (condition_of(method, batch).prompt.expand(6, -1),) if sees else ()
    now, after = map(method.policy.context.features, (batch.observations, batch.next_observations))
    target_q = [q_value(q, after, actions, *extra)[:, 0] for q in (method.target_critic.q1, method.target_critic.q2)]
    q1, q2 = (q_value(q, now, batch.actions, *extra)[:, 0] for q in (method.critic.q1, method.critic.q2))
    target = 0.3 * batch.rewards.numpy() + 0.9 * (1 - batch.terminals.numpy()) * np.minimum(*target_q)
    assert 0 < int(batch.terminals.sum()) < 6
    assert float(loss.detach()) == pytest.approx(np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2), rel=1e-4)
    assert float(metrics["q/target"]) == pytest.approx(target.mean(), rel=1e-4, abs=1e-6)
    assert float(metrics["q/mean"]) == pytest.approx(q1.mean(), rel=1e-4, abs=1e-6)
    loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in method.critic.parameters())
    for other in (method.policy, method.ema_policy, method.target_critic):
        assert all(p.grad is None for p in other.parameters())


def test_critics_read_one_networks_context(make_method: Any, make_batch: Any, calls_of: Any) -> None:
    """Old and new state alike, though the next action is another network's: a retrieval context has weights."""
    method = make_method(**{"network.context.kind": "retrieval", "critic_sees_prompts": True})
    batch = make_batch(6, 3)
    reads = [calls_of(method.critic, "regression"), calls_of(method.target_critic, "minimum")]
    critic_loss_of(method, batch)
    old, new = (calls[0][0] for calls in reads)
    torch.testing.assert_close(old, condition_of(method, batch).state)
    after, average = (
        network.condition(batch.next_observations, method.encode(batch, network), None, batch.timesteps + 1).state
        for network in (method.policy, method.ema_policy)
    )
    torch.testing.assert_close(new, after)
    assert (new - average).abs().max() > 1e-3


@MODES
def test_reward_objective_is_equation_7(
    make_method: Any, make_batch: Any, calls_of: Any, q_by_hand: Any, P: int, sees: bool
) -> None:
    method, batch, q_value = make_method(critic_sees_prompts=sees), make_batch(6, P), partial(q_by_hand, mish)
    condition, samples = condition_of(method, batch), calls_of(module, "reverse_diffusion")
    first = 0
    for _ in range(120):
        objective, scale = method.reward_objective(condition)
        net, *_, actions = samples.pop()
        assert net is method.policy.net
        extra = (condition.prompt.expand(6, -1),) if sees else ()
        values = [q_value(q, condition.state, actions, *extra) for q in (method.critic.q1, method.critic.q2)]
        if float(objective.detach()) != pytest.approx(values[0].mean(), rel=1e-4, abs=1e-6):
            values.reverse()
        else:
            first += 1
        assert float(objective.detach()) == pytest.approx(values[0].mean(), rel=1e-4, abs=1e-6)
        assert float(scale) == pytest.approx(np.abs(values[1]).mean(), rel=1e-4)
        assert not scale.requires_grad
    # Line 9 of the algorithm: either one, at random (six standard errors of a fair coin).
    assert abs(first - 60) < 6 * 120**0.5 / 2
    objective.backward()
    grads = {name: p.grad for name, p in method.policy.named_parameters() if p.grad is not None}
    parts = {name.split(".")[1] if name.startswith("context") else "net" for name in grads}
    assert parts == {"text_head", "trajectory_encoder", "net"}
    assert all(bool((grad != 0).any()) for name, grad in grads.items() if name.startswith("net.layers"))


def test_its_gradient_is_that_of_finite_differences(make_method: Any, make_batch: Any) -> None:
    """Through the chain into one weight of the text head and one of the network, in float64."""
    method, batch = make_method(), make_batch(4)
    for network in (method.policy, method.critic):
        network.double()
    batch = batch.with_tensors({n: t.double() if t.is_floating_point() else t for n, t in batch.tensors().items()})

    def objective() -> Tensor:
        torch.manual_seed(3)
        return method.reward_objective(condition_of(method, batch))[0]

    for weight in (method.policy.context.text_head[0].weight, method.policy.net.layers[1].weight):
        (gradient,) = torch.autograd.grad(objective(), weight)
        with torch.no_grad():
            place = divmod(int(gradient.abs().argmax()), weight.shape[1])
            weight[place] += 1e-6
            up = objective()
            weight[place] -= 2e-6
            down = objective()
            weight[place] += 1e-6
        assert float(gradient[place]) == pytest.approx(float((up - down).detach()) / 2e-6, rel=1e-3)


@pytest.mark.parametrize("eta", [0.7, 2.0])
def test_actor_loss_is_equation_8(make_method: Any, make_batch: Any, calls_of: Any, eta: float) -> None:
    method = make_method(eta=eta)
    calls = calls_of(method, "reward_objective")
    metrics = method.update(make_batch(), 0)
    ((_, (objective, scale)),) = calls
    expected = float(metrics["loss/diffusion"]) - eta / float(scale) * float(objective.detach())
    assert float(metrics["loss/actor"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["reward/objective"]) == pytest.approx(float(objective.detach()))
    assert set(metrics) == {
        *("loss/critic", "loss/diffusion", "loss/actor", "reward/objective"),
        *("q/mean", "q/target", "grad/critic", "grad/policy"),
    }
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


def test_the_actors_loss_leaves_no_gradient_in_the_critics(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(), make_batch()
    method.actor_loss(batch, condition_of(method, batch))[0].backward()
    assert all(p.grad is None and p.requires_grad for p in method.critic.parameters())
    assert any(p.grad is not None for p in method.policy.parameters())


def test_the_reward_term_raises_the_critics_value(make_method: Any, make_batch: Any) -> None:
    """The sign of equation 8: with the critics held, the value of the sampled actions rises."""
    method, batch = make_method(eta=20.0, lr=3e-3, critic_lr=0.0, tau=0.0), make_batch(64)
    with torch.no_grad():
        method.critic.q1[0].weight[:, -2:] *= 20  # untrained critics hardly depend on the action,
        method.critic.q2.load_state_dict(method.critic.q1.state_dict())  # and each in its own direction

    @torch.no_grad()
    def values(actions: Tensor) -> Tensor:
        """Of actions [20, 64, A], mean over both critics."""
        state = method.policy.context.features(batch.observations).expand(20, -1, -1)
        return torch.stack(method.critic(state, actions, torch.zeros(20, 64, 0))).mean(0)

    @torch.no_grad()
    def sampled_value() -> float:
        policy = method.policy
        actions = reverse_diffusion(
            policy.net, *condition_of(method, batch), policy.training_sampler, samples=20, seed=1
        )
        return float(values(actions.transpose(0, 1)).mean())

    spread = float(values(torch.rand(20, 64, 2) * 2 - 1).std(0).mean())  # what an action can change
    before = sampled_value()
    for iteration in range(60):
        method.update(batch, iteration)
    assert sampled_value() > before + 0.3 * spread


def test_targets_follow_by_polyak_alone(make_method: Any, make_batch: Any) -> None:
    method, batch = make_method(tau=0.1, critic_lr=1e-2), make_batch(6, 3)
    old_target, old_critic = parameters(method.target_critic), parameters(method.critic)
    method.update(batch, 1)
    new_critic = parameters(method.critic)
    assert not equal(new_critic, old_critic)
    for target, old, new in zip(parameters(method.target_critic), old_target, new_critic, strict=True):
        torch.testing.assert_close(target, 0.9 * old + 0.1 * new)


def test_cloning_alone_has_no_use_for_critics(make_method: Any, make_batch: Any, calls_of: Any) -> None:
    method, samples = make_method(eta=0.0), calls_of(module, "reverse_diffusion")
    before = {name: parameters(network) for name, network in method.modules.items()}
    metrics = method.update(make_batch(), 1)
    assert not samples
    assert set(metrics) == {"loss/diffusion", "loss/actor", "grad/policy"}
    assert torch.equal(metrics["loss/actor"], metrics["loss/diffusion"])
    moved = {name for name, network in method.modules.items() if not equal(parameters(network), before[name])}
    assert moved == {"policy"}
    assert method.acting_critic is None
    assert make_method().acting_critic is not None


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("trajectory", [False, True])
def test_without_either_prompt_it_learns(make_method: Any, make_batch: Any, text: bool, trajectory: bool) -> None:
    prompts = {"network.context.text": text, "network.context.trajectory": trajectory}
    method = make_method(critic_sees_prompts=True, **prompts)
    for P in (1, 3):
        assert all(torch.isfinite(m) for m in method.update(make_batch(6, P), 0).values())


def test_defaults_are_diffusion_qls() -> None:
    config = LLMDPDConfig()
    assert (config.lr, config.critic_lr, config.gamma, config.tau, config.eta) == (3e-4, 3e-4, 0.99, 0.005, 1.0)
    assert (config.ema_decay, config.ema_every, config.ema_start) == (0.995, 5, 1000)
    assert (config.clone, config.critic_sees_prompts) == ("executed", False)


def test_the_same_seed_is_the_same_run_bit_for_bit(make_method: Any, make_batch: Any) -> None:
    dropout = {"network.context.text_dropout": 0.2, "network.context.trajectory_dropout": 0.2}
    first, batches = make_method(**dropout), [make_batch(6, P) for P in (1, 3, 1)]
    # Optimisers hold the first one's parameters; the copy gets its own.
    other = LLMDPD(copy.deepcopy(first.policy), first.config, 100)
    for name, network in other.modules.items():
        network.load_state_dict(first.modules[name].state_dict())
    results = []
    for method in (first, other):
        torch.manual_seed(11)
        results.append([method.update(batch, i) for i, batch in enumerate(batches)])
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    for name in first.modules:
        assert equal(parameters(first.modules[name]), parameters(other.modules[name]))


def test_an_iteration_in_bf16_is_nearly_that_in_fp32(make_method: Any, make_batch: Any) -> None:
    batch = make_batch(32, 1)
    exact, rounded = make_method(), make_method(precision="bf16")
    for name, network in rounded.modules.items():
        network.load_state_dict(exact.modules[name].state_dict())
    found = []
    for method in (exact, rounded):
        torch.manual_seed(5)
        found.append(method.update(batch, 0))
    for name, value in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=0.1, abs=0.02), name
    assert any(float(found[1][name]) != float(value) for name, value in found[0].items())
    assert all(parameter.dtype == torch.float32 for parameter in rounded.policy.parameters())


@pytest.mark.parametrize(
    ("name", "changes", "field", "expected"),
    [
        ("llmdpd", {"network.chunk": 2, "eta": 0.1}, "eta", "0, or network.chunk of 1"),
        ("llmdpd", {"eta": 0.0, "acting.samples": 2}, "acting.samples", "1 where no critics"),
        ("llmdpd", {"batch_size": 10, "prompts_per_batch": 3}, "batch_size", "a multiple of 3"),
        ("diffusion-bc", {"acting.samples": 1, "eta": 0.5}, "eta", "diffusion-ql"),
        ("trajectory-diffusion", {"augmentation.rotate": 0.1}, "augmentation.rotate", "0 with"),
        ("trajectory-diffusion", {"network.time_dim": 7}, "network.time_dim", "even"),
        ("trajectory-diffusion", {"network.trajectory.heads": 3}, "network.trajectory.heads", "a divisor of 16"),
        ("dt", {"network.sequence.heads": 3}, "network.sequence.heads", "a divisor of 16"),
        ("rad", {"states.scale_low": 2.0}, "states.scale_low", "at most 1.2"),
        ("s4rl", {"states.copies": 0}, "states.copies", "1 to 64"),
        ("cql", {"gamma": 1.5}, "gamma", "0 to 1"),
        ("mtdiff", {"return_probability": 1.1}, "return_probability", "0 to 1"),
        ("mtdiff", {"acting.steps": 13}, "acting.steps", "12"),
    ],
)
def test_fields_that_do_not_fit_are_named(
    make_config: Any, name: str, changes: dict[str, Any], field: str, expected: str
) -> None:
    config = make_config(name, **changes)
    with pytest.raises(InputError) as error:
        check_config(config)
    assert error.value.field == field
    assert expected in str(error.value.expected)
