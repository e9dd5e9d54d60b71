"""What a task suite provides: the tasks' names, sizes and environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from llmdpd.errors import InputError
from llmdpd.tasks.layout import Layout

if TYPE_CHECKING:
    from llmdpd.tasks.demonstrators import Demonstrator

FloatArray = npt.NDArray[np.float32]
Frame = npt.NDArray[np.uint8]
Split = tuple[tuple[str, ...], tuple[str, ...]]
"""Tasks to train on, and tasks that are held out."""


@dataclass(frozen=True)
class TaskSpec:
    """What a run needs to know of a task before any environment steps.

    Args:
        task: canonical name.
        state_dim: S, numbers of an observation.
        action_dim: A, numbers of an action.
        max_steps: the environment's own limit of steps.
        family: name of the suite; the tasks of one run are of one family.
        has_success: whether episodes succeed or fail; otherwise their return counts.
        layout: what the numbers are, where it is known.
        action_low, action_high: the environment's bounds of an action [A], ±inf where a number has none; None where
            they are not known.
        has_environment: whether the suite can make the task's environment; otherwise it is evaluated offline.
        limited: whether `max_steps` is a limit, and not merely the longest of the recorded episodes.
        observation: the keys of Dict observations, in the order in which their numbers are read; none of others.
        observation_widths: how many numbers each of these keys has, where an environment tells it; else none.
    """

    task: str
    state_dim: int
    action_dim: int
    max_steps: int
    family: str
    has_success: bool = True
    layout: Layout | None = None
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    has_environment: bool = True
    limited: bool = True
    observation: tuple[str, ...] = ()
    observation_widths: tuple[int, ...] = ()

    @classmethod
    def within_one(
        cls, task: str, state_dim: int, action_dim: int, max_steps: int, family: str, layout: Layout
    ) -> TaskSpec:
        """The spec of a task all of whose actions' numbers are within ±1."""
        low, high = (-1.0,) * action_dim, (1.0,) * action_dim
        return cls(task, state_dim, action_dim, max_steps, family, layout=layout, action_low=low, action_high=high)

    def steps(self, max_steps: int | None) -> int:
        """Steps of an episode at most: as many as are requested, or where none are, the environment's own limit."""
        return self.max_steps if max_steps is None else max_steps

    def check_max_steps(self, max_steps: int | None, field: str = "evaluation.max_steps") -> None:
        """Raise `InputError` where episodes are to be longer than the environment lets them be."""
        if max_steps is not None and max_steps > self.max_steps:
            expected = f"1 to {self.max_steps}, where {self.task} ends its episodes"
            raise InputError("the number is out of range", field=field, found=max_steps, expected=expected)


@dataclass(frozen=True)
class Reading:
    """What a reader of recorded data is told of them.

    observation: keys of Dict observations, in this order; none: all, in the order in which Gymnasium flattens them.
    success: key of the infos that says whether a step succeeds; None: those that are customary.
    action: key of the actions, where a format may hold several; None: the customary one.
    success_return: an episode succeeds at the step where the sum of its rewards reaches this; None: no such rule.
    task: which of the data's tasks it is, where they hold several; None: the one of the task's own name.
    part: which part of a data set, where its format has named ones (robomimic's filter keys, LeRobot's splits); None:
        the whole.
    terminates: whether episodes can end by themselves. Where they can't, every flag at an episode's end is a time
        limit's; None: not known.
    by_name: whether the name that the data have says of which suite's task they are, where their widths are its own;
        not of data that a user's file gives to a task.
    """

    observation: tuple[str, ...] = ()
    success: str | None = None
    action: str | None = None
    success_return: float | None = None
    task: str | None = None
    part: str | None = None
    terminates: bool | None = None
    by_name: bool = True


DEFAULT_READING = Reading()
"""What readers are told where nobody knows more than they."""


class Environment(Protocol):
    """One task's environment, as roll-outs and collecting use it."""

    def reset(self, seed: int) -> FloatArray:
        """Start the episode of `seed` and return its first observation f32 [S]."""

    def step(self, action: npt.ArrayLike) -> tuple[FloatArray, float, bool, bool]:
        """Execute one action [A]; returns (observation f32 [S], reward, success, over)."""

    def render(self) -> Frame:
        """The present state as a picture, uint8 [H, W, 3]."""


