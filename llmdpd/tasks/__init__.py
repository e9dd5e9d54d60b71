"""Tasks: suites of them, found by name; their environments, demonstrators and texts; roll-outs in worker processes.

Importing this package imports no simulator and no torch. A suite's own folder is known by `SUITES` alone.
"""

from __future__ import annotations

from llmdpd.tasks.base import TaskSuite
from llmdpd.tasks.names import base_name
from llmdpd.tasks.seeds import COLLECTION_SEED_END, EVALUATION_SEED_START, SELECTION_SEED_START
from llmdpd.utils.registry import Registry

USER = "file"
"""The name in `SUITES` of the task file in use, where there is one (see `llmdpd.tasks.user`)."""

SUITES: Registry[TaskSuite] = Registry(
    "task suite",
    "llmdpd.suites",
    {
        "metaworld": "llmdpd.tasks.metaworld.suite:SUITE",
        "locomotion": "llmdpd.tasks.locomotion:SUITE",
        "ogbench": "llmdpd.tasks.ogbench.suite:SUITE",
        "instructed": "llmdpd.tasks.instructed.suite:SUITE",
    },
)
"""Task suites by name, each a `llmdpd.tasks.base.TaskSuite`; packages add theirs as entry points.

Worker processes look suites up themselves; one that was only added by `SUITES.register` is unknown there, but for the
task file in use, which they are sent.
"""

__all__ = [
    "COLLECTION_SEED_END",
    "EVALUATION_SEED_START",
    "SELECTION_SEED_START",
    "SUITES",
    "USER",
    "TaskSuite",
    "base_name",
]
