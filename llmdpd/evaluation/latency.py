"""What acting costs: the policy's size, and how long it takes over an action."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.policy.policy import Policy

_WARM_UP, _TIMED = 10, 100


def acting_facts(policy: Policy, prompt: TaskPrompt, observations: NDArray[np.float32]) -> dict[str, Any]:
    """Parameters of what acts (critics too, where they choose), and the time of an action on this machine, busy or not.

    The median of 100, a state at a time, in all of its views; of a policy with chunks, of 100 chunks, each divided by
    its actions that are played. The prompt is read before.

    observations [N, S]: states to act in, taken in turn.
    """
    context = policy.network.config.context
    example = prompt.examples[0] if context.trajectory and prompt.examples else None
    policy.prompt(prompt.text if context.text else None, example)
    seconds = []
    for number in range(_WARM_UP + _TIMED):
        begin = time.perf_counter()
        for _ in range(policy.replan):
            policy.act(observations[number % len(observations)])
        seconds.append((time.perf_counter() - begin) / policy.replan)
    parts = [policy.network, *([policy.critic] if policy.critic is not None and policy.acting.samples > 1 else [])]
    return {
        "parameters": sum(parameter.numel() for part in parts for parameter in part.parameters()),
        "milliseconds_an_action": round(1e3 * statistics.median(seconds[_WARM_UP:]), 4),
    }
