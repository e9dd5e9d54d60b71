"""The configurations of the training loop and of what it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmdpd.errors import InputError
from llmdpd.training.loggers import LOGGERS
from llmdpd.utils.bounds import Count, Episodes, Fraction, WholeNumber
from llmdpd.utils.options import CudaGraphMode

Parts = Literal["all", "heads"]
Statistics = Literal["auto", "keep", "refit"]


@dataclass(frozen=True)
class InitConfig:
    """The trained policy whose weights a training starts from."""

    source: str | None = None
    """Run, policy folder or hub:OWNER/NAME of the policy; by default weights are random."""
    parts: Parts = "all"
    """What is learned: `all` of the policy, or its `heads` alone, which name the action from what frozen encoders read
    of state and prompts. Critics are learned in either case."""
    statistics: Statistics = "auto"
    """Of observations, returns and actions: `keep` the policy's; `refit` them to the new data; or `auto`: keep them,
    except where the new data lie so far beyond that the policy would not see, or could not do, what they have."""
    replay: Fraction = 0.0
    """Share of a batch's prompts that are of the tasks that the policy was trained on, from its run's data, so that it
    does not forget them."""
    average: Fraction = 0.5
    """Share of the policy's own weights in the mean, of them and the learned ones, that acts (WiSE-FT, Wortsman et al.
    2022): it forgets less, and learns few demonstrations less by heart. Where statistics or the range of actions are
    not kept, weights mean something else than they did, and the learned ones act alone."""

    def check(self) -> None:
        """Raise `InputError` for options without a policy to start from, and for replay alone."""
        given = [
            name
            for name in ("parts", "statistics", "replay", "average")
            if getattr(self, name) != getattr(InitConfig, name)
        ]
        if self.source is None and given:
            raise InputError(
                "nothing says which policy the training starts from",
                field=given[0],
                found=getattr(self, given[0]),
                expected="--init with a run, a policy folder or hub:OWNER/NAME beside it",
            )
        for name in ("replay", "average"):
            if getattr(self, name) == 1:
                raise InputError("nothing new would be learned", field=name, found=1, expected="below 1")


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
