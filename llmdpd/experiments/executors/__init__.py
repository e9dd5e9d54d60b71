"""Where an experiment's steps run: processes of this machine, a Ray cluster, or Slurm."""

from __future__ import annotations

from llmdpd.errors import InputError, nearest_names
from llmdpd.experiments.executors.base import LOST, Executor, Resources, Running
from llmdpd.experiments.executors.local import LocalExecutor
from llmdpd.experiments.executors.ray import RayExecutor
from llmdpd.experiments.executors.slurm import SlurmExecutor

EXECUTORS: dict[str, type[Executor]] = {each.name: each for each in (LocalExecutor, RayExecutor, SlurmExecutor)}
"""The executors by name; an engine's package is imported when its executor is made."""

__all__ = ["EXECUTORS", "LOST", "Executor", "LocalExecutor", "Resources", "Running", "make_executor"]


def make_executor(name: str, resources: Resources) -> Executor:
    """The executor of a name, ready to start steps.

    Raises:
        InputError: an unknown name, an impossible number, a GPU that is not there, a package that is not installed, or
            options that the executor does not have.
    """
    if name not in EXECUTORS:
        hint = f"nearest names: {nearest_names(name, EXECUTORS)}"
        expected = ", ".join(EXECUTORS)
        raise InputError("no such executor", field="--executor", found=name, expected=expected, hint=hint)
    resources.check(name)
    return EXECUTORS[name](resources)
