"""Where a run's metrics go besides metrics.jsonl, one file a destination; found by name in `LOGGERS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmdpd.utils.registry import Registry

if TYPE_CHECKING:
    from llmdpd.training.loggers.base import Logger

LOGGERS: Registry[type[Logger]] = Registry(
    "logger",
    "llmdpd.loggers",
    {
        "tensorboard": "llmdpd.training.loggers.tensorboard:TensorBoard",
        "wandb": "llmdpd.training.loggers.wandb:WeightsAndBiases",
        "trackio": "llmdpd.training.loggers.trackio:Trackio",
    },
)
"""The loggers by name; an installed package adds its own by an entry point of this group, or by `register`."""
