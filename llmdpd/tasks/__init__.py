"""Environments: Meta-World and MuJoCo locomotion, scripted experts, roll-outs in worker processes.

Importing this package imports neither metaworld nor gymnasium nor torch.
"""

from __future__ import annotations

from llmdpd.tasks.base import TaskSuite
from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN, TASKS, base_name, check_task, is_metaworld
from llmdpd.tasks.seeds import COLLECTION_SEED_END, EVALUATION_SEED_START, SELECTION_SEED_START
from llmdpd.utils.registry import Registry

USER = "file"
"""The name in `SUITES` of the task file in use, where there is one (see `llmdpd.tasks.user`)."""

SUITES: Registry[TaskSuite] = Registry(
    "task suite",
    "llmdpd.suites",
    {"metaworld": "llmdpd.tasks.metaworld.suite:SUITE", "locomotion": "llmdpd.tasks.locomotion:SUITE"},
)
"""Task suites by name, each a `llmdpd.tasks.base.TaskSuite`; packages add theirs as entry points.

Worker processes look suites up themselves; one that was only added by `SUITES.register` is unknown there, but for the
task file in use, which they are sent.
"""

__all__ = [
    "COLLECTION_SEED_END",
    "EVALUATION_SEED_START",
    "ML45_TEST",
    "ML45_TRAIN",
    "SELECTION_SEED_START",
    "SUITES",
    "TASKS",
    "USER",
    "TaskSuite",
    "base_name",
    "check_task",
    "is_metaworld",
]
