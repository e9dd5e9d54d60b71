"""Between what each number of a configuration must lie."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError

Interval = tuple[float, float]

# No bound but that it is finite.
MOST = sys.float_info.max
_COUNT: Interval = (1, MOST)
_FROM_ZERO: Interval = (0, MOST)
_FRACTION: Interval = (0, 1)
# A network of more than this a layer is a slip of the pen, and would end as an allocation that fails.
_WIDTH: Interval = (1, 16_384)
_LAYERS: Interval = (1, 128)

LIMITS: dict[str, Interval] = {
    "seed": (0, 2**63 - 1),
    "threads": _FROM_ZERO,
    "data.episodes": _COUNT,
    "data.prompt_episodes": _COUNT,
    "data.seed": (0, 2**63 - 1),
    "data.workers": _COUNT,
    "policy.hidden_dim": _WIDTH,
    "policy.time_dim": (2, 16_384),
    "policy.diffusion_steps": (1, 10_000),
    "policy.action_bound": (1e-6, MOST),
    "policy.context.text_dim": _WIDTH,
    "policy.context.text_hidden": _WIDTH,
    "policy.context.trajectory_dim": _WIDTH,
    "policy.context.prompt_dropout": _FRACTION,
    "policy.context.encoder.layers": _LAYERS,
    "policy.context.encoder.heads": _WIDTH,
    "policy.context.encoder.width": _WIDTH,
    "policy.context.encoder.inner": _WIDTH,
    "policy.context.encoder.dropout": _FRACTION,
    "policy.context.encoder.steps": _COUNT,
    "agent.lr": _FROM_ZERO,
    "agent.critic_lr": _FROM_ZERO,
    "agent.lr_warmup": _FROM_ZERO,
    "agent.lr_final": _FRACTION,
    "agent.weight_decay": _FROM_ZERO,
    "agent.gamma": _FRACTION,
    "agent.tau": _FRACTION,
    "agent.eta": _FROM_ZERO,
    "agent.reward_scale": _FROM_ZERO,
    "agent.grad_clip": _FROM_ZERO,
    "agent.ema_decay": _FRACTION,
    "agent.ema_every": _COUNT,
    "agent.ema_start": _FROM_ZERO,
    "agent.critic_hidden": _WIDTH,
    "training.iterations": _COUNT,
    "training.batch_size": _COUNT,
    "training.tasks_per_batch": _COUNT,
    "training.log_every": _COUNT,
    "training.checkpoint_every": _COUNT,
    "training.select_every": _FROM_ZERO,
    "training.select_episodes": _COUNT,
    "acting.samples": _COUNT,
    "acting.temperature": (1e-9, MOST),
    "acting.noise_scale": _FROM_ZERO,
    "acting.steps": _COUNT,
    "evaluation.episodes": _COUNT,
    "evaluation.max_steps": (1, 500),  # Meta-World's own limit: an episode ends there
}
"""Every number of `TrainConfig` by its dotted name: (lowest, highest), both allowed."""


def check_limits(config: Any, limits: Mapping[str, Interval], part: str = "", path: str | Path | None = None) -> None:
    """Raise `InputError` for the first field of a dataclass that is NaN or outside its interval; None passes.

    `part` ("policy") says which part of the names in `limits` the dataclass is; `path` is the file that it came from.
    """
    prefix = f"{part}." if part else ""
    for name, (low, high) in limits.items():
        if not name.startswith(prefix):
            continue
        value = config
        for attribute in name.removeprefix(prefix).split("."):
            value = getattr(value, attribute)
        if value is not None and not low <= value <= high:
            expected = f"{low} to {high}" if high < MOST else f"a finite number, at least {low}"
            raise InputError("the number is out of range", path=path, field=name, found=value, expected=expected)
