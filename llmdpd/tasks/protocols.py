"""Protocols: which tasks are trained on, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass

from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks are learned and which are only evaluated."""

    protocol: str = "paper"
    """Name of this split in results; a name of `PROTOCOLS` becomes `custom` there where the tasks are not its own."""
    seen: tuple[str, ...] = ("sweep-into-v3", "coffee-push-v3", "disassemble-v3")
    """Tasks that are trained on: Meta-World's, or hopper, halfcheetah, walker2d."""
    unseen: tuple[str, ...] = ("box-close-v3", "hand-insert-v3", "bin-picking-v3")
    """Tasks that are evaluated zero-shot: a text and one demonstration, no training."""
    goal_visible: bool = True
    """Whether observations show the goal (obs[36:39]), in data and evaluation."""


DESIGN_TASKS = ("assembly-v3", "basketball-v3", "push-back-v3", "lever-pull-v3", "faucet-open-v3")
"""The five of ML45's training tasks that designs are chosen on."""

PROTOCOLS: dict[str, TaskConfig] = {
    "paper": TaskConfig(),
    "ml45": TaskConfig("ml45", ML45_TRAIN, ML45_TEST),
    "design": TaskConfig("design", tuple(task for task in ML45_TRAIN if task not in DESIGN_TASKS), DESIGN_TASKS),
}
"""What is trained on and what is held out, by name. `design` is ml45 without its test tasks: for choosing a design."""
