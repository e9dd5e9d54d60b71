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

# Numbers that a noise network denoises at once: what the samplers are tested up to.
ACTION_NUMBERS: Interval = (1, 65_536)


def _optimisation(part: str) -> dict[str, Interval]:
    """The intervals of `llmdpd.methods.optimisation.OptimisationConfig`, as a part of the configuration."""
    limits = {
        "lr": _FROM_ZERO,
        "lr_warmup": _FROM_ZERO,
        "lr_final": _FRACTION,
        "weight_decay": _FROM_ZERO,
        "grad_clip": _FROM_ZERO,
        "ema_decay": _FRACTION,
        "ema_every": _COUNT,
        "ema_start": _FROM_ZERO,
    }
    return {f"{part}.{name}": interval for name, interval in limits.items()}


LIMITS: dict[str, Interval] = {
    "seed": (0, 2**63 - 1),
    "threads": _FROM_ZERO,
    "data.episodes": _COUNT,
    "data.prompt_episodes": _COUNT,
    "data.tail": _FROM_ZERO,
    "data.seed": (0, 2**63 - 1),
    "data.fraction": (1e-6, 1),
    "data.sac_steps": _COUNT,
    "data.workers": _COUNT,
    "policy.hidden_dim": _WIDTH,
    "policy.time_dim": (2, 16_384),
    "policy.diffusion_steps": (1, 10_000),
    "policy.action_bound": (1e-6, MOST),
    "policy.chunk": (1, 1000),
    "policy.plan.horizon": (1, 1000),
    "policy.plan.layers": _LAYERS,
    "policy.plan.heads": _WIDTH,
    "policy.plan.width": _WIDTH,
    "policy.plan.inner": _WIDTH,
    "policy.plan.dropout": _FRACTION,
    "policy.plan.history": (1, 1000),
    "policy.plan.guidance": _FROM_ZERO,
    "policy.sequence.context": (1, 1000),
    "policy.sequence.layers": _LAYERS,
    "policy.sequence.heads": _WIDTH,
    "policy.sequence.width": _WIDTH,
    "policy.sequence.dropout": _FRACTION,
    "policy.sequence.longest": (1, 1_000_000),
    "policy.language.layers": _LAYERS,
    "policy.language.heads": _WIDTH,
    "policy.language.width": _WIDTH,
    "policy.language.inner": (1, 65_536),
    "policy.language.epsilon": _FROM_ZERO,
    "policy.lora.rank": _WIDTH,
    "policy.lora.alpha": _FROM_ZERO,
    "policy.lora.dropout": _FRACTION,
    "policy.context.text_dim": _WIDTH,
    "policy.context.text_hidden": _WIDTH,
    "policy.context.trajectory_dim": _WIDTH,
    "policy.context.text_dropout": _FRACTION,
    "policy.context.trajectory_dropout": _FRACTION,
    "policy.context.retrieval.layers": _LAYERS,
    "policy.context.retrieval.heads": _WIDTH,
    "policy.context.retrieval.width": _WIDTH,
    "policy.context.encoder.layers": _LAYERS,
    "policy.context.encoder.heads": _WIDTH,
    "policy.context.encoder.width": _WIDTH,
    "policy.context.encoder.inner": _WIDTH,
    "policy.context.encoder.dropout": _FRACTION,
    "policy.context.encoder.steps": _COUNT,
    **_optimisation("agent"),
    "agent.critic_lr": _FROM_ZERO,
    "agent.gamma": _FRACTION,
    "agent.tau": _FRACTION,
    "agent.eta": _FROM_ZERO,
    "agent.reward_scale": _FROM_ZERO,
    "agent.critic_hidden": _WIDTH,
    **_optimisation("planner"),
    "planner.first_action_weight": _FROM_ZERO,
    **_optimisation("bc"),
    **_optimisation("td3_bc"),
    "td3_bc.critic_lr": _FROM_ZERO,
    "td3_bc.critic_hidden": _WIDTH,
    "td3_bc.gamma": _FRACTION,
    "td3_bc.tau": _FRACTION,
    "td3_bc.alpha": _FROM_ZERO,
    "td3_bc.policy_noise": _FROM_ZERO,
    "td3_bc.noise_clip": _FROM_ZERO,
    "td3_bc.policy_every": _COUNT,
    "td3_bc.reward_scale": _FROM_ZERO,
    "rad.scale_low": _FROM_ZERO,
    "rad.scale_high": _FROM_ZERO,
    "rad.sigma": _FROM_ZERO,
    "s4rl.sigma": _FROM_ZERO,
    "s4rl.width": _FROM_ZERO,
    "s4rl.dropout": _FRACTION,
    "s4rl.mixup": (1e-6, MOST),
    "s4rl.step": _FROM_ZERO,
    "s4rl.copies": (1, 64),
    **_optimisation("cql"),
    "cql.critic_lr": _FROM_ZERO,
    "cql.critic_hidden": _WIDTH,
    "cql.gamma": _FRACTION,
    "cql.tau": _FRACTION,
    "cql.penalty": _FROM_ZERO,
    "cql.draws": (1, 1000),
    "cql.temperature_lr": _FROM_ZERO,
    "cql.reward_scale": _FROM_ZERO,
    **_optimisation("dt"),
    **_optimisation("mtdiff"),
    "mtdiff.first_action_weight": _FROM_ZERO,
    "mtdiff.return_probability": _FRACTION,
    **_optimisation("lamo"),
    "lamo.language_weight": _FROM_ZERO,
    "lamo.language_batch": _COUNT,
    "lamo.language_block": (2, MOST),
    "lamo.lm_lr": _FROM_ZERO,
    "sac.lr": _FROM_ZERO,
    "sac.gamma": _FRACTION,
    "sac.tau": _FRACTION,
    "sac.learning_starts": _FROM_ZERO,
    "sac.max_steps": _COUNT,
    "training.iterations": _COUNT,
    "training.batch_size": _COUNT,
    "training.prompts_per_batch": _COUNT,
    "training.augmentation.offset": _FROM_ZERO,
    "training.augmentation.offset_probability": _FRACTION,
    "training.augmentation.turn": _FRACTION,
    "training.augmentation.mirror": _FRACTION,
    "training.augmentation.gripper": _FRACTION,
    "training.augmentation.example_noise": _FRACTION,
    "training.augmentation.clock_scale": _FRACTION,
    "training.log_every": _COUNT,
    "training.checkpoint_every": _COUNT,
    "training.select_every": _FROM_ZERO,
    "training.select_episodes": _COUNT,
    "acting.samples": _COUNT,
    "acting.temperature": (1e-9, MOST),
    "acting.noise_scale": _FROM_ZERO,
    "acting.steps": _COUNT,
    "acting.replan": _COUNT,
    "acting.views": (1, 64),
    "evaluation.episodes": _COUNT,
    "evaluation.seen_episodes": _COUNT,
    "evaluation.video_tasks": _COUNT,
    "evaluation.max_steps": _COUNT,  # and the environment's own limit: see llmdpd.runs.checks
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
