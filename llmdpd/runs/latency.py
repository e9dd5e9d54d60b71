"""What acting costs: the policy's size, and how long it takes over an action."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdpd.policy import Policy
from llmdpd.runs.prompts import TaskPrompt

_WARM_UP, _TIMED = 10, 100


def acting_facts(policy: Policy, prompt: TaskPrompt, observations: NDArray[np.float32]) -> dict[str, Any]:
    """Parameters of what acts, and the median time of an action, a state at a time, on this machine as busy as it is.

    observations [N, S]: states to act in, taken in turn. The prompt is read before; of H actions in a chunk one costs.
    """
    context = policy.network.config.context
    example = prompt.examples[0] if context.trajectory and prompt.examples else None
    policy.prompt(prompt.text if context.text else None, example)
    seconds = []
    for number in range(_WARM_UP + _TIMED):
        begin = time.perf_counter()
        policy.act(observations[number % len(observations)])
        seconds.append(time.perf_counter() - begin)
    return {
        "parameters": sum(parameter.numel() for parameter in policy.network.parameters()),
        "milliseconds_an_action": round(1e3 * statistics.median(seconds[_WARM_UP:]), 4),
    }
