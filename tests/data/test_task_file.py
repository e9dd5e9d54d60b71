"""The data that a task file names: of which task they are, what of them succeeds, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.data import join_datasets, load_dataset, save_d4rl, save_minari
from llmdpd.data.task_data import load_tasks
from llmdpd.data.task_file import load_own_data, use_task_file
from llmdpd.errors import InputError
from llmdpd.runs.task_check import check_task_file
from llmdpd.tasks.base import Reading

Family = Callable[..., Path]
TWO = ("reach", "visit")


def test_each_tasks_own_data_under_its_own_name(family: Family) -> None:
    path = family(TWO, unseen=(), episodes=3)
    text = path.read_text().replace("[tasks.visit]", "[tasks.push]")
    path.write_text(text)
    suite = use_task_file(path)
    data = load_tasks(None, ["push", "reach"], True)
    assert data.tasks == ("push", "reach")
    own = load_dataset(suite.data("push")[0], reading=suite.reading("push"))
    np.testing.assert_array_equal(data.observations[data.transitions_of("push")], own.observations)
    assert (data.successes == 1).all()


def test_several_data_sets_of_one_task(family: Family) -> None:
    path = family(TWO, unseen=(), episodes=3)
    places = ["demos/tabletop/reach/expert-v0", "demos/tabletop/visit/expert-v0"]
    path.write_text(path.read_text().split("[tasks.visit]")[0].replace(f'"{places[0]}"', str(places)))
    use_task_file(path)
    assert load_tasks(None, ["reach"], True).num_episodes == 6


@pytest.mark.parametrize("again", ["demos/tabletop/reach", "demos/../demos/tabletop/reach/expert-v0", "link"])
def test_an_episode_that_is_reached_twice_counts_once(
    family: Family, again: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = family(("reach",), unseen=(), episodes=3)
    place = "demos/tabletop/reach/expert-v0"
    (path.parent / "link").symlink_to(path.parent / place)
    text = path.read_text()
    for places in ([place, again], [again, place]):
        path.write_text(text.replace(f'"{place}"', str(places)))
        use_task_file(path)
        assert load_tasks(None, ["reach"], True).num_episodes == 3
    assert "it is read once" in caplog.text


def test_one_data_set_of_several_tasks(family: Family, tmp_path: Path) -> None:
    path = family(TWO, unseen=(), episodes=3)
    use_task_file(path)
    whole = load_tasks(None, TWO, True)
    save_minari(whole, tmp_path / "all", namespace="mine")
    text = path.read_text()
    for task in TWO:
        text = text.replace(f'"demos/tabletop/{task}/expert-v0"', '"all"')
    path.write_text(text)
    use_task_file(path)
    np.testing.assert_array_equal(load_tasks(None, TWO, True).observations, whole.observations)
    path.write_text(text.replace("[tasks.visit]", '[tasks.visit]\ndata_task = "reach"'))
    use_task_file(path)
    with pytest.raises(InputError, match="the same data") as error:
        load_tasks(None, TWO, True)
    assert error.value.field == "tasks.visit.data"
    (tmp_path / "link").symlink_to(tmp_path / "all")
    head, visit = text.split("[tasks.visit]")
    path.write_text(f'{head}[tasks.visit]\ndata_task = "reach"{visit}'.replace('data = "all"', 'data = "link"', 1))
    use_task_file(path)
    with pytest.raises(InputError, match="the same data"):
        load_tasks(None, TWO, True)
    path.write_text(text.replace("[tasks.visit]", '[tasks.visit]\ndata_task = "vist"'))
    with pytest.raises(InputError, match="several tasks, and none of this name"):
        load_own_data(use_task_file(path), ["visit"])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["link", "folder", "hard link"])
def test_a_recording_is_of_one_task_however_it_is_reached(family: Family, kind: str, order: int) -> None:
    path = family(TWO, unseen=(), episodes=3)
    use_task_file(path)
    folder = path.parent / "own"
    folder.mkdir()
    save_d4rl(load_tasks(None, ["reach"], True), folder / "a.hdf5")
    other = {"link": "link.hdf5", "folder": "own", "hard link": "hard.hdf5"}[kind]
    if kind == "link":
        (path.parent / other).symlink_to(folder / "a.hdf5")
    elif kind == "hard link":
        (path.parent / other).hardlink_to(folder / "a.hdf5")
    text = path.read_text()
    for task, place in zip(TWO, ["own/a.hdf5", other][::order], strict=True):
        text = text.replace(f"demos/tabletop/{task}/expert-v0", place)
    path.write_text(text)
    use_task_file(path)
    with pytest.raises(InputError, match="the same data") as error:
        load_tasks(None, TWO, True)
    assert error.value.field == "tasks.visit.data"
    assert [task.error is not None for task in check_task_file(path).tasks] == [False, True]


def own_files(folder: Path, rng: np.random.Generator, suite: str, tasks: dict[str, str]) -> Path:
    """A task file without environments, and a file of random data for each task, with two keys of success."""
    for task in tasks:
        steps = {name: rng.normal(size=(9, width)) for name, width in (("observations", 39), ("actions", 4))}
        steps |= {"rewards": np.ones(9), "terminals": np.arange(9) == 2, "timeouts": np.isin(np.arange(9), (5, 8))}
        np.savez(folder / f"{task}.npz", **steps, lifted=np.arange(9) == 1, poured=np.arange(9) == 4)
    tables = [f'[tasks.{task}]\ndata = "{task}.npz"\ntext = "{task}"\n{words}' for task, words in tasks.items()]
    path = folder / "tasks.toml"
    path.write_text("\n".join([f"[suite]\n{suite}", *tables]))
    return path


def test_each_task_is_read_as_it_says(family: Family, tmp_path: Path, rng: np.random.Generator) -> None:
    """Whether its data are its own or given by --data: the success, the ends, and the name that it has in them."""
    tasks = {
        "lift": 'success = "lifted"',
        "pour": 'success = "poured"\nterminates = false',
        "push": 'success = "poured"',  # the name of a task of Meta-World, of the same widths
    }
    use_task_file(own_files(tmp_path, rng, "", tasks))
    own, given = load_tasks(None, list(tasks), True), load_tasks(tmp_path, list(tasks), True)
    assert own.tasks == given.tasks == tuple(tasks)
    for data in (own, given):
        assert {task: data.successes[data.episodes_of(task)].tolist() for task in tasks} == {
            "lift": [1, 0, 0],
            "pour": [0, 1, 0],
            "push": [0, 1, 0],
        }
        falls = {task: int(data.terminals[data.transitions_of(task)].sum()) for task in tasks}
        assert falls == {"lift": 1, "pour": 0, "push": 1}
    for name in ("observations", "terminals", "success_steps"):
        np.testing.assert_array_equal(getattr(own, name), getattr(given, name))
    path = own_files(tmp_path, rng, "", tasks | {"pour": tasks["pour"] + '\ndata_task = "water"'})
    (tmp_path / "pour.npz").rename(tmp_path / "water.npz")
    path.write_text(path.read_text().replace('"pour.npz"', '"water.npz"'))
    use_task_file(path)
    wanted = load_dataset(tmp_path / "water.npz", reading=Reading(terminates=False)).observations
    found = load_tasks(tmp_path, list(tasks), True)
    np.testing.assert_array_equal(found.observations[found.transitions_of("pour")], wanted)


def test_a_reading_is_not_tried_on_the_data_of_other_tasks(
    family: Family, tmp_path: Path, random_demo: Callable[..., dict], write_robomimic: Callable[..., Path]
) -> None:
    keys = {"lift": "joints", "pour": "hand"}
    for task, key in keys.items():
        demos = [random_demo(5, {key: 3, "more": 2}) for _ in range(2)]
        write_robomimic(tmp_path / f"{task}.hdf5", demos, env_args={"env_name": task, "type": 2})
    tables = [
        f'[tasks.{task}]\ndata = "{task}.hdf5"\ntext = "{task}"\nobservation = ["{key}"]' for task, key in keys.items()
    ]
    path = tmp_path / "tasks.toml"
    path.write_text("\n".join(tables))
    use_task_file(path)
    own, given = load_tasks(None, list(keys), True), load_tasks(tmp_path, list(keys), True)
    np.testing.assert_array_equal(own.observations, given.observations)
    for task in keys:
        assert load_tasks(tmp_path, [task], True).num_episodes == 2
    path.write_text(path.read_text().replace('"hand"', '"hands"'))
    use_task_file(path)
    with pytest.raises(InputError, match="no such observation") as error:
        load_tasks(tmp_path, list(keys), True)
    assert error.value.path == str(tmp_path / "pour.hdf5")


def test_the_names_of_files_say_nothing_of_the_data_of_a_task_file(
    family: Family, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = own_files(tmp_path, rng, "", {"push": ""})
    with np.load(tmp_path / "push.npz") as file:
        arrays = {name: file[name] for name in ("observations", "rewards")}
    np.savez(tmp_path / "push.npz", **arrays, actions=np.full((9, 4), 3.0), terminals=np.arange(9) == 8)
    use_task_file(path)
    with pytest.raises(InputError, match="true ends or time limits"):
        load_own_data(use_task_file(path), ["push"])
    path.write_text(path.read_text().replace("[suite]", "[suite]\nterminates = false"))
    data = load_own_data(use_task_file(path), ["push"])
    assert (data.actions == 3).all(), "bounds are those of Meta-World's tasks alone"
    assert data.goal_visible is None


@pytest.mark.parametrize("given", [False, True])
def test_a_limit_of_steps_counts_without_an_environment(
    family: Family, tmp_path: Path, rng: np.random.Generator, given: bool
) -> None:
    for limit, fits in ((3, True), (2, False)):
        use_task_file(own_files(tmp_path, rng, f"max_steps = {limit}", {"pour": ""}))
        if fits:
            assert load_tasks(tmp_path if given else None, ["pour"], True).num_episodes == 3
            continue
        with pytest.raises(InputError, match="longer than its task") as error:
            load_tasks(tmp_path if given else None, ["pour"], True)
        assert "at most 2" in str(error.value.expected)


@pytest.mark.parametrize("given", [False, True])
def test_a_threshold_that_says_nothing_is_refused(
    family: Family, tmp_path: Path, rng: np.random.Generator, given: bool
) -> None:
    use_task_file(own_files(tmp_path, rng, "success = { return = 0.5 }", {"pour": ""}))
    with pytest.raises(InputError, match="at its first step") as error:
        load_tasks(tmp_path if given else None, ["pour"], True)
    assert str(error.value.field).endswith("success")
    assert error.value.path == str(tmp_path / "pour.npz")


def test_success_by_a_threshold_of_the_return_that_is_each_tasks_own(family: Family) -> None:
    path = family(TWO, unseen=(), suite="success = { return = 2 }", extra={"visit": "success = { return = 100 }"})
    use_task_file(path)
    data = load_tasks(None, TWO, True)
    for task, outcome in (("reach", 1), ("visit", 0)):
        assert set(data.successes[data.episodes_of(task)]) == {outcome}


def test_data_that_do_not_fit_their_environment(family: Family, tmp_path: Path) -> None:
    path = family(("reach",))
    use_task_file(path)
    data = load_tasks(None, ["reach"], True)
    narrow = join_datasets([data])
    save_d4rl(narrow, tmp_path / "narrow.hdf5")
    wide = (
        path.read_text()
        .replace("keyed = false", "keyed = true")
        .replace('"demos/tabletop/reach/expert-v0"', '"narrow.hdf5"')
    )
    wide = wide.replace("[suite]", '[suite]\nobservation = ["observation"]').replace(", goal = [10, 11, 12]", "")
    path.write_text(wide)
    use_task_file(path)
    with pytest.raises(InputError, match="13 numbers a step"):
        load_tasks(None, ["reach"], True)


def test_a_task_without_data(family: Family) -> None:
    path = family(("reach",))
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("data")))
    use_task_file(path)
    with pytest.raises(InputError, match="no recorded data") as error:
        load_tasks(None, ["reach"], True)
    assert error.value.field == "tasks.reach.data"
