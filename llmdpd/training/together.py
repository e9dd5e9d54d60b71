"""Runs that differ by their seed, trained in one process: each one is what it is alone, bit for bit.

They do their iterations in turns, each with torch's generators as it has them alone. A run that is behind the others,
of which a kill left an older checkpoint, first goes on by itself until it is where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmdpd.errors import StopRequestedError, TrainingDivergedError
from llmdpd.training.loop import TrainingLoop
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.progress import ProgressBar, console


class Generators:
    """torch's random generators, of the CPU and of a run's device, as one of several runs has them."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.Generator()
        self.cpu.set_state(torch.get_rng_state())
        self._device = device if device.type == "cuda" else None
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the block runs, what is drawn is drawn by them."""
        torch.set_rng_state(self.cpu.get_state())
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        try:
            yield
        finally:
            self.cpu.set_state(torch.get_rng_state())
            if self._device is not None:
                self._cuda = torch.cuda.get_rng_state(self._device)


@dataclass(eq=False)
class Member:
    """One of several runs in a process; `failed`: why it is left out of what follows."""

    loop: TrainingLoop
    generators: Generators
    failed: TrainingDivergedError | None = None

    @property
    def trains(self) -> bool:
        """Whether it has iterations left to do."""
        return self.failed is None and not self.loop.done

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While the block runs, it is this run's turn; one that diverges there is left out."""
        try:
            with self.generators.active():
                yield
        except TrainingDivergedError as error:
            self.failed = error
            console.print(f"{self.loop.name}: {error}\n  The other seeds go on.")


@dataclass
class Together:
    """Trains several runs to their ends, each from its last checkpoint if there is one."""

    members: Sequence[Member]
    description: ClassVar[str] = "they take turns"

    def execute(self, stop: StopSignals) -> None:
        """Train all of them, but for those that diverge.

        Raises:
            StopRequestedError: after saving all, if a stop was asked for.
            InputError: as `TrainingLoop.execute`; the others' last checkpoints are whole.
        """
        with ExitStack() as opened, ProgressBar(f"training {len(self.members)} seeds", "it") as bar:
            try:
                for member in self.members:
                    with member.turn():
                        opened.enter_context(member.loop.begun())
                        member.loop.marks(stop)
                while training := [member for member in self.members if member.trains]:
                    first = min(member.loop.iteration for member in training)
                    self._iterate([member for member in training if member.loop.iteration == first], stop, bar)
            except StopRequestedError:
                for member in self.members:
                    if member.failed is None and member.loop.iteration:
                        with member.turn():
                            member.loop.save_stopped()
                raise

    def _iterate(self, members: Sequence[Member], stop: StopSignals, bar: ProgressBar) -> None:
        """An iteration of each."""
        for member in members:
            loop = member.loop
            with member.turn():
                recorded = loop.learned(loop.learner.update(loop.sampler.next(), loop.iteration))
                if member is members[-1]:  # all of them are there now
                    loop.show(bar, recorded)
                loop.marks(stop)
