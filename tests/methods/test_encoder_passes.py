"""Each network reads the prompts of a batch once for each version of its weights: a pass costs time, and in training
every pass has its own dropout mask, under which two losses would disagree."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmdpd.config.baselines import with_method
from llmdpd.config.schema import TrainConfig
from llmdpd.methods.networks import make_network
from llmdpd.methods.registry import make_agent as agent_of
from llmdpd.nn.context import ContextConfig
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig

CONTEXT = ContextConfig(
    text_dim=5,
    text_hidden=16,
    trajectory_dim=3,
    encoder=TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8, dropout=0.5),
)
# Of CQL's iteration: the actor's step changes the encoders, which the critics then read anew.
PASSES = {
    "llmdpd": {"policy": 1, "ema_policy": 1},
    "diffusion-bc": {"policy": 1},
    "bc": {"policy": 1},
    "td3-bc": {"policy": 1, "target_policy": 1},
    "rad": {"policy": 1, "target_policy": 1},
    "s4rl": {"policy": 1, "target_policy": 1},
    "cql": {"policy": 2},
}


def passes(agent: Any, batch: Any) -> Counter[str]:
    """Calls of each network's encoders in two iterations, of which TD3's actor learns in the second alone."""
    calls: Counter[str] = Counter()
    for name, module in agent.modules.items():
        for part in module.modules():
            if type(part).__name__ == "TrajectoryEncoder":
                real = part.encode_steps

                def counted(*arguments: Any, name: str = name, real: Any = real) -> Any:
                    calls[name] += 1
                    return real(*arguments)

                part.encode_steps = counted
    for iteration in range(2):
        agent.update(batch, iteration)
    return calls


@pytest.mark.parametrize("method", PASSES)
def test_the_prompts_are_read_once_for_each_version_of_the_weights(method: Any, make_batch: Any) -> None:
    config = with_method(TrainConfig(), method)
    policy = replace(config.policy, hidden_dim=16, context=CONTEXT)
    config = replace(config, policy=policy, s4rl=replace(config.s4rl, copies=3))
    agent = agent_of(config, make_network(method, 4, 2, 6, policy))
    assert passes(agent, make_batch(6, 2)) == {name: 2 * count for name, count in PASSES[method].items()}


def test_old_and_new_states_are_read_under_one_dropout_mask(make_agent: Any, make_batch: Any) -> None:
    """The critics' target has the prompt vector that their prediction has, dropout and all."""
    agent, batch = make_agent(critic_sees_prompts=True), make_batch(6)
    batch = replace(batch, next_observations=batch.observations)
    agent.policy.context.trajectory_encoder.transformer.layers[0].dropout1.p = 0.5
    agent.policy.train()
    seen = []
    target = copy.copy(agent.target_critic.minimum)
    agent.target_critic.minimum = lambda state, actions, prompt, precision: (
        seen.append((state, prompt)) or target(state, actions, prompt, precision)
    )
    prompts = agent.policy.encode(batch.text, batch.tokens)
    condition = agent.policy.condition(batch.observations, prompts, None, batch.timesteps)
    agent.critic_loss(batch, prompts, condition)
    ((state, prompt),) = seen
    assert torch.equal(state, condition.state)
    assert torch.equal(prompt, condition.prompt.detach().expand(6, -1))
