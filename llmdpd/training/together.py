"""Runs that differ by their seed, trained in one process: each one is what it is alone, bit for bit.

Where the method can, they do their iterations at once (`Learner.stacked`), else in turns, each with torch's generators
as it has them alone. A run that is behind the others, of which a kill left an older checkpoint, first goes on by itself
until it is where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmdpd.errors import StopRequestedError, TrainingDivergedError
from llmdpd.methods.stacked import Stacked
from llmdpd.training.cuda_graph import describe_cuda_graph, stacked
from llmdpd.training.loop import TrainingLoop
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.progress import ProgressBar, console


class Generators:
    """torch's random generators, of the CPU and of a run's device, as one of several runs has them."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.Generator()
        self.cpu.set_state(torch.get_rng_state())
        self._device, self.of_device = device, self.cpu
        if device.type == "cuda":
            self.of_device = torch.Generator(device)
            self.of_device.set_state(torch.cuda.get_rng_state(device))

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the block runs, what is drawn is drawn by them."""
        torch.set_rng_state(self.cpu.get_state())
        if self.of_device is not self.cpu:
            torch.cuda.set_rng_state(self.of_device.get_state(), self._device)
        try:
            yield
        finally:
            self.cpu.set_state(torch.get_rng_state())
            if self.of_device is not self.cpu:
                self.of_device.set_state(torch.cuda.get_rng_state(self._device))


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
    def guarded(self) -> Iterator[None]:
        """Leave the run out of what follows if it diverges in the block."""
        try:
            yield
        except TrainingDivergedError as error:
            self.failed = error
            console.print(f"{self.loop.name}: {error}\n  The other seeds go on.")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While the block runs, it is this run's turn."""
        with self.guarded(), self.generators.active():
            yield


class Together:
    """Trains several runs to their ends, each from its last checkpoint if there is one."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._stacked: list[Member] = []
        self._stack: Stacked | None = None

    @cached_property
    def description(self) -> str:
        """How they train, in words."""
        if self._stack_of(self.members) is not None:
            return "they train at once"
        return "they take turns (at once train those of policy diffusion with critics, a pooled context and no prompts)"

    @property
    def cuda_graph(self) -> str | None:
        """How those that trained last were replayed at once, in words; None where they took turns."""
        return None if self._stack is None else describe_cuda_graph(self._stack)

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
        stack = self._stack_of(members)
        if stack is None:
            for member in members:
                loop = member.loop
                with member.turn():
                    self._learned(member, loop.learner.update(loop.sampler.next(), loop.iteration), members, bar)
                    loop.marks(stop)
            return
        batches = [member.loop.sampler.next() for member in members]
        generators = [member.generators.of_device for member in members]
        found = stack.update(batches, members[0].loop.iteration, generators)
        for member, metrics in zip(members, found, strict=True):
            with member.guarded():
                self._learned(member, metrics, members, bar)
        for member in members:  # now that all have counted what they learned: a stop saves them
            if member.failed is None:
                with member.guarded(), member.generators.active() if member.loop.at_mark else nullcontext():
                    member.loop.marks(stop)

    def _learned(self, member: Member, metrics: dict[str, Tensor], members: Sequence[Member], bar: ProgressBar) -> None:
        recorded = member.loop.learned(metrics)
        if member is members[-1]:  # all of them are there now
            member.loop.show(bar, recorded)

    def _stack_of(self, members: Sequence[Member]) -> Stacked | None:
        """What does the iterations of these at once; None where they take turns."""
        if members != self._stacked:
            self._stacked, learners = list(members), [member.loop.learner for member in members]
            self._stack = stacked(learners)
        return self._stack
