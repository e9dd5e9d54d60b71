"""Settings that can be refused before anything is read, collected or trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmdpd.config import TrainConfig
from llmdpd.errors import InputError
from llmdpd.training.batches import check_batch

_LEAST: dict[str, float] = {
    "seed": 0,
    "threads": 1,
    "data.episodes": 1,
    "data.prompt_episodes": 1,
    "data.seed": 0,
    "data.workers": 1,
    "policy.hidden_dim": 1,
    "policy.diffusion_steps": 1,
    "agent.lr": 0.0,
    "agent.critic_lr": 0.0,
    "agent.weight_decay": 0.0,
    "agent.grad_clip": 0.0,
    "agent.ema_every": 1,
    "agent.critic_hidden": 1,
    "training.iterations": 1,
    "training.batch_size": 1,
    "training.tasks_per_batch": 1,
    "training.log_every": 1,
    "training.checkpoint_every": 1,
    "training.select_every": 0,
    "training.select_episodes": 1,
    "acting.samples": 1,
    "evaluation.episodes": 1,
    "evaluation.max_steps": 1,
}


def check_values(config: TrainConfig) -> None:
    """Numbers in range, and fields that fit together.

    Raises:
        InputError: naming the first field that is wrong.
    """
    check_least(config, _LEAST)
    check_batch(config.training.batch_size, config.training.tasks_per_batch, len(config.tasks.seen))
    heads, width = config.policy.context.encoder.heads, config.policy.context.encoder.width
    if heads < 1 or width % heads:
        raise InputError(
            "the trajectory encoder's width cannot be shared out among its heads",
            field="policy.context.encoder.heads",
            found=heads,
            expected=f"a divisor of {width} (policy.context.encoder.width)",
        )
    config.acting.plan(config.policy)
    if config.acting.samples > 1 and not config.agent.eta:
        raise InputError(
            "no critic to choose among samples by",
            field="acting.samples",
            found=config.acting.samples,
            expected="1 where agent.eta is 0: cloning alone trains no critic",
        )


def check_least(config: Any, least: Mapping[str, float]) -> None:
    """Raise `InputError` for a field of a dataclass (dotted name) below its bound; None passes."""
    for name, bound in least.items():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None and value < bound:
            raise InputError("the number is too small", field=name, found=value, expected=f"at least {bound}")
