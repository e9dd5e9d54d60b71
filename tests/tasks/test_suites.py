"""What a run asks a task suite, of a suite that has neither successes nor a collector."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from llmdpd.config.presets import PRESETS
from llmdpd.data.augmentation import AugmentationConfig
from llmdpd.data.config import DataConfig
from llmdpd.errors import InputError
from llmdpd.evaluation.scoring import selection_score
from llmdpd.runs.data import demonstrations, training_data
from llmdpd.tasks import SUITES
from llmdpd.tasks.base import TaskSpec, TaskSuite
from llmdpd.tasks.protocols import TaskConfig
from llmdpd.tasks.simulation.rollout import EpisodeRequest, EpisodeResult
from llmdpd.tasks.specs import suite_of, task_spec

TASKS = TaskConfig(protocol="mine", seen=("mine/one",), unseen=())


class Suite(TaskSuite):
    name = "mine"

    def knows(self, task: str) -> bool:
        return task.startswith("mine/")

    def spec(self, task: str) -> TaskSpec:
        return TaskSpec(task, 2, 1, 10, self.name, has_success=False)


@pytest.fixture(autouse=True)
def suite() -> Iterator[None]:
    SUITES.register("mine", Suite())
    yield
    SUITES.remove("mine")


@pytest.mark.parametrize(
    ("task", "environment", "evaluated"),
    [
        ("walker2d", "Walker2d-v5", "Walker2d-v5"),
        ("walker2d-medium-v2", "mujoco/walker2d-v5", "Walker2d-v5"),
        ("walker2d", "Hopper-v5", "Walker2d-v4"),
        ("Walker2d-v4", "Walker2d-v5", "Walker2d-v4"),
        ("walker2d", "walker2d-medium-v2", "Walker2d-v4"),
        ("walker2d", "", "Walker2d-v4"),
        ("reach-v3", "Meta-World/MT1", "reach-v3"),
        ("mine/one", "other", "mine/one"),
    ],
)
def test_the_datas_environment_decides_a_version_that_is_left_open(task: str, environment: str, evaluated: str) -> None:
    assert suite_of(task).in_environment_of(task, environment) == evaluated


def test_a_suite_says_how_its_data_are_read() -> None:
    assert suite_of("reach-v3").reading("reach-v3").terminates is False
    assert suite_of("hopper").reading("hopper").terminates is True
    scene = suite_of("scene_drawer_open")
    assert scene.reading("scene-drawer-open").terminates is False
    assert scene.recorded_name("Scene_Drawer-open") == "scene-drawer-open"
    assert suite_of("mine/one").reading("mine/one").terminates is None
    names = {"hopper-medium-v2", "mujoco/hopper/expert-v0", "D4RL/hopper/medium-v2", "Hopper-v5"}
    assert {suite_of(name).data_key(name) for name in names} == {"hopper"}
    assert {suite_of(name).recorded_name(name) for name in names} == names
    assert suite_of("push_v2").recorded_name("push_v2") == suite_of("push").data_key("push") == "push-v3"
    observations = np.ones((3, 39), np.float32)
    assert suite_of("push").goal_visible(observations) is True
    observations[:, 36:] = 0
    assert suite_of("push").goal_visible(observations) is False
    assert suite_of("push").goal_visible(observations[:, :20]) is None
    assert suite_of("mine/one").goal_visible(observations) is None


def test_a_run_has_to_name_data_that_nothing_collects() -> None:
    for field, read in (
        ("data.path", lambda: training_data(DataConfig(), TASKS)),
        ("data.demonstrations", lambda: demonstrations(DataConfig(), TASKS)),
    ):
        with pytest.raises(InputError, match="collects data of mine") as error:
            read()
        assert error.value.field == field


def test_a_return_without_a_score_is_what_counts() -> None:
    episodes = [
        EpisodeResult(EpisodeRequest("mine/one", 0, 10), False, value, 3, np.zeros(2, np.float32))
        for value in (4.0, 6.0)
    ]
    values, score = selection_score({"mine/one": episodes})
    assert score == 5.0
    assert values == {"eval/seen_score": 5.0, "eval/mine/one_score": 5.0}


def test_a_geometry_that_observations_do_not_have_is_not_augmented() -> None:
    method = PRESETS["metaworld"].method
    assert getattr(method, "augmentation", AugmentationConfig()).active
    with pytest.raises(InputError, match="layout"):
        method.check_run(task_spec("mine/one"), 100)
    method.check_run(task_spec("reach-v3"), 100)
