"""Trajectory diffusion: its loss by hand, what is ignored, the scale of states, and that it learns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes
from llmdpd.diffusion import alphas
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.policy_network import Spaces
from llmdpd.nn.trajectory_denoiser import TrajectoryConfig
from llmdpd.policy.policy import Policy
from llmdpd.training.batches import BatchSampler

S, A, H = 4, 2, 5
NAME = "trajectory-diffusion"


@pytest.fixture
def batch(make_batch: Any) -> PromptedBatch:
    """A batch of two prompts; its windows end after 1 to H steps, and hold anything after their end."""
    made: PromptedBatch = make_batch(6, 2, H=H)
    return made


def losses(method: Any, batch: PromptedBatch, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    found: tuple[Tensor, Tensor] = method.diffusion_loss(batch.windows, method.condition(batch, method.encode(batch)))
    return found


@pytest.mark.parametrize("clone", ["executed", "expert"])
@pytest.mark.parametrize(("bound", "weight"), [(1.0, 10.0), (0.5, 3.0)])
def test_the_loss_by_hand(
    make_method: Any, batch: PromptedBatch, calls_of: Any, clone: str, bound: float, weight: float
) -> None:
    method = make_method(NAME, clone=clone, first_action_weight=weight, **{"network.action_bound": bound})
    calls, noises = calls_of(type(method.policy.net), "forward"), calls_of(torch, "randn_like")
    loss, first_action = losses(method, batch)
    ((_, noisy, timesteps, state, prompt, mask, predicted),) = calls
    ((_, noise),) = noises
    windows = batch.windows
    assert windows is not None
    assert torch.equal(mask, windows.mask)
    condition = method.condition(batch, method.encode(batch))
    assert torch.equal(state, condition.state)
    assert torch.equal(prompt, condition.prompt)

    low, high = method.policy.low.double().numpy(), method.policy.high.double().numpy()
    unit = ((windows.states.double().numpy() - low) / (high - low) * 2 - 1).clip(-1, 1)
    actions = windows.actions if clone == "executed" else windows.expert_actions
    assert actions is not None
    clean = np.concatenate([unit * bound, actions.double().numpy()], -1)
    level = np.cumprod(alphas("vp", 7))[timesteps.numpy()][:, None, None]
    expected = np.sqrt(level) * clean + np.sqrt(1 - level) * noise.numpy()
    expected[:, 0, :S] = clean[:, 0, :S]  # the present state is known
    real = windows.mask.numpy()
    np.testing.assert_allclose(noisy.numpy()[real], expected[real], atol=1e-4)
    error = (predicted.detach().double().numpy() - noise.numpy()) ** 2
    weights = np.ones_like(error) * real[..., None]
    weights[:, 0] = np.repeat([0.0, weight], [S, A])
    assert float(loss.detach()) == pytest.approx((weights * error).sum() / weights.sum(), rel=1e-4)
    assert float(first_action.detach()) == pytest.approx(error[:, 0, S:].mean(), rel=1e-4)


def test_steps_past_the_end_have_no_influence(make_method: Any, batch: PromptedBatch) -> None:
    method, windows = make_method(NAME), batch.windows
    assert windows is not None
    past = ~windows.mask[..., None]
    other = dataclasses.replace(
        windows,
        states=torch.where(past, torch.full_like(windows.states, float("nan")), windows.states),
        actions=torch.where(past, torch.randn_like(windows.actions), windows.actions),
    )
    inside = dataclasses.replace(windows, actions=torch.where(past, windows.actions, -windows.actions))
    values, gradients = [], []
    for given in (windows, other, inside):
        method.policy.zero_grad()
        loss = losses(method, dataclasses.replace(batch, windows=given))[0]
        loss.backward()
        values.append(float(loss.detach()))
        gradients.append([p.grad.clone() for p in method.policy.parameters() if p.grad is not None])
    assert values[0] == values[1] != values[2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients[:2], strict=True))


@pytest.mark.parametrize("bound", [1.0, 0.3])
def test_states_are_scaled_to_the_bound(make_network: Any, bound: float) -> None:
    network = make_network(NAME, Spaces(3, 2, 6), **{"network.action_bound": bound})
    seen = torch.tensor([[0.0, 5.0, 7.0], [2.0, 5.0, 9.0], [1.0, 5.0, 7.5]])
    network.fit(seen, lambda: torch.zeros(3))
    expected = bound * torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0], [0.0, 0.0, -0.5]])
    torch.testing.assert_close(network.scaled(seen), expected)
    # Beyond the range of the training data it stops at the bound; a number that was constant there stays 0.
    beyond = network.scaled(torch.tensor([-3.0, 6.0, 100.0]))
    torch.testing.assert_close(beyond, bound * torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(network.context.features.mean, torch.tensor([1.0, 5.0, 23.5 / 3]))
    assert {"low", "high"} <= network.state_dict().keys()


# Learning: a point is to be moved to a goal that only the prompts say.

GOALS = np.array([[0.7, 0.4], [-0.7, -0.4]])
STEP, LENGTH = 0.25, 12
LEARNING = {
    **{"lr": 3e-3, "lr_final": 0.05, "ema_decay": 0.9, "ema_start": 100, "clone": "expert"},
    **{"network.diffusion_steps": 10, "network.time_dim": 16},
    "network.plan": TrajectoryConfig(horizon=3, layers=1, width=32, inner=64, dropout=0.0),
    **{"acting.sampler": "ddim", "acting.steps": 4},
}


def right_action(state: np.ndarray, task: int) -> np.ndarray:
    return np.clip((GOALS[task] - state) / STEP, -1, 1)


def behave(rng: np.random.Generator, task: int, clean: bool) -> EpisodeRecord:
    """An episode of the behaviour policy: three of four actions are random, unless it is clean."""
    states, actions, experts = [rng.uniform(-1, 1, 2)], [], []
    for _ in range(LENGTH):
        experts.append(right_action(states[-1], task))
        actions.append(rng.uniform(-1, 1, 2) if not clean and rng.random() < 0.75 else experts[-1])
        states.append(states[-1] + STEP * actions[-1])
    return EpisodeRecord(states, actions, np.zeros(LENGTH), f"goal-{task}", expert_actions=experts, success=int(clean))


def final_distance(states: np.ndarray, task: int) -> float:
    return float(np.linalg.norm(states - GOALS[task], axis=1).mean())


def point_data(rng: np.random.Generator) -> tuple[TrajectoryDataset, float]:
    """Data of both tasks, one of five episodes clean (the demonstrations), and how far from the goals they end."""
    episodes = [behave(rng, task, number % 5 == 0) for task in (0, 1) for number in range(60)]
    ends = [final_distance(np.asarray(e.observations)[-1:], int(e.task[-1])) for e in episodes]
    return join_episodes(episodes, source="made by a test"), float(np.mean(ends))


@pytest.mark.parametrize(("text", "trajectory"), [(True, False), (False, True), (False, False)])
def test_it_learns_what_either_prompt_says_and_cannot_without(
    rng: np.random.Generator, make_method: Any, make_network: Any, text: bool, trajectory: bool
) -> None:
    data, behaviour = point_data(rng)
    changes = {**LEARNING, "network.context.text": text, "network.context.trajectory": trajectory}
    network = make_network(NAME, Spaces(2, 2, 8), **changes)
    network.fit(torch.from_numpy(data.observations), lambda: torch.zeros(1))
    method = make_method(NAME, 450, network, **changes)
    embeddings = torch.from_numpy(rng.normal(size=(2, 8)).astype(np.float32))
    encoder = network.reads.encoder if trajectory else None
    given, device = embeddings if text else None, torch.device("cpu")
    sampler = BatchSampler(data, given, encoder, 128, 2, 0, device, horizon=network.window.horizon)
    for iteration in range(450):
        method.update(sampler.next(), iteration)
    policy = Policy(NAME, method.acting_network, None, method.config.acting)
    tokens = policy._tokens([data.episode(int(data.episodes_of(f"goal-{task}")[0])) for task in (0, 1)])
    prompts = policy.network.encode(given, tokens if trajectory else None)
    task = np.repeat([0, 1], 100)
    episodes = policy.episodes(prompts, task if text or trajectory else None)
    states = rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    for step in range(LENGTH):
        actions = episodes.act(
            np.arange(200), np.full(200, step), states, np.zeros(200), lambda rows: rng.integers(0, 2**62, len(rows))
        )
        states = (states + STEP * actions).astype(np.float32)
    learned = np.mean([final_distance(states[task == one], one) for one in (0, 1)])
    # The margin: a quarter of how far from the goal the behaviour policy ends.
    assert learned < 0.25 * behaviour if text or trajectory else learned > behaviour
