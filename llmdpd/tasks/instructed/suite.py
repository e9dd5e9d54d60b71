"""Meta-World's tasks under instructions as a task suite: what is to be done is said by the text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmdpd.tasks.base import Environment, Split
from llmdpd.tasks.instructed.instructions import (
    FINISH,
    INSTRUCTIONS,
    TASKS,
    canonical,
    instructed_prompt,
    is_instructed,
    parts,
)
from llmdpd.tasks.metaworld.names import ML45_TEST
from llmdpd.tasks.metaworld.suite import MetaWorldSuite
from llmdpd.tasks.names import base_name

if TYPE_CHECKING:
    from llmdpd.tasks.demonstrators import Demonstrator

_BASES = """
    assembly basketball bin-picking button-press-topdown button-press-topdown-wall button-press button-press-wall
    coffee-pull coffee-push disassemble door-lock door-open door-unlock drawer-close faucet-close hand-insert
    handle-press-side handle-press handle-pull-side handle-pull peg-insert-side peg-unplug-side pick-out-of-hole
    pick-place pick-place-wall plate-slide-back-side plate-slide-back plate-slide-side plate-slide push-back push
    push-wall shelf-place soccer stick-pull stick-push sweep-into
"""
BASES: tuple[str, ...] = tuple(_BASES.split())
"""The protocol's tasks of Meta-World: those that both experts do, in four or more of the five clean episodes of the
seeds 0 to 4. Of each of the other 13 the expert that waits did none. Five seeds are few: of the next 15 it did 8 of
soccer and 11 of hand-insert, and the one that finishes did 11 of stick-pull."""


def _split() -> Split:
    """Seen and unseen: both instructions over those of `BASES` that ML45 trains on, and over those that it tests."""
    tests = tuple(map(base_name, ML45_TEST))

    def under_both(test: bool) -> tuple[str, ...]:
        return tuple(f"{each}-{base}" for base in BASES if (base in tests) is test for each in INSTRUCTIONS)

    return under_both(False), under_both(True)


class InstructedSuite(MetaWorldSuite):
    """Both instructions over each of Meta-World's 50 tasks; what is not said here is as there."""

    name = "Meta-World by text"
    tasks = TASKS
    groups: Mapping[str, tuple[str, ...]] = {}
    protocols: Mapping[str, Split] = {"text": _split()}

    def knows(self, task: str) -> bool:
        return is_instructed(task)

    def canonical(self, task: str) -> str:
        return canonical(task)

    def shown_by(self, task: str) -> str:
        _, base = parts(task)
        return f"{FINISH}-{base_name(base)}"

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        from llmdpd.tasks.instructed.environment import InstructedTask

        return InstructedTask(task, goal_visible=goal_visible, render=render)

    def demonstrator(self, task: str, *, goal_visible: bool) -> Demonstrator:
        from llmdpd.tasks.instructed.scripted import InstructedExpert

        return InstructedExpert(task, goal_visible=goal_visible)

    def named_by(self, name: str) -> str | None:
        return None  # nobody else recorded these

    def description(self, task: str) -> str:
        return instructed_prompt(task)


SUITE = InstructedSuite()
