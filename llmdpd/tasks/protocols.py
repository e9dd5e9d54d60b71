"""Protocols: which tasks are trained on, and which are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from llmdpd.errors import InputError
from llmdpd.tasks import SUITES

_DEFAULT = "paper"


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks are learned and which are only evaluated."""

    protocol: str = _DEFAULT
    """Name of this split in results; a name of `PROTOCOLS` becomes `custom` there where the tasks are not its own."""
    seen: tuple[str, ...] = field(default_factory=lambda: PROTOCOLS[_DEFAULT].seen)
    """Tasks that are trained on, all of one suite."""
    unseen: tuple[str, ...] = field(default_factory=lambda: PROTOCOLS[_DEFAULT].unseen)
    """Tasks that are evaluated zero-shot: a text and one demonstration, no training."""
    goal_visible: bool = True
    """Whether observations show the goal, in data and evaluation, where the suite can hide it."""
    file: str | None = None
    """A task file, tasks.toml, with tasks of your own (see `llmdpd.tasks.user.file`)."""

    @property
    def all(self) -> tuple[str, ...]:
        """The seen tasks, then the unseen ones."""
        return (*self.seen, *self.unseen)

    def canonical(self, name: Callable[[str], str]) -> TaskConfig:
        """The same with each task's name as `name` has it, once.

        Raises:
            InputError: no seen task, or a task that is both seen and unseen; and as `name`.
        """
        seen, unseen = (tuple(dict.fromkeys(map(name, tasks))) for tasks in (self.seen, self.unseen))
        if not seen:
            raise InputError("no task to train on", field="tasks.seen", found="none", expected="at least one")
        both = sorted(set(seen) & set(unseen))
        if both:
            raise InputError("a task is both seen and unseen", field="tasks.unseen", found=", ".join(both))
        return replace(self, seen=seen, unseen=unseen)


class _Protocols(Mapping[str, TaskConfig]):
    """The protocols of all suites, which are only asked when one is looked up."""

    def __getitem__(self, name: str) -> TaskConfig:
        for suite in SUITES.values():
            if name in suite.protocols:
                return TaskConfig(name, *suite.protocols[name])
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for suite in SUITES.values() for name in suite.protocols))

    def __len__(self) -> int:
        return sum(1 for _ in self)


PROTOCOLS: Mapping[str, TaskConfig] = _Protocols()
"""What is trained on and what is held out, by name, as the suites declare it. No simulator is imported for it."""
