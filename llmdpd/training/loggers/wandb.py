"""Weights & Biases, by its own library; its environment variables (WANDB_MODE, WANDB_PROJECT …) hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from llmdpd.errors import InputError
from llmdpd.training.loggers.base import PROJECT, Logger, configuration
from llmdpd.utils.extras import check_installed, extra

_LOCAL = ("offline", "dryrun", "disabled")


class WeightsAndBiases(Logger):
    """A W&B run, the same one after each resume. See `Logger`."""

    def __init__(self, run: Path, name: str, resume_at: int | None) -> None:
        with extra("wandb"):
            import wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=name,
                name=run.name,
                dir=run,
                config=configuration(run),
                resume="allow",
                reinit="create_new",  # several seeds of one process log at the same time
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            hint = "wandb login; or WANDB_MODE=offline, and wandb sync later"
            found = " ".join(str(error).split())[:300]
            raise InputError("Weights & Biases refuses", field="training.logger", found=found, hint=hint) from None

    @classmethod
    def require(cls) -> None:
        check_installed("wandb", field="training.logger")
        if os.environ.get("WANDB_MODE", "online") in _LOCAL:
            return
        with extra("wandb"):
            import wandb
        if not wandb.api.api_key:
            hint = "wandb login; or WANDB_MODE=offline, and wandb sync later"
            raise InputError("Weights & Biases has no key of yours", field="training.logger", found="wandb", hint=hint)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
