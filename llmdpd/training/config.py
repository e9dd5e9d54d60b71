"""The training loop's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmdpd.errors import InputError
from llmdpd.training.loggers import LOGGERS
from llmdpd.utils.bounds import Count, Episodes, WholeNumber

CudaGraphMode = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    iterations: Count = 5000
    """Iterations of Algorithm 1, or of the method's own; of a method that learns online, environment steps."""
    log_every: Count = 50
    """Iterations from one metrics record to the next; losses are checked for NaN and Inf there."""
    checkpoint_every: Count = 1000
    """Iterations from one checkpoint to the next."""
    select_every: WholeNumber = 1000
    """Iterations from one evaluation on the seen tasks to the next; the best becomes `policy_best`. 0: never."""
    select_episodes: Episodes = 10
    """Episodes a seen task in those evaluations, on seeds apart from the reported ones."""
    logger: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: any of tensorboard, wandb, trackio; nothing named: nowhere."""
    cuda_graph: CudaGraphMode = "auto"
    """Replay iterations from CUDA graphs: `auto` on a GPU where it can be; `on`, and an error where it can't; `off`."""

    def check(self) -> None:
        """Raise `InputError` for a logger that is unknown or named twice."""
        for number, name in enumerate(self.logger):
            if name not in LOGGERS:
                raise LOGGERS.unknown(name)
            if name in self.logger[:number]:
                found, expected = " ".join(self.logger), "each at most once"
                raise InputError("a logger named twice", field="logger", found=found, expected=expected)
