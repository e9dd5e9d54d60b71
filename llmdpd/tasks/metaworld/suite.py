"""Meta-World as a task suite."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmdpd.tasks.base import Environment, FloatArray, Reading, Split, TaskSpec, TaskSuite
from llmdpd.tasks.metaworld.behaviours import BEHAVIOURS
from llmdpd.tasks.metaworld.layout import ACTION_DIM, GOAL, LAYOUT, STATE_DIM
from llmdpd.tasks.metaworld.names import ML45_TEST, ML45_TRAIN, TASKS, check_task, is_metaworld
from llmdpd.tasks.names import up_to_version

if TYPE_CHECKING:
    from llmdpd.tasks.demonstrators import Demonstrator

MAX_STEPS = 500

PAPER = (
    ("sweep-into-v3", "coffee-push-v3", "disassemble-v3"),
    ("box-close-v3", "hand-insert-v3", "bin-picking-v3"),
)
DESIGN_TASKS = ("assembly-v3", "basketball-v3", "push-back-v3", "lever-pull-v3", "faucet-open-v3")
"""The five of ML45's training tasks that designs are chosen on."""
JAT_RETURNS: Mapping[str, tuple[float, float]] = {
    "bin-picking-v3": (1.89, 425.6),
    "box-close-v3": (76.4, 512.5),
    "door-lock-v3": (112.3, 811.5),
    "door-unlock-v3": (94.2, 802.9),
    "hand-insert-v3": (2.75, 740.5),
}
"""Returns of a random and of an expert policy by which JAT and REGENT (arXiv 2402.09844, 2412.04759) normalise those of
ML45's test tasks. They are of the second version's rewards, which the third has taken over, and of `JAT_STEPS`."""
JAT_STEPS = 100
_FOLDS, _FOLD_SEED = 10, 20261128


def _folds() -> dict[str, Split]:
    """`fold-0` to `fold-9`: each of the 50 tasks is held out in one of them, five in each."""
    names = sorted(TASKS)
    random.Random(_FOLD_SEED).shuffle(names)
    size = len(names) // _FOLDS
    held_out = (tuple(names[fold * size : (fold + 1) * size]) for fold in range(_FOLDS))
    return {f"fold-{k}": (tuple(t for t in TASKS if t not in out), out) for k, out in enumerate(held_out)}


class MetaWorldSuite(TaskSuite):
    """The 50 tasks of Meta-World, with one layout of observations and actions."""

    name = "Meta-World"
    tasks = TASKS
    behaviours = BEHAVIOURS
    hides_goal = True
    collector = "scripted"
    steps_per_second = 40  # a step is 12.5 ms: half of real time, since a success may take no second
    groups: Mapping[str, tuple[str, ...]] = {"all": TASKS, "ml45-train": ML45_TRAIN}
    # `design` is ml45 without its test tasks: for choosing a design.
    protocols: Mapping[str, Split] = {
        "paper": PAPER,
        "ml45": (ML45_TRAIN, ML45_TEST),
        "design": (tuple(task for task in ML45_TRAIN if task not in DESIGN_TASKS), DESIGN_TASKS),
        **_folds(),
    }

    def knows(self, task: str) -> bool:
        return is_metaworld(task)

    def canonical(self, task: str) -> str:
        return check_task(task)

    def spec(self, task: str) -> TaskSpec:
        return TaskSpec.within_one(task, STATE_DIM, ACTION_DIM, MAX_STEPS, self.name, LAYOUT)

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        from llmdpd.tasks.metaworld.environment import MetaWorldTask

        return MetaWorldTask(task, goal_visible=goal_visible, render=render)

    def demonstrator(self, task: str, *, goal_visible: bool) -> Demonstrator:
        from llmdpd.tasks.metaworld.scripted import ScriptedExpert

        return ScriptedExpert(task, goal_visible=goal_visible)

    def description(self, task: str) -> str:
        from llmdpd.tasks.metaworld.prompts import metaworld_prompt

        return metaworld_prompt(task).render()

    def reading(self, task: str) -> Reading:
        return Reading(terminates=False)

    def named_by(self, name: str) -> str | None:
        # MTDiff's replay folders are TASK/RUN/dataset/0.npz. Without its version, "push" may be anybody's folder.
        versioned = up_to_version(name)
        return versioned if versioned is not None and self.knows(versioned) else None

    def normalised_score(self, task: str, mean_return: float, max_steps: int) -> float | None:
        if max_steps != JAT_STEPS or task not in JAT_RETURNS:
            return None
        low, high = JAT_RETURNS[task]
        return 100.0 * (mean_return - low) / (high - low)

    def goal_visible(self, observations: FloatArray) -> bool | None:
        # Where it is hidden, as in ML1 … ML45, zeros are in its place; no goal lies there.
        return bool(observations[:, GOAL].any()) if observations.shape[1] == STATE_DIM else None


SUITE = MetaWorldSuite()
