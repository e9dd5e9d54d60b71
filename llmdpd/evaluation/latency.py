"""What acting costs: the policy's size, and the time that it takes to compute an action."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.policy.policy import Policy

_WARM_UP, _TIMED = 10, 100


def acting_cost(policy: Policy, prompt: TaskPrompt, observations: NDArray[np.float32]) -> dict[str, Any]:
    """Parameters of what acts (critics too, where they choose), and milliseconds an action on this machine.

    The time is the median of 100 calls, one state at a time, after the prompt was encoded; for a policy with action
    chunks, of 100 chunks, each divided by its action horizon.

    observations [N, S]: states to act in, taken in turn.
    """
    context = policy.network.reads
    policy.prompt(prompt.text if context.text else None, prompt.demonstration if context.trajectory else None)
    seconds = []
    for number in range(_WARM_UP + _TIMED):
        begin = time.perf_counter()
        for _ in range(policy.action_horizon):
            policy.act(observations[number % len(observations)])
        seconds.append((time.perf_counter() - begin) / policy.action_horizon)
    parts = [policy.network, *([policy.critic] if policy.critic is not None and policy.chooses else [])]
    return {
        "parameters": sum(parameter.numel() for part in parts for parameter in part.parameters()),
        "milliseconds_an_action": round(1e3 * statistics.median(seconds[_WARM_UP:]), 4),
    }
