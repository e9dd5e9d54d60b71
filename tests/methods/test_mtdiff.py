"""MTDiff-p: the loss by hand, what a plan hangs on, guidance, acting as in training, and that it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.data import EpisodeRecord, Trajectory, join_episodes
from llmdpd.diffusion import alphas, philox_normal
from llmdpd.errors import InputError
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.mtdiff.method import MTDiff, MTDiffConfig
from llmdpd.methods.mtdiff.network import MTDiffPolicy
from llmdpd.nn.context import ALL_KEPT, ContextConfig, EncodedPrompts, Keep
from llmdpd.nn.plan_denoiser import PlanConfig
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.training.batches import BatchSampler, moved

S, A, H, L = 4, 2, 3, 2
K = 12
ENCODER = TrajectoryEncoderConfig(steps=6)
PLAN = PlanConfig(horizon=H, layers=1, heads=2, width=16, inner=32, dropout=0.0, history=L)
ACTING = ActingConfig(samples=1, sampler="ddim", steps=4)


def network(bound: float = 1.5, dropout: float = 0.0, **plan: Any) -> MTDiffPolicy:
    context = ContextConfig(text=False, trajectory_dropout=dropout, encoder=ENCODER)
    sizes = dataclasses.replace(PLAN, **plan)
    made = MTDiffPolicy(
        S, A, 0, PolicyConfig(action_bound=bound, time_dim=8, diffusion_steps=K, context=context, plan=sizes)
    )
    made.fit(torch.randn(60, S) * 2 + 1)
    made.fit_returns(torch.tensor([1.0, -30.0, 7.0]))
    with torch.no_grad():
        made.net.head.bias.add_(0.3 * torch.randn(A))
    return made.eval()


def pairs_of(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two examples of different lengths."""
    return [(rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in (3, 6)]


def batch_of(rng: np.random.Generator, count: int = 6) -> PromptedBatch:
    """Windows of L - 1 steps before and H after, under two examples; some begin with the episode, most end in it."""
    steps = L - 1 + H
    ends = L + torch.arange(count) % (H + 1)
    mask = (torch.arange(steps) < ends[:, None]) & ((torch.arange(steps) > 0) | (torch.arange(count) % 2 == 1)[:, None])
    states, actions = torch.randn(count, steps, S), torch.rand(count, steps, A) * 2 - 1
    return PromptedBatch(
        observations=states[:, L - 1],
        actions=actions[:, L - 1],
        rewards=torch.randn(count),
        next_observations=states[:, L],
        terminals=torch.zeros(count),
        expert_actions=None,
        timesteps=torch.randint(0, 60, (count,)),
        text=None,
        tokens=make_tokens(pairs_of(rng), ENCODER),
        windows=StepWindows(states, actions, None, mask, 20 * torch.randn(count, steps)),
    )


def test_the_loss_by_hand(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head of zeros the answer is its bias; what is asked of the network is what the forward process says."""
    model, batch = network(), batch_of(rng)
    assert batch.windows is not None
    torch.nn.init.zeros_(model.net.head.weight)
    noise, steps = 2 * torch.randn(6, H, A), torch.randint(0, K, (6,))
    told = torch.tensor([0.1, 0.9, 0.2, 0.95, 0.3, 0.79])
    monkeypatch.setattr(torch, "randn_like", lambda like: noise.clone())
    monkeypatch.setattr(torch, "randint", lambda *given, **named: steps.clone())
    monkeypatch.setattr(torch, "rand", lambda *given, **named: told.clone())
    seen: dict[str, Tensor] = {}
    denoise, asked = model.net.denoise, model.asked
    monkeypatch.setattr(model.net, "denoise", lambda x, *rest: seen.update(noisy=x) or denoise(x, *rest))
    monkeypatch.setattr(model, "asked", lambda r, g: seen.update(returns=r, given=g) or asked(r, g))
    loss, first = MTDiff(model, MTDiffConfig(), 10).loss(batch)

    mask = batch.windows.mask.numpy()[:, L - 1 :]
    error = np.abs(model.net.head.bias.detach().double().numpy() - noise.double().numpy())
    huber = np.where(error < 1, error**2 / 2, error - 0.5)
    weight = np.where(mask[..., None], np.where(np.arange(H) == 0, 10.0, 1.0)[:, None], 0.0) * np.ones(A)
    assert float(loss.detach()) == pytest.approx((weight * huber).sum() / weight.sum(), rel=1e-5)
    assert float(first.detach()) == pytest.approx(huber[:, 0].mean(), rel=1e-5)
    level = np.cumprod(alphas("vp", K))[steps.numpy()][:, None, None]
    clean = np.where(mask[..., None], batch.windows.actions.numpy()[:, L - 1 :], 0.0)
    expected = np.sqrt(level) * clean + np.sqrt(1 - level) * noise.numpy()
    np.testing.assert_allclose(seen["noisy"].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert seen["given"].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0], "of five four are told their return"
    assert torch.equal(seen["returns"], batch.windows.returns[:, L - 1])


def epsilon(
    model: MTDiffPolicy,
    states: Tensor,
    given: Tensor,
    prompts: EncodedPrompts,
    returns: Tensor,
    keep: Tensor,
    x: Tensor,
) -> Tensor:
    count = len(states)
    before = model.before(states, given, prompts, torch.arange(count) % max(len(prompts), 1))
    return model.net.denoise(x, model.asked(returns, keep), model.net.time_rows(torch.full((count,), 3)), None, before)


@torch.no_grad()
def test_what_a_plan_hangs_on(rng: np.random.Generator) -> None:
    model, pairs = network(), pairs_of(rng)
    states, given, returns, x = (
        torch.randn(2, L, S),
        torch.ones(2, L, dtype=torch.bool),
        torch.randn(2),
        torch.randn(2, H, A),
    )
    keep = torch.ones(2)

    def encode(which: Keep = ALL_KEPT) -> EncodedPrompts:
        return model.encode(None, make_tokens(pairs, ENCODER), which)

    found = epsilon(model, states, given, encode(), returns, keep, x)
    for part in range(L):
        other = states.clone()
        other[0, part] += 2.0
        changed = epsilon(model, other, given, encode(), returns, keep, x)
        assert not torch.equal(changed[0], found[0])
        assert torch.equal(changed[1], found[1])
        # Before the episode there is nothing to look at.
        missing = given.clone()
        missing[0, part] = False
        one, two = (epsilon(model, s, missing, encode(), returns, keep, x) for s in (states, other))
        assert torch.equal(one, two)
    assert not torch.allclose(epsilon(model, states, given, encode(), returns + 3, keep, x), found)
    without = epsilon(model, states, given, encode(), returns, 0 * keep, x)
    assert not torch.allclose(without, found)
    assert torch.equal(epsilon(model, states, given, encode(), returns + 3, 0 * keep, x), without)
    for part in pairs[0]:
        part[-1] += 5.0
        changed = epsilon(model, states, given, encode(), returns, keep, x)
        part[-1] -= 5.0
        assert not torch.equal(changed[0], found[0])
        torch.testing.assert_close(changed[1], found[1])
    dropped = epsilon(model, states, given, encode(Keep(trajectory=torch.tensor([[0.0], [1.0]]))), returns, keep, x)
    none = EncodedPrompts(torch.zeros(2, 0))
    torch.testing.assert_close(
        dropped[0], epsilon(model, states, given, none, returns, keep, x)[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(dropped[1], found[1])


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_it_acts_as_it_was_trained(rng: np.random.Generator, sampler: str) -> None:
    """Step by step with its memory and its guidance: the chain by hand, from two calls of the network."""
    guidance = float(rng.uniform(0.3, 2.0))
    model = network(guidance=guidance)
    acting = ActingConfig(samples=1, sampler="ddim", steps=4) if sampler == "ddim" else ActingConfig(samples=1)
    policy = Policy(model, None, acting).prompt(trajectory=pairs_of(rng)[1], target_return=12.0)
    prompts, plan = policy._prompts, acting.plan(model.config)
    assert prompts is not None
    states = torch.randn(4, 2, S)
    rewards = rng.normal(size=(4, 2)).astype(np.float32)
    asked = torch.full((2,), 12.0)
    policy.seed(5)
    random = torch.Generator().manual_seed(5)
    for step in range(4):
        if step:
            asked = asked - torch.from_numpy(rewards[step - 1])
        done = policy.act(states[step].numpy(), reward=rewards[step - 1] if step else None)
        seeds = torch.randint(2**63 - 1, (2,), generator=random)
        noise = philox_normal(seeds, 2, H, plan.steps + 1 if sampler == "ddpm" else 1, A, torch.device("cpu")).float()
        given = torch.tensor([[step > 0, True]] * 2)
        shown = torch.stack([states[max(step - 1, 0)], states[step]], 1)
        x = plan.start * noise[0]
        for k in range(plan.steps):
            time = model.net.time_rows(torch.full((2,), int(plan.timesteps[k])))
            before = model.before(shown, given, prompts, torch.zeros(2, dtype=torch.long))
            told, free = (
                model.net.denoise(x, model.asked(asked, torch.full((2,), which)), time, None, before)
                for which in (1.0, 0.0)
            )
            x0 = (plan.p[k] * x + plan.e[k] * (free + guidance * (told - free))).clamp(-1.5, 1.5)
            x = plan.A[k] * x + plan.B[k] * x0 + (plan.S[k] * noise[k + 1] if plan.S[k] > 0 else 0)
        np.testing.assert_allclose(done, x[:, 0].clamp(-1.5, 1.5).numpy(), rtol=1e-3, atol=1e-4)


def test_a_row_is_alone_what_it_is_among_others(rng: np.random.Generator) -> None:
    policy = Policy(network(), None, ACTING).prompt(trajectory=pairs_of(rng)[0], target_return=3.0)
    assert policy._prompts is not None
    count = 11
    states, seeds = rng.normal(size=(count, S)).astype(np.float32), rng.integers(0, 2**62, count)
    targets, steps = rng.normal(size=count).astype(np.float32), np.zeros(count, np.int64)

    def draw(rows: np.ndarray) -> np.ndarray:
        memory = policy.memory()
        assert memory is not None
        history = memory.recall(rows, steps[rows], states[rows], np.zeros(len(rows), np.float32), targets[rows])
        assert policy._prompts is not None
        return policy.draw_many(states[rows], policy._prompts, None, steps[rows], seeds[rows], history)

    whole, some = draw(np.arange(count)), rng.permutation(count)[:5]
    np.testing.assert_array_equal(draw(some), whole[some])
    assert whole.shape == (count, 1, A)


def test_what_cannot_be_is_refused(rng: np.random.Generator) -> None:
    policy = Policy(network(), None, ACTING)
    with pytest.raises(InputError, match="reads an example"):
        policy.prompt(target_return=1.0)
    Policy(network(dropout=0.2), None, ACTING).prompt(target_return=1.0).act(np.zeros(S))
    with pytest.raises(InputError, match="no return to ask for"):
        policy.prompt(trajectory=pairs_of(rng)[0])
    with pytest.raises(InputError, match=r"acting\.samples"):
        policy.with_acting(samples=2)
    for config, told in (
        (PolicyConfig(context=ContextConfig()), "text"),
        (PolicyConfig(context=ContextConfig("retrieval", text=False)), "kind"),
        (PolicyConfig(context=ContextConfig(text=False, trajectory=False)), "trajectory"),
        (PolicyConfig(chunk=2, context=ContextConfig(text=False)), "chunk"),
    ):
        with pytest.raises(InputError, match=told):
            MTDiffPolicy(S, A, 3, config)


def test_everything_learns(rng: np.random.Generator) -> None:
    model = network(dropout=0.3)
    agent = MTDiff(model, MTDiffConfig(lr=1e-3), 10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    metrics = agent.update(batch_of(rng), 0)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_the_loss_reads_nothing_back_from_the_device(rng: np.random.Generator) -> None:
    """On `meta`, a device whose values can't be had; so that a CUDA graph can hold it."""
    model = network(dropout=0.1).train()
    agent = MTDiff(model, MTDiffConfig(), 10)
    model.to("meta")
    batch = moved(batch_of(rng), torch.device("meta"))
    keep = Keep(trajectory=torch.ones(2, 1, device="meta"))
    agent.loss(dataclasses.replace(batch, keep=keep))[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
def test_asked_for_much_it_does_better_than_its_data(world: Any, rng: np.random.Generator) -> None:
    """Half of the episodes go straight to their goal, half anywhere: the return says which."""
    good = rng.random(400) < 0.5

    def behave(state: np.ndarray, _: int) -> np.ndarray:
        anywhere = rng.uniform(-1, 1, (len(state), A))
        return np.where(good[:, None], world.right(state), anywhere)

    behaviour, steps = world.episodes(behave, 400)
    parts = (np.stack([step[n] for step in steps], 1).astype(np.float32) for n in range(3))
    records = [EpisodeRecord([*s, s[-1]], list(a), r, "point", success=-1) for s, a, r in zip(*parts, strict=True)]
    data = join_episodes(records, goal_visible=None, source="made up")
    model = network(bound=1.0, width=64, inner=128)
    model.fit(torch.from_numpy(data.observations))
    model.fit_returns(torch.from_numpy(data.returns_to_go()))
    learning = MTDiffConfig(lr=3e-3, lr_warmup=50, lr_final=0.05, ema_decay=0.98, ema_every=1, ema_start=200)
    agent = MTDiff(model.train(), learning, 1000)
    sampler = BatchSampler(data, None, ENCODER, 64, 2, 0, torch.device("cpu"), horizon=H, before=L - 1)
    for iteration in range(1000):
        agent.update(sampler.next(), iteration)
    returns = data.returns()
    policy = Policy(agent.ema_policy, None, ACTING)
    policy.prompt(trajectory=data.episode(int(returns.argmax())), target_return=float(np.quantile(returns, 0.9)))

    learned, _ = world.episodes(world.told(policy), 200)
    best, _ = world.episodes(lambda state, _: world.right(state), 200)
    print("behaviour, learned, best:", behaviour, learned, best)
    assert learned > behaviour + 0.2 * (best - behaviour)


def test_an_example_as_trajectory_needs_no_rewards(rng: np.random.Generator) -> None:
    states, actions = pairs_of(rng)[0]
    facts = {"target_returns": {"reach-v3": 3.0}}
    policy = Policy(network(), None, ACTING, facts=facts)
    told = policy.prompt(trajectory=Trajectory(states, actions, np.ones(len(states), np.float32), "push-v3"))
    assert told._target == len(states), "of a task that was not trained on it asks for what the example earned"
    assert policy.prompt(trajectory=(states, actions))._target == 3.0
