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
    path.write_text(text.replace("[tasks.visit]", '[tasks.visit]\ndata_task = "vist"'))
    with pytest.raises(InputError, match="several tasks, and none of this name"):
        load_own_data(use_task_file(path), ["visit"])


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
