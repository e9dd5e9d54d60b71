"""What a run needs to know of a task before any environment steps: its name, widths, time limit, how it is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from llmdpd.errors import InputError
from llmdpd.tasks.locomotion import is_locomotion, locomotion_id, make_locomotion
from llmdpd.tasks.metaworld.names import check_task

METAWORLD_WIDTHS = (39, 4)
METAWORLD_STEPS = 500


@dataclass(frozen=True)
class TaskSpec:
    """A task: its canonical name, S, A, the environment's own limit of steps, success or return as what counts.

    `family` is "Meta-World" or "locomotion": the tasks of one run are of one family.
    """

    task: str
    state_dim: int
    action_dim: int
    max_steps: int
    family: str

    @property
    def has_success(self) -> bool:
        """Whether episodes succeed or fail; else their return counts."""
        return self.family == "Meta-World"

    def check_max_steps(self, max_steps: int, field: str = "evaluation.max_steps") -> None:
        """Raise `InputError` where episodes are to be longer than the environment lets them be."""
        if max_steps > self.max_steps:
            raise InputError(
                "the number is out of range",
                field=field,
                found=max_steps,
                expected=f"1 to {self.max_steps}, where {self.task} ends its episodes",
            )


def canonical_task(name: str) -> str:
    """ "sweep-into" → "sweep-into-v3"; "hopper", "hopper-medium-replay-v2" → "Hopper-v4", Gymnasium's id.

    Raises:
        InputError: no Meta-World task and no locomotion environment.
    """
    return locomotion_id(name) if is_locomotion(name) else check_task(name)


@lru_cache(maxsize=128)
def task_spec(task: str) -> TaskSpec:
    """The spec of a task in any spelling. A locomotion environment is made for it, and closed again.

    Raises:
        InputError: as `canonical_task`.
    """
    name = canonical_task(task)
    if not is_locomotion(name):
        return TaskSpec(name, *METAWORLD_WIDTHS, METAWORLD_STEPS, "Meta-World")
    environment = make_locomotion(name)
    try:
        return TaskSpec(name, environment.state_dim, environment.action_dim, environment.max_steps, "locomotion")
    finally:
        environment.close()


def common_spec(tasks: Sequence[str]) -> TaskSpec:
    """The spec of the first task, which the others must be like.

    Raises:
        InputError: tasks of different families or widths: one network cannot serve them.
    """
    specs = [task_spec(task) for task in tasks]
    first = specs[0]
    for spec in specs[1:]:
        if (spec.family, spec.state_dim, spec.action_dim) != (first.family, first.state_dim, first.action_dim):
            raise InputError(
                "tasks that one policy cannot serve",
                field="tasks",
                found=f"{first.task} ({first.state_dim} state and {first.action_dim} action numbers) and "
                f"{spec.task} ({spec.state_dim} and {spec.action_dim})",
                expected="tasks with the same observations and actions",
            )
    return first
