"""What a task file decides of a run's configuration: its tasks, and which preset is for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmdpd.config.presets import find_preset
from llmdpd.config.schema import TrainConfig
from llmdpd.tasks.protocols import TaskConfig
from llmdpd.tasks.user.suite import UserSuite
from llmdpd.utils.progress import error_console

TASK_PRESETS = ("tasks", "tasks-plain")
"""Presets for a user's own tasks: with a layout, and without one."""

_NO_LAYOUT = (
    "{file} has no [suite.layout]: observations are plain numbers. A layout would help with tasks that are not trained "
    "on: in our own measurement, on a tabletop family with 6 seen tasks, which were learned without one as well, the "
    "2 unseen ones succeeded by one demonstration in 0 % and 1 % of the episodes without a layout, and in 95 % and "
    "88 % with one"
)
_NO_TURNING = (
    "{file}: the layout does not say what is up, or how actions move the body; scenes are not rotated and mirrored in "
    "training, which helps with unseen tasks (layout.up, layout.action.move)"
)


def task_preset(suite: UserSuite, name: str | None) -> TrainConfig:
    """The preset of this name for a file's tasks; `tasks` and none become what the file's layout, or none, allows."""
    if name in (None, "tasks") and suite.file.layout is None:
        error_console.print(_NO_LAYOUT.format(file=suite.file.path.name), markup=False, soft_wrap=True)
        return find_preset("tasks-plain")
    return find_preset(name or "tasks")


def tasks_of_file(suite: UserSuite) -> TaskConfig:
    """The file's tasks, seen and unseen as it says."""
    file = suite.file
    return TaskConfig(file.name, file.split("seen"), file.split("unseen"), file=str(file.path))


def without_turning(config: TrainConfig, suite: UserSuite) -> TrainConfig:
    """The configuration without rotated and mirrored scenes where the file's layout does not say how to turn them."""
    method: Any = config.method
    augmentation, layout = getattr(method, "augmentation", None), suite.file.layout
    if augmentation is None or layout is None or layout.rotatable or not (augmentation.rotate or augmentation.mirror):
        return config
    error_console.print(_NO_TURNING.format(file=suite.file.path.name), markup=False, soft_wrap=True)
    return replace(config, method=replace(method, augmentation=replace(augmentation, rotate=0.0, mirror=0.0)))
