"""The training loop: batches to a learner, metrics, checkpoints, selection; resumable bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from llmdpd.errors import StopRequestedError
from llmdpd.training.config import TrainingConfig
from llmdpd.training.metrics import MetricsWriter, NoMetrics, first_not_finite
from llmdpd.training.sharing import check_alike
from llmdpd.training.stopping import StopSignals
from llmdpd.utils import checkpoint as checkpoints
from llmdpd.utils import ranks
from llmdpd.utils.checkpoint import Checkpointed, check_learner, diverged, latest_checkpoint, refused_write
from llmdpd.utils.progress import ProgressBar, console

_TOLD = 8  # numbers of a selection that are printed


class Trained(Checkpointed, Protocol):
    """What the loop needs of a learner: `Learner` itself, or `GraphedUpdate` around it."""

    def update(self, batch: Any, iteration: int) -> dict[str, Tensor]: ...


class Sampler(Protocol):
    """What an iteration learns from: batches of a data set (`BatchSampler`), or steps in an environment."""

    def next(self) -> Any: ...

    def state(self) -> dict[str, Any]:
        """What has to be known to go on, as JSON, asked for right before a checkpoint of it.

        Raises:
            OSError: what it writes beside the checkpoint is refused by the disk.
        """

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was called; the learner has been brought back before."""


@dataclass
class Hooks:
    """What the run does at its marks.

    select: evaluate on the seen tasks → values to record, and the score that `best` is chosen by.
    keep: write the policy as it is now, as "last" or "best".
    """

    select: Callable[[], tuple[dict[str, float], float]]
    keep: Callable[[str, int], None]


