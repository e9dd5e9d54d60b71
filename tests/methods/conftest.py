"""Small agents and batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.methods.batch import PromptedBatch, StepWindows
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.policy_network import ConditionalPolicy, PolicyConfig
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens

S, A, D = 4, 2, 6
# Without dropout, so that a prompt read twice is the same.
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8, dropout=0.0)
CONTEXT = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=3, encoder=ENCODER)

MakeAgent = Callable[..., LLMDPD]
MakeBatch = Callable[..., PromptedBatch]


@pytest.fixture
def make_agent(rng: np.random.Generator) -> MakeAgent:
    """An agent whose EMA policy and target critics differ from the trained ones."""

    def make(iterations: int = 100, context: dict[str, Any] | None = None, chunk: int = 1, **changes: Any) -> LLMDPD:
        whole = dataclasses.replace(CONTEXT, **(context or {}))
        policy = PolicyConfig(hidden_dim=16, time_dim=8, chunk=chunk, context=whole)
        network = ConditionalPolicy(S, A, D, policy)
        network.context.features.fit(torch.randn(60, S) * 2 + 1)
        agent = LLMDPD(network, LLMDPDConfig(**{"critic_hidden": 16, **changes}), iterations)
        with torch.no_grad():
            for module in (agent.ema_policy, agent.target_critic):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return agent

    return make


@pytest.fixture
def make_batch(rng: np.random.Generator) -> MakeBatch:
    """B transitions, shared out over P prompts; with windows of H steps, the rows' episodes ending anywhere in them."""

    def windows(B: int, H: int, expert: bool) -> StepWindows:
        ends = torch.from_numpy(rng.integers(1, H + 1, B))
        actions = torch.rand(2, B, H, A) * 2 - 1
        mask = torch.arange(H) < ends[:, None]
        return StepWindows(torch.randn(B, H, S), actions[0], actions[1] if expert else None, mask, torch.randn(B, H))

    def make(B: int = 6, P: int = 1, expert: bool = True, H: int = 0) -> PromptedBatch:
        pairs = [
            (rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32))
            for n in rng.integers(2, 12, P)
        ]
        return PromptedBatch(
            observations=torch.randn(B, S),
            actions=torch.rand(B, A) * 2 - 1,
            rewards=torch.randn(B),
            next_observations=torch.randn(B, S),
            terminals=(torch.arange(B) % 3 == 1).float(),
            expert_actions=torch.rand(B, A) * 2 - 1 if expert else None,
            timesteps=torch.from_numpy(rng.integers(0, 50, B)),
            text=torch.randn(P, D),
            tokens=make_tokens(pairs, ENCODER),
            windows=windows(B, H, expert) if H else None,
        )

    return make


class Point:
    """A point in the unit square goes where its action says; the state holds the goal, one of two."""

    GOALS = np.array([[0.8, 0.5], [-0.8, -0.5]], np.float32)
    STEPS = 8

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def start(self, count: int) -> np.ndarray:
        goal = self.GOALS[self.rng.integers(0, 2, count)]
        return np.concatenate([self.rng.uniform(-1, 1, (count, 2)), goal], 1).astype(np.float32)

    def step(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = np.clip(state[:, :2] + 0.3 * action, -1, 1)
        reward = -np.linalg.norm(place - state[:, 2:], axis=1)
        return np.concatenate([place, state[:, 2:]], 1).astype(np.float32), reward

    def right(self, state: np.ndarray) -> np.ndarray:
        """What is best: straight to the goal."""
        return np.clip((state[:, 2:] - state[:, :2]) / 0.3, -1, 1).astype(np.float32)

    def behave(self, state: np.ndarray) -> np.ndarray:
        """What is right, weaker, and noise as large."""
        right = self.right(state)
        return np.clip(0.8 * right + self.rng.normal(0, 0.9, right.shape), -1, 1)

    def told(self, policy: Any) -> Callable[[np.ndarray, int], np.ndarray]:
        """How a policy acts that is told what each action earned."""

        def act(state: np.ndarray, step: int) -> np.ndarray:
            place = np.linalg.norm(state[:, :2] - state[:, 2:], axis=1)
            return policy.act(state, reward=-place if step else None)

        return act

    def episodes(self, act: Callable[[np.ndarray, int], np.ndarray], count: int) -> tuple[float, list[Any]]:
        """The mean return, and the transitions."""
        state, total, steps = self.start(count), np.zeros(count), []
        for step in range(self.STEPS):
            action = act(state, step).astype(np.float32)
            following, reward = self.step(state, action)
            steps.append((state, action, reward, following, np.full(count, step)))
            state, total = following, total + reward
        return float(total.mean()), steps


@pytest.fixture
def world(rng: np.random.Generator) -> Point:
    """A world of points."""
    return Point(rng)
