"""What a package outside llmdpd adds, found by entry points: a format, a task suite, a language model, a method."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.data import DataFormat, EpisodeRecord, Reading, TrajectoryDataset, join_episodes
from llmdpd.methods.base import Method, OfflineConfig
from llmdpd.methods.batch import PromptedBatch
from llmdpd.nn.actor import ActorNetworkConfig, DeterministicPolicy
from llmdpd.prompts.models import ModelSource, TextModel
from llmdpd.tasks.base import Environment, TaskSpec, TaskSuite
from llmdpd.utils.bounds import NonNegative

Floats = NDArray[np.float32]


class Csv(DataFormat):
    """One episode a file; a row is an observation of two numbers, an action of one and a reward."""

    readable = "a .csv file"

    def reads(self, path: Path) -> bool:
        return path.suffix == ".csv"

    def load(self, path: Path, reading: Reading) -> TrajectoryDataset:
        with path.open() as file:
            rows = np.array([[float(cell) for cell in row] for row in csv.reader(file)])
        last = rows[-1:, :2]
        episode = EpisodeRecord(np.concatenate([rows[:, :2], last]), rows[:, 2:3], rows[:, 3], task="point-left")
        return join_episodes([episode], source=str(path))


class Point:
    """A point in a plane that an action moves along x; the task is done where it is left of -1."""

    def reset(self, seed: int) -> Floats:
        self.place = np.random.default_rng(seed).uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.place.copy()

    def step(self, action: Any) -> tuple[Floats, float, bool, bool]:
        self.place[0] += np.float32(np.clip(action[0], -0.1, 0.1))
        return self.place.copy(), float(-self.place[0]), bool(self.place[0] < -1), False

    def render(self) -> NDArray[np.uint8]:
        return np.zeros((4, 4, 3), np.uint8)


class Points(TaskSuite):
    name = "points"
    tasks = ("point-left",)

    def knows(self, task: str) -> bool:
        return task.lower() in self.tasks

    def canonical(self, task: str) -> str:
        return task.lower()

    def spec(self, task: str) -> TaskSpec:
        return TaskSpec(task, 2, 1, 40, self.name)

    def make(self, task: str, *, goal_visible: bool, render: bool) -> Environment:
        return Point()

    def description(self, task: str) -> str:
        return "Task: move the point.\nObjective: move it to the left."


class Hashed:
    """A text's embedding is its SHA-256."""

    dim = 32

    def embed(self, prompts: Sequence[str]) -> Floats:
        digests = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
        return np.array([list(digest) for digest in digests], np.float32)

    def release(self) -> None:
        pass


class HashModel(TextModel):
    def find(self, memo_folder: Path) -> ModelSource:
        return ModelSource("hashed", "1", Path(__file__).parent)

    def open(self, *settings: Any) -> Hashed:
        return Hashed()


@dataclass(frozen=True)
class MarginConfig(OfflineConfig):
    """Cloning by absolute errors beyond a margin."""

    name = "margin"

    network: ActorNetworkConfig = field(default_factory=ActorNetworkConfig)
    margin: NonNegative = 0.1
    """Error of an action that costs nothing."""


class Margin(Method[DeterministicPolicy, MarginConfig]):
    Config = MarginConfig
    network_class = DeterministicPolicy

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        actions = self.policy(self.condition(batch, self.encode(batch)))
        loss = ((actions - batch.actions).abs() - self.config.margin).clamp_min(0).mean()
        return {"loss/cloning": loss.detach(), "grad/policy": self.step("policy", loss)}


CSV, POINTS, HASHED = Csv(), Points(), HashModel()
