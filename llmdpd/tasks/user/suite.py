"""The tasks of a user's file as a task suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from llmdpd.errors import InputError, located
from llmdpd.tasks.base import Environment, Reading, TaskSpec, TaskSuite
from llmdpd.tasks.user.file import TaskFile, UserTask

if TYPE_CHECKING:
    from llmdpd.tasks.user.environment import UserEnvironment


@dataclass(frozen=True)
class Recorded:
    """What a task's recorded data say of it: S and A, the steps of its longest episode, and its text, "" for none."""

    state_dim: int
    action_dim: int
    longest: int
    text: str


class Given(NamedTuple):
    """Data sets that a command was given, of the file's tasks: to learn from, and of demonstrations."""

    data: str | None = None
    demonstrations: str | None = None


NOTHING = Given()

Read = Callable[["UserSuite", str], Recorded]
"""(suite, task) → what the task's recorded data say of it; readers of data are of an upper layer."""


class UserSuite(TaskSuite):
    """The tasks of one file.

    Args:
        file: the task file.
        read: for tasks without environment or text; a worker process, which needs neither, has none.
        given: stand in for the data that the file names, or does not.
    """

    def __init__(self, file: TaskFile, read: Read | None = None, given: Given = NOTHING) -> None:
        self.given = given
        self.file, self.name, self.tasks = file, file.name, tuple(file.tasks)
        self.protocols = {file.name: (file.split("seen"), file.split("unseen"))}
        self._read = read
        self._recorded: dict[str, Recorded] = {}
        self._specs: dict[str, TaskSpec] = {}
        self._rendered: dict[str, bool] = {}
        self._tried: set[str] = set()

    def knows(self, task: str) -> bool:
        return task in self.file.tasks

    def spec(self, task: str) -> TaskSpec:
        """See `TaskSuite.spec`; the environment is made once for it, or without one the data are read."""
        if task not in self._specs:
            with located(self.file.path):
                own = self.file.tasks[task]
                self._specs[task] = self._without_environment(own) if own.env is None else self._with_environment(own)
        return self._specs[task]

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        own = self.file.tasks[task]
        with located(self.file.path):
            if own.env is None:
                expected, hint = "env = …", "a task without environment cannot be rolled out"
                raise InputError("the task has no environment", field=f"tasks.{task}", expected=expected, hint=hint)
            return self._made(own, render)

    def try_out(self, task: str) -> None:
        """See `TaskSuite.try_out`; once for each task, a step, or an episode where success shows only at its end."""
        if task in self._tried:
            return
        with located(self.file.path):
            env = self._made(self.file.tasks[task])
            env.try_out()
            env.close()
        self._tried.add(task)

    def renders(self, task: str) -> bool:
        self.spec(task)
        return self._rendered.get(task, False)

    def data(self, task: str) -> tuple[str, ...]:
        return self.file.tasks[task].data

    def reading(self, task: str) -> Reading:
        own = self.file.tasks[task]
        success = own.success
        return Reading(
            own.observation,
            success.key,
            own.action,
            success_return=success.episode_return,
            task=own.data_task,
            part=own.data_part,
            terminates=own.terminates,
            by_name=False,
        )

    def description(self, task: str) -> str:
        """The task's text: from the file, else from its data, else from Gymnasium's documentation.

        Raises:
            InputError: there is none of them.
        """
        return self.text(task)[0]

    def text_source(self, task: str) -> str:
        where = {"file": str(self.file.path), "data": "the task's data", "documentation": "Gymnasium's documentation"}
        return where[self.text(task)[1]]

    def text(self, task: str) -> tuple[str, str]:
        """The task's text and where it is from: "file", "data" or "documentation". Errors: see `description`."""
        own = self.file.tasks[task]
        if own.text is not None:
            return own.text, "file"
        if (own.data or any(self.given)) and (text := self.recorded(task).text):
            return text, "data"
        if own.env is not None and not own.factory and (text := _documentation(own.env)):
            return text, "documentation"
        raise InputError(
            "the task has no text prompt",
            path=self.file.path,
            field=f"tasks.{task}.text",
            found="none in the file, in the data, or in an environment's documentation",
            expected='text = "…", or text_file = "…"',
        )

    def recorded(self, task: str) -> Recorded:
        """What the task's data, or those given for them, say of it; they are read once."""
        if task not in self._recorded:
            assert self._read is not None, "workers ask for no data"
            self._recorded[task] = self._read(self, task)
        return self._recorded[task]

    def _made(self, own: UserTask, render: bool = False) -> UserEnvironment:
        from llmdpd.tasks.user.environment import UserEnvironment

        return UserEnvironment(own, self.file.folder, render=render)

    def _with_environment(self, own: UserTask) -> TaskSpec:
        made = self._made(own)
        self._rendered[own.name] = made.renders
        made.close()
        low, high = made.action_bounds or (None, None)
        spec = partial(TaskSpec, own.name, made.state_dim, made.action_dim, made.max_steps)
        spec = partial(spec, observation=made.read, observation_widths=tuple(made.parts.values()))
        return self._checked(spec(self.name, bool(own.success), self.file.layout, low, high))

    def _without_environment(self, own: UserTask) -> TaskSpec:
        if not (own.data or any(self.given)):
            raise InputError(
                "a task with neither environment nor data",
                field=f"tasks.{own.name}",
                found="neither env nor data",
                expected="an environment (env), recorded data (data), or both",
                hint="data can also be given to a command, by --data",
            )
        found = self.recorded(own.name)
        spec = partial(TaskSpec, own.name, found.state_dim, found.action_dim, own.max_steps or found.longest)
        return self._checked(
            spec(
                self.name,
                bool(own.success),
                self.file.layout,
                has_environment=False,
                limited=own.max_steps is not None,
                observation=own.observation,
            )
        )

    def _checked(self, spec: TaskSpec) -> TaskSpec:
        if spec.layout is not None:
            with located(field="suite.layout"):
                spec.layout.check(spec.state_dim, spec.action_dim)
        return spec


def _documentation(env_id: str) -> str:
    """The text prompt made of an environment's documentation, "" where it has none."""
    from llmdpd.tasks.texts.gymnasium_docs import environment_prompt

    prompt = environment_prompt(env_id)
    # Of an environment without documentation it says its spaces alone, which tells no task from another.
    return prompt.render() if prompt.objective or prompt.objects else ""
