"""Trajectory diffusion: its loss by hand, what may not matter, the schedules, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes
from llmdpd.diffusion import alphas
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.trajectory_diffusion.method import TrajectoryDiffusion, TrajectoryDiffusionConfig
from llmdpd.methods.trajectory_diffusion.network import PlanPolicy
from llmdpd.nn.context import Condition, ContextConfig
from llmdpd.nn.plan_denoiser import PlanConfig
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.training.batches import BatchSampler
from llmdpd.training.cuda_graph import watch

S, A, D, H = 4, 2, 6, 5
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8, dropout=0.0)
CONTEXT = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=3, encoder=ENCODER)
PLAN = PlanConfig(horizon=H, layers=1, width=16, inner=16, dropout=0.0)


def make_agent(bound: float = 1.0, iterations: int = 100, **changes: Any) -> TrajectoryDiffusion:
    config = PolicyConfig(diffusion_steps=7, time_dim=8, action_bound=bound, context=CONTEXT, plan=PLAN)
    network = PlanPolicy(S, A, D, config)
    network.fit(torch.randn(60, S) * 2 + 1)
    return TrajectoryDiffusion(network, TrajectoryDiffusionConfig(**changes), iterations)


@pytest.fixture
def batch(make_batch: Any, rng: np.random.Generator) -> PromptedBatch:
    """A batch of two prompts; its windows end after 1 to H steps, what stands behind is anything."""
    made = make_batch(6, 2)
    lengths = torch.from_numpy(rng.permutation([1, 2, 3, H, H, H]))
    windows = StepWindows(
        torch.randn(6, H, S),
        torch.rand(6, H, A) * 2 - 1,
        torch.rand(6, H, A) * 2 - 1,
        torch.arange(H) < lengths[:, None],
        torch.randn(6, H),
    )
    windows.states[:, 0] = made.observations
    return dataclasses.replace(made, windows=windows)


def condition_of(agent: TrajectoryDiffusion, batch: PromptedBatch) -> Condition:
    prompts = agent.policy.encode(batch.text, batch.tokens)
    return agent.policy.condition(batch.observations, prompts, None, batch.timesteps)


def losses(agent: TrajectoryDiffusion, batch: PromptedBatch, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    assert batch.windows is not None
    return agent.diffusion_loss(batch.windows, condition_of(agent, batch))


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.parametrize(("bound", "weight"), [(1.0, 10.0), (0.5, 3.0)])
def test_the_loss_by_hand(
    batch: PromptedBatch, monkeypatch: pytest.MonkeyPatch, clone: Any, bound: float, weight: float
) -> None:
    agent = make_agent(bound, clone=clone, first_action_weight=weight)
    calls: list[tuple[Any, ...]] = []
    forward = type(agent.policy.net).forward

    def spy(self: Any, *arguments: Any) -> Tensor:
        predicted = forward(self, *arguments)
        calls.append((*arguments, predicted))
        return predicted

    monkeypatch.setattr(type(agent.policy.net), "forward", spy)
    drawn: list[Tensor] = []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(randn_like(x)) or drawn[-1])
    loss, first_action = losses(agent, batch)
    ((noisy, timesteps, state, prompt, mask, predicted),) = calls
    (noise,) = drawn
    windows = batch.windows
    assert windows is not None
    assert torch.equal(mask, windows.mask)
    expected_condition = condition_of(agent, batch)
    assert torch.equal(state, expected_condition.state)
    assert torch.equal(prompt, expected_condition.prompt)

    bar = np.cumprod(alphas("vp", 7))
    low, high = agent.policy.low.double().numpy(), agent.policy.high.double().numpy()
    actions = windows.actions if clone == "executed" else windows.expert_actions
    assert actions is not None
    total = weights = first = 0.0
    for b in range(6):
        level = bar[int(timesteps[b])]
        for h in range(H):
            if not windows.mask[b, h]:
                continue
            for d in range(S + A):
                if d < S:
                    value = (
                        np.clip((float(windows.states[b, h, d]) - low[d]) / (high[d] - low[d]) * 2 - 1, -1, 1) * bound
                    )
                else:
                    value = float(actions[b, h, d - S])
                known = h == 0 and d < S
                epsilon = float(noise[b, h, d])
                x = value if known else np.sqrt(level) * value + np.sqrt(1 - level) * epsilon
                assert float(noisy[b, h, d]) == pytest.approx(x, abs=1e-4)
                w = 0.0 if known else weight if h == 0 else 1.0
                error = (float(predicted.detach()[b, h, d]) - epsilon) ** 2
                total, weights = total + w * error, weights + w
                first += error if h == 0 and d >= S else 0.0
    assert float(loss) == pytest.approx(total / weights, rel=1e-4)
    assert float(first_action) == pytest.approx(first / (6 * A), rel=1e-4)


def test_steps_past_the_end_have_no_influence(batch: PromptedBatch) -> None:
    agent, windows = make_agent(), batch.windows
    assert windows is not None
    assert windows.expert_actions is not None
    past = ~windows.mask[..., None]
    other = dataclasses.replace(
        windows,
        states=torch.where(past, torch.full_like(windows.states, float("nan")), windows.states),
        actions=torch.where(past, torch.randn_like(windows.actions), windows.actions),
    )
    before, after = losses(agent, batch), losses(agent, dataclasses.replace(batch, windows=other))
    assert float(before[0]) == float(after[0])
    inside = dataclasses.replace(windows, actions=torch.where(past, windows.actions, -windows.actions))
    assert float(losses(agent, dataclasses.replace(batch, windows=inside))[0]) != float(before[0])
    # Nor do they in the gradient.
    gradients = []
    for given in (batch, dataclasses.replace(batch, windows=other)):
        agent.policy.zero_grad()
        losses(agent, given)[0].backward()
        gradients.append([p.grad.clone() for p in agent.policy.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_denoiser_and_encoders_learn_and_the_ema_follows(batch: PromptedBatch) -> None:
    agent = make_agent(lr=1e-2, ema_start=3, ema_every=2, ema_decay=0.75)
    policy = agent.policy
    before = copy.deepcopy(policy.state_dict())
    ema: dict[str, Tensor] = {}
    for iteration in range(6):
        kept = copy.deepcopy(agent.ema_policy.state_dict())
        metrics = agent.update(batch, iteration)
        now = policy.state_dict()
        for name, value in agent.ema_policy.state_dict().items():
            rate = 0.0 if iteration % 2 else 1.0 if iteration < 3 else 0.25
            torch.testing.assert_close(value, kept[name] + rate * (now[name] - kept[name]), msg=name)
        ema = agent.ema_policy.state_dict()
    assert set(metrics) == {"loss/diffusion", "loss/first_action", "grad/policy"}
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    still = {name for name in before if name not in moved}
    assert still == {"context.features.mean", "context.features.std", "low", "high"}
    assert ema.keys() == before.keys()


def test_rates_follow_their_schedule(batch: PromptedBatch) -> None:
    agent = make_agent(iterations=10, lr=0.5, lr_warmup=4, lr_final=0.2)
    rates = []
    for iteration in range(10):
        agent.schedule(iteration)
        rates.append(float(agent.optimizers["policy_optimizer"].param_groups[0]["lr"]))
    expected = [0.5 * min(1, (i + 1) / 4) * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * i / 10))) for i in range(10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_the_gradients_norm_is_bounded(batch: PromptedBatch) -> None:
    free, bound = (make_agent(lr=0.0, grad_clip=clip) for clip in (0.0, 0.01))
    for agent in (free, bound):
        assert float(agent.learn(batch)["grad/policy"]) > 0.01
    norms = [
        float(torch.nn.utils.get_total_norm([p.grad for p in agent.policy.parameters() if p.grad is not None]))
        for agent in (free, bound)
    ]
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_iteration_can_be_captured(batch: PromptedBatch) -> None:
    from llmdpd.training.batches import moved

    agent = make_agent()
    agent = TrajectoryDiffusion(agent.policy.cuda(), agent.config, 100)
    there = moved(batch, torch.device("cuda"))
    agent.update(there, 0)
    assert watch(lambda: agent.learn(there))[1] is None


# Learning: a point is to be moved to a goal that the prompts alone tell.

GOALS = np.array([[0.7, 0.4], [-0.7, -0.4]])
STEP, LENGTH = 0.25, 12
POINT_PLAN = PlanConfig(horizon=3, layers=1, width=32, inner=64, dropout=0.0)


def right_action(state: np.ndarray, task: int) -> np.ndarray:
    return np.clip((GOALS[task] - state) / STEP, -1, 1)


def behave(rng: np.random.Generator, task: int, clean: bool) -> EpisodeRecord:
    """An episode of the behaviour policy: three of four actions are random, but where it is clean."""
    states, actions, experts = [rng.uniform(-1, 1, 2)], [], []
    for _ in range(LENGTH):
        experts.append(right_action(states[-1], task))
        actions.append(rng.uniform(-1, 1, 2) if not clean and rng.random() < 0.75 else experts[-1])
        states.append(states[-1] + STEP * actions[-1])
    return EpisodeRecord(states, actions, np.zeros(LENGTH), f"goal-{task}", expert_actions=experts, success=int(clean))


def final_distance(states: np.ndarray, task: int) -> float:
    return float(np.linalg.norm(states - GOALS[task], axis=1).mean())


def learned_distance(rng: np.random.Generator, data: TrajectoryDataset, context: ContextConfig) -> float:
    """Train; the mean distance to the goals at the end of 100 episodes a task."""
    config = PolicyConfig(diffusion_steps=10, context=context, plan=POINT_PLAN)
    network = PlanPolicy(2, 2, 8, config)
    network.fit(torch.from_numpy(data.observations))
    learning = TrajectoryDiffusionConfig(lr=3e-3, lr_final=0.05, ema_decay=0.9, ema_start=100, clone="expert")
    agent = TrajectoryDiffusion(network, learning, 450)
    embeddings = torch.from_numpy(rng.normal(size=(2, 8)).astype(np.float32))
    sampler = BatchSampler(
        data, embeddings if context.text else None, ENCODER if context.trajectory else None, 128, 2, 0,
        torch.device("cpu"), horizon=POINT_PLAN.horizon,
    )  # fmt: skip
    for iteration in range(450):
        agent.update(sampler.next(), iteration)
    policy = Policy(agent.ema_policy, None, ActingConfig(samples=1, sampler="ddim", steps=4))
    found = []
    for task in (0, 1):
        tokens = policy._tokens([data.episode(int(data.episodes_of(f"goal-{task}")[0]))])
        prompts = policy.network.encode(
            embeddings[task : task + 1] if context.text else None, tokens if context.trajectory else None
        )
        states = rng.uniform(-1, 1, (100, 2)).astype(np.float32)
        for step in range(LENGTH):
            seeds = rng.integers(0, 2**62, 100)
            actions = policy.act_many(states, prompts, None, np.full(100, step), seeds)
            states = (states + STEP * actions).astype(np.float32)
        found.append(final_distance(states, task))
    return float(np.mean(found))


def point_data(rng: np.random.Generator) -> tuple[TrajectoryDataset, float]:
    """Behaviour data of both tasks, one of five episodes clean (the examples), and how far from the goals they end."""
    episodes = [behave(rng, task, number % 5 == 0) for task in (0, 1) for number in range(60)]
    ends = [final_distance(np.asarray(e.observations)[-1:], int(e.task[-1])) for e in episodes]
    return join_episodes(episodes, source="made by a test"), float(np.mean(ends))


@pytest.mark.parametrize(("text", "trajectory"), [(True, False), (False, True)])
def test_it_learns_what_either_prompt_tells(rng: np.random.Generator, text: bool, trajectory: bool) -> None:
    data, behaviour = point_data(rng)
    context = dataclasses.replace(CONTEXT, text=text, trajectory=trajectory)
    # The margin: a quarter of how far from the goal the behaviour policy ends.
    assert learned_distance(rng, data, context) < 0.25 * behaviour


def test_without_a_prompt_it_cannot_tell(rng: np.random.Generator) -> None:
    data, behaviour = point_data(rng)
    context = dataclasses.replace(CONTEXT, text=False, trajectory=False)
    assert learned_distance(rng, data, context) > behaviour
