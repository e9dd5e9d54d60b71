"""A task file in use: its tasks are known by their names here and in workers, until another file replaces them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.data.task_file import use_task_file
from llmdpd.errors import InputError
from llmdpd.prompts import task_prompt
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest
from llmdpd.tasks.specs import canonical_task, suite_of, task_spec

Family = Callable[..., Path]


def test_a_spec_of_a_task_with_an_environment(family: Family) -> None:
    use_task_file(family(("reach",), extra={"reach": "max_steps = 40"}))
    spec = task_spec("reach")
    assert (spec.state_dim, spec.action_dim, spec.max_steps, spec.family) == (13, 4, 40, "tasks")
    assert (spec.has_success, spec.has_environment) == (True, True)
    assert (spec.action_low, spec.action_high) == ((-1.0,) * 4, (1.0,) * 4)
    assert spec.layout is not None
    assert [point.name for point in spec.layout.points] == ["hand", "object", "box", "goal"]
    assert suite_of("reach").renders("reach")


def test_a_spec_of_a_task_without_is_its_datas(family: Family) -> None:
    suite = use_task_file(family(("reach",), env=False, suite=""))
    spec = task_spec("reach")
    assert (spec.state_dim, spec.action_dim, spec.action_low) == (13, 4, None)
    assert (spec.has_success, spec.has_environment) == (False, False)
    assert spec.max_steps == suite.recorded("reach").longest > 3
    with pytest.raises(InputError, match="no environment"):
        suite.make("reach", goal_visible=True, render=False)


def test_a_layout_beyond_the_observations_is_refused(family: Family) -> None:
    path = family(("reach",))
    path.write_text(path.read_text().replace("goal = [10, 11, 12]", "goal = [10, 11, 13]"))
    use_task_file(path)
    with pytest.raises(InputError, match="index 13") as error:
        task_spec("reach")
    assert (error.value.path, error.value.field) == (str(path), "suite.layout.observations")


def test_its_names_are_taken_as_they_stand_and_come_before_other_suites(family: Family) -> None:
    path = family(("reach",))
    path.write_text(path.read_text().replace("[tasks.reach]", "[tasks.push]"))
    meta_world = suite_of("push")
    suite = use_task_file(path)
    assert suite_of("push") is suite
    assert canonical_task("push") == "push"
    assert suite_of("push-v3") is meta_world
    assert task_prompt("push").task == "Move the hand to the goal."


def test_worker_processes_know_them(family: Family, fresh_seed: int) -> None:
    suite = use_task_file(family(("reach",)))
    env = suite.make("reach", goal_visible=True, render=False)
    start = env.reset(fresh_seed)
    states = []

    def act(observations: np.ndarray, *_: object) -> np.ndarray:
        states.append(observations[0].copy())
        return np.full((len(observations), 4), 0.5, np.float32)

    with EnvPool(1) as pool:
        (result,) = pool.run([EpisodeRequest("reach", fresh_seed, 9, stop_on_success=False)], act)
    np.testing.assert_array_equal(states[0], start)
    for state in [*states[1:], result.final_observation]:
        np.testing.assert_array_equal(env.step([0.5] * 4)[0], state)


def test_the_same_file_stays_and_a_changed_one_replaces_it(family: Family) -> None:
    path = family(("reach", "visit"), unseen=())
    first = use_task_file(path)
    assert use_task_file(path) is first
    assert task_spec("reach").max_steps == 70
    path.write_text(path.read_text().replace("[suite]", "[suite]\nmax_steps = 30").replace("to the goal", "to it"))
    assert task_prompt("reach").task == "Move the hand to the goal."
    second = use_task_file(path)
    assert second is suite_of("reach") is not first
    assert task_spec("reach").max_steps == 30
    assert task_prompt("reach").task == "Move the hand to it."


def test_a_text_comes_from_the_file_the_data_or_the_documentation(family: Family, tmp_path: Path) -> None:
    path = family(("reach",))
    without = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("text"))
    path.write_text(without + '\n[tasks.pusher]\nenv = "Pusher-v5"\nsuccess = "reward_dist"\nmax_steps = 9')
    suite = use_task_file(path)
    assert suite.text("pusher")[1] == "documentation"
    assert "Pusher" in suite.description("pusher")
    with pytest.raises(InputError, match="no text prompt") as error:
        suite.description("reach")
    assert error.value.field == "tasks.reach.text"
    data = next(path.parent.glob("demos/**/metadata.json"))
    data.write_text(data.read_text().replace("{", '{"text_prompt": "Task: go there.", ', 1))
    assert use_task_file(path, path.read_text() + "\n").text("reach") == ("Task: go there.", "data")


def test_relative_paths_are_relative_to_the_file(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = family(("reach",))
    monkeypatch.chdir("/")
    suite = use_task_file(os.path.relpath(path, "/"))
    assert suite.recorded("reach").state_dim == 13
