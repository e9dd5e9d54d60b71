"""Algorithm 1 learns two tasks that nothing but the prompt tells apart, and cannot where the prompt is switched off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.policy_network import ConditionalPolicy, PolicyConfig
from llmdpd.policy.policy import Policy
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens

GOALS = np.array([[0.8, 0.5], [-0.8, -0.5]], np.float32)
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=32, steps=6, dropout=0.0)


class TwoGoals:
    """A point in the unit square: the right action is half of the way to the goal of the task."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.text = torch.from_numpy(rng.normal(size=(2, 8)).astype(np.float32))

    def right(self, state: np.ndarray, task: np.ndarray) -> np.ndarray:
        return 0.5 * (GOALS[task] - state)

    def example(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        state = self.rng.uniform(-1, 1, (6, 2)).astype(np.float32)
        return state, self.right(state, np.full(6, task)).astype(np.float32)

    def batch(self, size: int, random_actions: bool) -> PromptedBatch:
        state = self.rng.uniform(-1, 1, (size, 2)).astype(np.float32)
        task = np.repeat([0, 1], size // 2)
        right = self.right(state, task)
        actions = self.rng.uniform(-1, 1, (size, 2)) if random_actions else right
        reward = -np.square(actions - right).sum(1)
        tensors: list[Tensor] = [torch.from_numpy(x.astype(np.float32)) for x in (state, actions, reward, state)]
        return PromptedBatch(
            *tensors,
            terminals=torch.ones(size),
            expert_actions=None,
            timesteps=torch.zeros(size, dtype=torch.int64),
            text=self.text,
            tokens=make_tokens([self.example(0), self.example(1)], ENCODER),
        )


def train(world: TwoGoals, iterations: int, context: ContextConfig, random_actions: bool, **config: Any) -> Policy:
    network = ConditionalPolicy(2, 2, 8, PolicyConfig(hidden_dim=48, context=context))
    agent = LLMDPD(network, LLMDPDConfig(lr=3e-3, lr_final=0.1, ema_decay=0.9, critic_hidden=48, **config), iterations)
    for iteration in range(iterations):
        agent.update(world.batch(128, random_actions), iteration)
    return Policy(agent.ema_policy, agent.critic if agent.config.eta else None, ActingConfig(samples=1))


def error(world: TwoGoals, policy: Policy) -> float:
    """Mean distance of the actions from the right ones, over both tasks."""
    errors = []
    for task in (0, 1):
        tokens = make_tokens([world.example(task)], ENCODER)
        prompts = policy.network.encode(world.text[task : task + 1], tokens)
        state = world.rng.uniform(-1, 1, (300, 2)).astype(np.float32)
        seeds = world.rng.integers(0, 2**62, 300)
        actions = policy.act_many(state, prompts, None, np.zeros(300, np.int64), seeds)
        errors.append(np.linalg.norm(actions - world.right(state, np.full(300, task)), axis=1).mean())
    return float(np.mean(errors))


def context(text: bool, trajectory: bool) -> ContextConfig:
    return ContextConfig(
        text=text, trajectory=trajectory, text_dim=8, text_hidden=32, trajectory_dim=8, encoder=ENCODER
    )


@pytest.mark.parametrize(("text", "trajectory"), [(True, False), (False, True), (True, True)])
def test_cloning_follows_either_prompt(rng: np.random.Generator, text: bool, trajectory: bool) -> None:
    world = TwoGoals(rng)
    policy = train(world, 300, context(text, trajectory), random_actions=False, eta=0.0)
    # The two tasks' right actions lie 0.94 apart: half of that is what not knowing costs at least.
    assert error(world, policy) < 0.2


def test_cloning_without_a_prompt_cannot_tell(rng: np.random.Generator) -> None:
    world = TwoGoals(rng)
    policy = train(world, 300, context(False, False), random_actions=False, eta=0.0)
    assert error(world, policy) > 0.4


def test_the_reward_term_improves_on_the_data(rng: np.random.Generator) -> None:
    """From random actions: cloning is as bad as the data, with the critics' reward term it finds the right ones."""
    world = TwoGoals(rng)
    cloned = error(world, train(world, 250, context(True, False), random_actions=True, eta=0.0))
    learned = train(
        world, 350, context(True, False), random_actions=True, eta=3.0, critic_sees_prompts=True, critic_lr=3e-3
    )
    assert cloned > 0.5
    assert error(world, learned) < 0.6 * cloned
