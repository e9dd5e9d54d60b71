"""The configuration of a run: nested frozen dataclasses, each with its bounds beside its fields."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llmdpd.data import is_named
from llmdpd.data.collecting.scripted import parse_noise
from llmdpd.data.config import DataConfig
from llmdpd.data.search import recorded_environment
from llmdpd.data.task_file import given_data, task_file_in_use
from llmdpd.errors import InputError
from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.methods import METHODS
from llmdpd.methods.base import MethodConfig
from llmdpd.methods.llmdpd.method import LLMDPDConfig
from llmdpd.ops import native
from llmdpd.policy.folder import on_hub
from llmdpd.prompts import TEXT_MODELS
from llmdpd.tasks.protocols import TaskConfig
from llmdpd.tasks.specs import canonical_task, check_environments, common_spec, shown_by, suite_of, task_spec
from llmdpd.tasks.user import use_no_file
from llmdpd.training.config import InitConfig, TrainingConfig
from llmdpd.utils.bounds import Seed, WholeNumber, check_config
from llmdpd.utils.device import automatic_device, check_device
from llmdpd.utils.options import NO_OPTION


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: collect, embed prompts, train, evaluate, report."""

    preset: Annotated[str, NO_OPTION] = "metaworld"
    """Name of the preset that this configuration started from."""
    seed: Seed = 0
    """Seed of networks, batches and noise."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:N; auto: a GPU that works, else cpu. A method that learns online trains on the CPU."""
    threads: WholeNumber = 0
    """CPU threads of the C++ kernels, 0 for all cores; results do not depend on it. The rest, in torch, takes one."""
    llm: str = "minilm"
    """Text model: minilm, smollm2-135m, llama-3-8b, olmo-1b, bag-of-words, any hub id, or a local folder."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=LLMDPDConfig)
    init: InitConfig = field(default_factory=InitConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def resolved(self) -> TrainConfig:
        """The configuration with canonical names, and with what depends on this machine made explicit.

        Raises:
            InputError: an unknown task, a task both seen and unseen, no seen task, a device that is absent, a number
                out of range, fields that don't fit together.
        """
        # The order in which the name is looked up: see llmdpd.prompts.models.
        folder = self.llm not in ("", *TEXT_MODELS) and Path(self.llm).expanduser().is_dir()
        tasks = self.tasks
        data = dataclasses.replace(
            self.data,
            path=self.data.path and _place(self.data.path),
            demonstrations=self.data.demonstrations and _place(self.data.demonstrations),
            root=_absolute(self.data.root),
        )
        if tasks.file is None:
            use_no_file()
        else:
            tasks = dataclasses.replace(tasks, file=str(task_file_in_use(tasks.file, given_data(data)).file.path))
        tasks, method = tasks.canonical(_naming(data.path)), self.method.resolved()
        llm = _absolute(self.llm) if folder else self.llm
        device = automatic_device()[0] if self.device == "auto" else self.device
        init = dataclasses.replace(self.init, source=self.init.source and _policy_place(self.init.source))
        changed: dict[str, Any] = {"tasks": tasks, "data": data, "llm": llm, "method": method, "init": init}
        config = dataclasses.replace(self, **changed, device=device).heeding_texts()
        config.check_values()
        return config

    def heeding_texts(self) -> TrainConfig:
        """The configuration with texts kept, and without the tracker, where its tasks share a demonstration, of which
        texts say something else.

        Runs that were begun before `resolved` wrote this down acted so too. Raises `InputError` for an unknown task.
        """
        if all(shown_by(task) == task for task in self.tasks.seen):
            return self
        return dataclasses.replace(
            self, method=dataclasses.replace(self.method, acting=self.method.acting.heeding_texts())
        )

    def check_values(self) -> None:
        """Raise `InputError` for numbers out of range and fields that don't fit together, before anything is read."""
        check_config(self)
        device = check_device(self.device)
        if self.training.cuda_graph == "on" and device.type != "cuda":
            raise InputError(
                "a CUDA graph needs a CUDA device",
                field="training.cuda_graph",
                found=f"on, and the device is {device}",
                expected="auto or off there",
                hint="use --device cuda, or --training.cuda-graph auto",
            )
        there, reason = native.available()
        if device.type == "cpu" and not there:
            raise InputError(
                "training on the CPU needs the C++ module", field="device", found=reason, expected="the module"
            )
        spec = common_spec(self.tasks.all)
        self._check_evaluation()
        self._check_shown()
        if self.init.source is not None and METHODS[self.method.name].online:
            raise InputError(
                "only methods that learn from a data set start from a trained policy",
                field="init.source",
                found=f"{self.init.source}, for {self.method.name}",
                expected="none",
            )
        suite = suite_of(spec.task)
        if not (self.tasks.goal_visible or suite.hides_goal):
            found, expected = f"no, of {suite.name}", "yes: this suite cannot hide the goal"
            raise InputError("the goal cannot be hidden", field="tasks.goal_visible", found=found, expected=expected)
        if suite.collector == "scripted" and self.data.path is None:
            parse_noise(self.data.noise, suite)
        self.method.check_for(spec, self.training.iterations)

    def _check_shown(self) -> None:
        """Raise `InputError` where a task would be learned under demonstrations of one that is not learned itself."""
        if METHODS[self.method.name].online or not self.method.network.context_config().trajectory:
            return
        for task in self.tasks.seen:
            if (shown := shown_by(task)) not in self.tasks.seen:
                raise InputError(
                    "a task is learned under the demonstrations of another one, which is not learned",
                    field="tasks.seen",
                    found=f"{task} without {shown}",
                    expected=f"{shown} beside {task}",
                )

    @property
    def evaluation_mode(self) -> Literal["rollout", "offline", "none"]:
        """What `evaluation.mode` comes to for the run's tasks. Raises InputError for an unknown task."""
        if self.evaluation.mode != "auto":
            return self.evaluation.mode
        return "rollout" if all(task_spec(task).has_environment for task in self.tasks.all) else "offline"

    def _check_evaluation(self) -> None:
        mode, online = self.evaluation_mode, METHODS[self.method.name].online
        for task in self.tasks.all:
            spec = task_spec(task)
            if mode == "rollout":
                spec.check_max_steps(self.evaluation.max_steps)
            if (mode == "rollout" or online) and not spec.has_environment:
                raise InputError(
                    "the task has no environment",
                    field="method" if online else "evaluation.mode",
                    found=f"{self.method.name} for {task}" if online else f"rollout of {task}",
                    expected="a method that learns from data" if online else "offline, or none",
                    hint="name its environment in the task file",
                )
        if mode == "rollout" or online:
            check_environments(self.tasks.all if mode == "rollout" else self.tasks.seen)
        if mode == "offline" and online:
            raise InputError(
                "no episode is held out of what is learned in the environments",
                field="evaluation.mode",
                found=f"offline, of {self.method.name}",
                expected="rollout, or none",
            )


def _naming(data: str | None) -> Callable[[str], str]:
    """How tasks are named: where the user leaves the environment's version open, by what their data name."""
    environment = "" if data is None else recorded_environment(data)
    return (lambda task: suite_of(task).in_environment_of(task, environment)) if environment else canonical_task


def _place(data: str) -> str:
    """Data by a scheme, such as minari:ID, as they are named; a path made absolute."""
    return data if is_named(data) else _absolute(data)


def _policy_place(source: str) -> str:
    """A policy of the hub as it is named; a path made absolute."""
    return source if on_hub(source) else _absolute(source)


def _absolute(place: str) -> str:
    """A folder or file made absolute, so that a run can be resumed from any directory."""
    return os.path.abspath(os.path.expanduser(place))
