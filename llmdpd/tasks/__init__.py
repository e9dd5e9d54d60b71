"""Environments: Meta-World and MuJoCo locomotion, scripted experts, roll-outs in worker processes.

Importing this package imports neither metaworld nor gymnasium nor torch.

Three disjoint ranges of seeds keep an episode that was learned from, or that served as a trajectory prompt, from ever
being an evaluated one.
"""

from __future__ import annotations

from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN, TASKS, base_name, check_task, is_metaworld

COLLECTION_SEED_END = 1_000_000_000
"""Seeds of collected episodes (and so of trajectory prompts) lie in [0, COLLECTION_SEED_END)."""
EVALUATION_SEED_START = 1_000_000_000
"""Seeds of evaluation episodes start here."""
SELECTION_SEED_START = 1_500_000_000
"""Seeds of the episodes that choose the best checkpoint start here, apart from those that report it."""

__all__ = [
    "COLLECTION_SEED_END",
    "EVALUATION_SEED_START",
    "ML45_TEST",
    "ML45_TRAIN",
    "SELECTION_SEED_START",
    "TASKS",
    "base_name",
    "check_task",
    "is_metaworld",
]
