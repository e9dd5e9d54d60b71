"""A task file in use: its tasks are known by their names here and in workers, until another file replaces them."""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tabletop

from llmdpd.data import save_minari
from llmdpd.data.task_data import load_tasks
from llmdpd.data.task_file import task_file_in_use, use_task_file
from llmdpd.errors import InputError
from llmdpd.prompts import task_prompt
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest
from llmdpd.tasks.specs import canonical_task, check_environments, common_spec, find_suite, suite_of, task_spec
from llmdpd.tasks.user import use_no_file
from llmdpd.tasks.user.suite import Given

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
    assert (error.value.path, error.value.field) == (str(path), "suite.layout.points.goal")


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


def test_the_same_file_stays_where_that_is_asked_and_a_changed_one_replaces_it(family: Family) -> None:
    path = family(("reach", "visit"), unseen=())
    first = use_task_file(path)
    assert task_file_in_use(path) is first
    assert task_spec("reach").max_steps == 70
    path.write_text(path.read_text().replace("[suite]", "[suite]\nmax_steps = 30").replace("to the goal", "to it"))
    assert task_prompt("reach").task == "Move the hand to the goal."
    second = task_file_in_use(path)
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


ENVIRONMENT = """
import gymnasium, numpy as np
import helper
class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, ({width},))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    def reset(self, seed=None, options=None):
        import later
        return np.full({width}, helper.VALUE + later.VALUE, np.float32), {{}}
    def step(self, action):
        return np.zeros({width}, np.float32), 1.0, False, False, {{}}
def make():
    return Env()
gymnasium.register("Mine-v0", make)
"""


def write_environment(folder: Path, width: int, value: float, env: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(ENVIRONMENT.format(width=width))
    for name in ("helper", "later"):
        (folder / f"{name}.py").write_text(f"VALUE = {value}")
    path = folder / "tasks.toml"
    path.write_text(f'[tasks.one]\nenv = "{env}"\nmax_steps = 3\ntext = "Task: x."')
    return path


@pytest.mark.parametrize("env", ["mine:make", "mine:Mine-v0"])
@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_modules_of_the_same_name_are_each_files_own(
    family: Family, tmp_path: Path, env: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that the process had before, which has its place again afterwards; nothing else is left."""
    before = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", before)
    path = list(sys.path)
    for folder, width, value in (("a", 3, 0.125), ("b", 4, 0.25), ("a", 5, 0.25)):
        use_task_file(write_environment(tmp_path / folder, width, value, env))
        assert task_spec("one").state_dim == width
        start = suite_of("one").make("one", goal_visible=True, render=False).reset(0)
        np.testing.assert_array_equal(start, np.full(width, 2 * value, np.float32))
        if folder == "b":
            with EnvPool(1) as pool:
                (result,) = pool.run([EpisodeRequest("one", 0, 2)], lambda o, *_: np.zeros((len(o), 1), np.float32))
            assert result.final_observation.shape == (4,)
        (tmp_path / folder / "mine.py").unlink()
    use_no_file()
    assert sys.path == path
    assert sys.modules["mine"] is before
    assert "helper" not in sys.modules
    assert find_suite("one") is None


def test_data_that_were_changed_are_seen(family: Family) -> None:
    path = family(("reach",), env=False, suite="", episodes=3)
    use_task_file(path)
    assert load_tasks(None, ["reach"], True).num_episodes == 3
    assert task_spec("reach").state_dim == 13
    shutil.rmtree(path.parent / "demos")
    tabletop.record(path.parent / "demos", "reach", 4, keyed=True)
    use_task_file(path)
    assert load_tasks(None, ["reach"], True).num_episodes == 4
    assert task_spec("reach").state_dim == 16
    path.write_text(path.read_text().replace('data = "', 'data = "absent/'))
    with pytest.raises(InputError, match="no such file"):
        use_task_file(path).spec("reach")


def test_given_data_stand_in_for_those_that_the_file_does_not_have(family: Family, tmp_path: Path) -> None:
    path = family(("reach", "visit"), unseen=(), env=False, suite="", episodes=3)
    data = load_tasks(None, ["reach", "visit"], True) if use_task_file(path) else None
    assert data is not None
    save_minari(data, tmp_path / "given", namespace="mine")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("data")))
    use_task_file(path)
    with pytest.raises(InputError, match="neither environment nor data"):
        task_spec("reach")
    for given in (Given(str(tmp_path / "given")), Given(None, str(tmp_path / "given"))):
        use_task_file(path, given=given)
        assert (task_spec("visit").state_dim, task_spec("visit").has_environment) == (13, False)
        loaded = load_tasks(tmp_path / "given", ["visit", "reach"], True)
        assert loaded.tasks == ("visit", "reach")


def test_tasks_with_and_without_environment_are_one_policys(family: Family) -> None:
    path = family(("reach", "visit"), unseen=())
    text, (head, visit) = path.read_text(), path.read_text().split("[tasks.visit]")
    without = "\n".join(line for line in visit.splitlines() if not line.startswith("env"))
    for content in (f"{head}[tasks.visit]{without}", text):
        path.write_text(content)
        use_task_file(path)
        assert common_spec(["visit", "reach"]).state_dim == 13
    path.write_text(f"{head}[tasks.visit]{without}")
    use_task_file(path)
    with pytest.raises(InputError, match="cannot be rolled out"):
        check_environments(["reach", "visit"])


def test_a_misspelled_success_is_found_before_any_training(family: Family) -> None:
    use_task_file(family(("reach",), suite='success = "is_succes"'))
    with pytest.raises(InputError, match="nearest: is_success") as error:
        check_environments(["reach"])
    assert error.value.field == "tasks.reach.success"


@pytest.mark.parametrize(
    ("order", "widths"),
    [
        ('observation = ["desired_goal", "observation"]', {"desired_goal": 3, "observation": 10}),
        ("", {"achieved_goal": 3, "desired_goal": 3, "observation": 10}),
    ],
)
def test_widths_of_the_keys_of_an_environment(family: Family, order: str, widths: dict[str, int]) -> None:
    path = family(("reach",), layout=False, suite=order)
    path.write_text(path.read_text().replace("keyed = false", "keyed = true"))
    use_task_file(path)
    spec = task_spec("reach")
    assert list(zip(spec.observation, spec.observation_widths, strict=True)) == list(widths.items())
    assert sum(spec.observation_widths) == spec.state_dim