@dataclass
class TrainingLoop:
    """Trains a learner for `config.iterations`, from the run's last checkpoint if there is one.

    `inputs` is kept in every checkpoint (what the run learns from, see `llmdpd.runs.pipeline`); `name` tells the run
    from others in the same process. Of several processes (`llmdpd.utils.ranks`) the first one alone writes; all do the
    same iterations, and stop after the same one.
    """

    run: Path
    learner: Trained
    sampler: Sampler
    config: TrainingConfig
    hooks: Hooks
    inputs: Mapping[str, Any]
    name: str = ""

    def __post_init__(self) -> None:
        self.iteration = 0
        self.best_score: float | None = None
        self._elapsed = 0.0
        self._window: list[dict[str, Tensor]] = []
        self._marks_due = False
        self._metrics: MetricsWriter | NoMetrics = NoMetrics()

    def execute(self, stop: StopSignals) -> float:
        """Train to the end; returns training seconds, those before a resume included.

        Raises:
            StopRequestedError: after saving, if a stop was asked for.
            TrainingDivergedError: NaN or Inf in a metric, a weight or an optimiser's state.
            InputError: a checkpoint that can't be read or written; processes whose weights differ.
        """
        with self.begun(), ProgressBar("training", "it") as bar:
            try:
                bar.update(self.iteration, self.config.iterations)
                self.marks(stop)
                while not self.done:
                    self.show(bar, self.learned(self.learner.update(self.sampler.next(), self.iteration)))
                    self.marks(stop)
            except StopRequestedError:
                self.save_stopped()
                raise
            return self.seconds

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Go on from the last checkpoint, and record metrics while the block runs."""
        resume_at = self.iteration if self._restore() else None
        written = ranks.first(lambda: MetricsWriter(self.run, resume_at, self._elapsed, self.config.logger))
        with NoMetrics(self._elapsed) if written is None else written as self._metrics:
            yield

    @property
    def done(self) -> bool:
        """Whether all iterations are."""
        return self.iteration >= self.config.iterations

    @property
    def seconds(self) -> float:
        """Of training so far, those before a resume included."""
        return self._metrics.seconds

    def learned(self, metrics: dict[str, Tensor]) -> dict[str, float] | None:
        """Count an iteration, which gave these metrics; what was recorded of the last ones, where it is time to."""
        self._window.append(metrics)
        self.iteration += 1
        self._marks_due = True
        return self._flush() if self.iteration % self.config.log_every == 0 or self.done else None

    def show(self, bar: ProgressBar, recorded: dict[str, float] | None) -> None:
        """Tell what `learned` has recorded."""
        if recorded is not None:
            bar.update(self.iteration, self.config.iterations, _loss_words(recorded))

    def marks(self, stop: StopSignals) -> None:
        """What is due after an iteration and not done yet: a stop that was asked for, selection, checkpoint."""
        if not self._marks_due:
            return
        self._check_stop(stop)
        done = self.iteration
        if self._selects:
            self._flush()
            self._check()
            values, score = self.hooks.select()
            ranks.first(partial(self._metrics.write, done, values))
            # Of equals the later one: it has trained longer.
            if self.best_score is None or score >= self.best_score:
                self.best_score = score
                ranks.first(lambda: self._keep("best"))
            run = f"{self.name}, " if self.name else ""
            console.print(f"{run}selection at iteration {done}: {_selection_words(values)}")
        if self._saves:
            self._flush()
            self._save()
        self._marks_due = False

    @property
    def at_mark(self) -> bool:
        """Whether a selection or a checkpoint comes after this iteration."""
        return self._selects or self._saves

    @property
    def _selects(self) -> bool:
        every = self.config.select_every
        return bool(every) and (self.iteration % every == 0 or self.done)

    @property
    def _saves(self) -> bool:
        return self.iteration % self.config.checkpoint_every == 0 or self.done

    def save_stopped(self) -> None:
        """Save where a stop came. Before an iteration's marks were done, the resumed run begins with them."""
        self._flush()
        self._save(self._marks_due)

    def _check_stop(self, stop: StopSignals) -> None:
        """Stop after the same iteration in all processes, where a stop was asked for in any."""
        received = 0
        try:
            stop.check()
        except StopRequestedError as stopped:
            received = stopped.signal_number
        if received := ranks.greatest(received):
            raise StopRequestedError(received)

    def _flush(self) -> dict[str, float]:
        """Bring the window's metrics from the device, check them, record their means."""
        if not self._window:
            return {}
        # By one transfer; not every iteration has every metric.
        values = [value.float() for m in self._window for value in m.values()]
        numbers = iter(ranks.mean(torch.stack(values)).cpu().tolist() if values else ())
        window = [{name: next(numbers) for name in m} for m in self._window]
        self._window = []
        if bad := first_not_finite(window, self.iteration - len(window) + 1):
            raise diverged(f"{bad[0]} became {bad[2]} at iteration {bad[1]}", self.run / "checkpoint")
        names = dict.fromkeys(name for m in window for name in m)
        means = {name: fmean(m[name] for m in window if name in m) for name in names}
        if means:  # nothing in a warm-up
            ranks.first(partial(self._metrics.write, self.iteration, means))
        return means

    def _check(self) -> None:
        # Losses are of the weights before an update: the last one's are seen by themselves only.
        check_learner(self.learner, self.iteration, self.run / "checkpoint")

    def _save(self, marks_due: bool = False) -> None:
        self._check()
        check_alike(self.learner)
        ranks.first(lambda: self._write(marks_due))

    def _write(self, marks_due: bool) -> None:
        try:
            position = self.sampler.state()
        except OSError as error:
            raise refused_write("what it learns from", self.run, self.run / "checkpoint", error) from error
        state = {"sampler": position, "best_score": self.best_score, "elapsed": self.seconds, "marks_due": marks_due}
        # The checkpoint comes last: a kill between the two leaves a policy that the resumed run writes again, not a
        # finished run with the policy of an earlier iteration.
        self._keep("last")
        checkpoints.save_checkpoint(self.run / "checkpoint", self.learner, self.iteration, {**state, **self.inputs})

    def _keep(self, which: str) -> None:
        try:
            self.hooks.keep(which, self.iteration)
        except OSError as error:
            raise refused_write(f"the {which} policy", self.run, self.run / "checkpoint", error) from error

    def _restore(self) -> bool:
        checkpoint = ranks.after_first(lambda: latest_checkpoint(self.run / "checkpoint"))
        if checkpoint is None:
            return False
        state = checkpoints.read_state(checkpoint)
        checkpoints.load_checkpoint(checkpoint, self.learner)
        with checkpoints.fitting(checkpoint / "state.json"):
            self.sampler.load_state(state["sampler"])
            self.iteration, self.best_score, self._elapsed = state["iteration"], state["best_score"], state["elapsed"]
            self._marks_due = state["marks_due"]
        ranks.first(lambda: checkpoints.drop_others(checkpoint))
        console.print(f"resumed from {checkpoint} at iteration {self.iteration}")
        return True


def _loss_words(values: Mapping[str, float]) -> str:
    """The first of the losses, that of equation 5 where it is among them; nothing in a warm-up, which has none."""
    losses = [name for name in values if name.startswith("loss/")]
    if not losses:
        return ""
    name = "loss/diffusion" if "loss/diffusion" in losses else losses[0]
    return f"{name.removeprefix('loss/')} loss {values[name]:.4f}"


def _selection_words(values: Mapping[str, float]) -> str:
    """The mean, which comes first, and every task; of many tasks those that did worst."""
    words = {name: _in_words(name.removeprefix("eval/"), value) for name, value in values.items()}
    if len(words) <= _TOLD:
        return ", ".join(words.values())
    mean, *tasks = values
    errors = mean.endswith("_error")
    worst = sorted(tasks, key=lambda name: values[name], reverse=errors)[: _TOLD - 1]
    which = "highest" if errors else "lowest"
    return f"{words[mean]} over {len(tasks)} tasks; {which}: {', '.join(words[name] for name in worst)}"


def _in_words(name: str, value: float) -> str:
    """A selection's figure: success is a fraction, a normalised score (`..._score`) has 100 for an expert.

    An action's error is a share of its range.
    """
    if name.endswith("_score"):
        return f"{name} {value:.1f}"
    return f"{name} {value:.2%}" if name.endswith("_error") else f"{name} {value:.0%}"
