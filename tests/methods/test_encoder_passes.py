"""Each network encodes the prompts of a batch once for each version of its weights: a pass costs time, and in training
every pass has its own dropout mask, under which two losses would disagree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

# In CQL's iteration the actor's step changes the encoders, and the critics then encode the prompts anew.
PASSES = {
    "llmdpd": {"policy": 1, "ema_policy": 1},
    "diffusion-bc": {"policy": 1},
    "bc": {"policy": 1},
    **{name: {"policy": 1, "target_policy": 1} for name in ("td3-bc", "rad", "s4rl", "rd")},
    **{name: {"policy": 2} for name in ("cql", "ads")},
    # Models read prompts beside the actor, without its gradient.
    **{name: {"policy": 3} for name in ("pnf", "otto")},
    "trajectory-diffusion": {"policy": 1},
}


@pytest.mark.parametrize("name", PASSES)
def test_prompts_are_encoded_once_for_each_version_of_the_weights(
    name: str, make_method: Any, make_batch: Any, calls_of: Any
) -> None:
    more: dict[str, Any] = {"s4rl": {"states.copies": 3}, "diffusion-bc": {"eta": 0.0}}.get(name, {})
    method = make_method(name, **{"network.context.text": True, "network.context.trajectory": True, **more})
    encoders = {part: getattr(module, "context", None) for part, module in method.modules.items()}
    calls = {part: calls_of(one.trajectory_encoder, "encode_steps") for part, one in encoders.items() if one}
    for iteration in range(2):  # TD3's actor learns in the second alone
        method.update(make_batch(6, 2, H=5), iteration)
    assert {part: len(found) for part, found in calls.items() if found} == {
        part: 2 * count for part, count in PASSES[name].items()
    }


def test_old_and_new_states_are_encoded_under_one_dropout_mask(
    make_method: Any, make_batch: Any, calls_of: Any
) -> None:
    """The critics' target has the prompt vector that their prediction has, dropout and all."""
    method, batch = make_method(critic_sees_prompts=True), make_batch(6)
    batch = replace(batch, next_observations=batch.observations)
    method.policy.context.trajectory_encoder.transformer.layers[0].dropout1.p = 0.5
    method.policy.train()
    calls = calls_of(method.target_critic, "minimum")
    prompts = method.encode(batch)
    condition = method.condition(batch, prompts)
    method.critic_loss(batch, prompts, condition)
    ((state, _, prompt, *_),) = calls
    assert torch.equal(state, condition.state)
    assert torch.equal(prompt, condition.prompt.detach().expand(6, -1))