class TaskSuite:
    """A family of tasks: a value of `llmdpd.tasks.SUITES`.

    A suite is looked up in the process of the run and again in each worker process, so its module should import its
    simulator only in `spec` and `make`.

    Attributes:
        name: the suite's name, as in messages.
        tasks: names that are offered where a task is unknown.
        groups: names that stand for several tasks where data is collected.
        protocols: its splits into seen and unseen tasks, by name; see `llmdpd.tasks.protocols.PROTOCOLS`.
        behaviours: descriptions of its demonstrators' behaviour policies, by name.
        hides_goal: whether it can hide the goal from observations; otherwise `goal_visible` has no meaning.
        collector: what collects training data where a run names none: "scripted" experts, "sac"; None: a run has to.
        steps_per_second: how many of its steps a second of video shows.
    """

    name: str
    tasks: Sequence[str] = ()
    groups: Mapping[str, tuple[str, ...]] = {}
    protocols: Mapping[str, Split] = {}
    behaviours: Mapping[str, str] = {}
    hides_goal: bool = False
    collector: Literal["scripted", "sac"] | None = None
    steps_per_second: float = 40

    def knows(self, task: str) -> bool:
        """Whether `task` is one of the suite's tasks, in any spelling."""
        raise NotImplementedError

    def canonical(self, task: str) -> str:
        """The one name of a task that the suite knows."""
        return task

    def spec(self, task: str) -> TaskSpec:
        """The spec of a task given by its canonical name."""
        raise NotImplementedError

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        """The task's environment.

        Args:
            task: the task, in any spelling that the suite knows.
            goal_visible: whether observations hold the goal, where the suite can hide it.
            render: whether `render()` will be called.
        """
        raise NotImplementedError

    def try_out(self, task: str) -> None:
        """Raise `InputError` where the first steps in the task's environment fail; by default none are taken.

        Asked before a training whose evaluation needs the environment.
        """

    def demonstrator(self, task: str, *, goal_visible: bool) -> Demonstrator:
        """What collects episodes of a task, given by its canonical name, where `collector` is "scripted"."""
        raise NotImplementedError

    def shown_by(self, task: str) -> str:
        """The task, by its canonical name, whose demonstrations show `task`, given by its own: by default itself.

        Where it is another one, the two are told apart by their texts alone. That one is shown by itself.
        """
        return task

    def renders(self, task: str) -> bool:
        """Whether the task's environment can render pictures, where there is one."""
        return True

    def data(self, task: str) -> tuple[str, ...]:
        """The task's recorded data sets, each as `load_dataset` takes it; none where the suite does not know of any."""
        return ()

    def reading(self, task: str) -> Reading:
        """What readers of the task's data are told that they cannot know themselves."""
        return Reading()

    def recorded_name(self, name: str) -> str:
        """The task of recorded data under `name`, which the suite knows: in one spelling, by default the canonical."""
        return self.canonical(name)

    def named_by(self, name: str) -> str | None:
        """What the name of a folder or file (without its suffix) calls the task whose data lie in it, if anything.

        By default nothing: data without a name of their own are called what their file is.
        """
        return None

    def data_key(self, name: str) -> str:
        """The same for all names, of tasks and of their recorded data, that mean one task; by default the canonical."""
        return self.canonical(name)

    def in_environment_of(self, task: str, environment: str) -> str:
        """The canonical name of `task`, whose data were recorded in `environment` where `task` leaves its version open.

        `environment` is what the data name, in any spelling or of any suite. By default the data decide nothing.
        """
        return self.canonical(task)

    def goal_visible(self, observations: FloatArray) -> bool | None:
        """Whether the observations f32 [T, S] of one episode show the goal; None where the suite can't tell."""
        return None

    def normalised_score(self, task: str, mean_return: float, max_steps: int) -> float | None:
        """The score of a mean return of episodes of `max_steps` at most, 0 … 100 from random to expert.

        None where the suite has none.
        """
        return None

    def description(self, task: str) -> str:
        """The text prompt of a task if the user gives none; by default its name."""
        return f"{self.name} {task}."

    def text_source(self, task: str) -> str:
        """Where `description` has the task's text from, in words."""
        return "built in"
