"""What holds for whatever format data come in: each test runs over every reader, on the same small trajectories."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from data_writers import FORMATS, Episode, random_episodes

from llmdpd.data import TrajectoryDataset, load_dataset
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.evaluation.prompts import choose_demonstrations
from llmdpd.tasks.base import DEFAULT_READING, Reading

KINDS = pytest.mark.parametrize("kind", FORMATS)
OURS = ("minari of ours", "shards")
FALLS = [name for name, each in FORMATS.items() if each.falls]
HOPPER = {"state_dim": 11, "action_dim": 3}
pytestmark = pytest.mark.filterwarnings("ignore:env_spec is None")


def written(kind: str, folder: Path, episodes: Sequence[Episode], task: str = "push-v3", environment: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return FORMATS[kind].write(folder, episodes, task, environment)


def check_same(dataset: TrajectoryDataset, episodes: Sequence[Episode], kind: str) -> None:
    """The data set holds these episodes, as far as the format keeps them."""
    expected = FORMATS[kind]
    kept = [len(each) for each in episodes]
    assert dataset.lengths.tolist() == kept
    for e, each in enumerate(episodes):
        rows = slice(dataset.offsets[e], dataset.offsets[e + 1])
        np.testing.assert_array_equal(dataset.observations[rows], each.observations[:-1])
        np.testing.assert_array_equal(dataset.actions[rows], each.actions)
        following = dataset.next_observations[rows]
        # At a terminal, where no next observation is kept, it counts for nothing.
        np.testing.assert_array_equal(
            following[: len(each) - each.fell], each.observations[1:][: len(each) - each.fell]
        )
        wanted = each.rewards if expected.rewards else np.zeros(len(each))
        np.testing.assert_array_equal(dataset.rewards[rows], wanted)
        falls = each.last & (each.fell and expected.falls)
        assert dataset.terminals[rows].tolist() == falls.tolist()


@KINDS
def test_the_same_trajectories_are_read(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    episodes = random_episodes(rng)
    dataset = load_dataset(written(kind, tmp_path, episodes))
    check_same(dataset, episodes, kind)
    assert dataset.tasks == ("push-v3",)
    assert dataset.goal_visible is True


@pytest.mark.parametrize("kind", FALLS)
def test_falls_and_time_limits_are_told_apart(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    """Of both flags, neither is ignored: an episode ends at each of them, and a fall alone is a terminal."""
    episodes = random_episodes(rng, (6, 4, 5, 3), falls=(True, False, True, False), **HOPPER)
    dataset = load_dataset(written(kind, tmp_path, episodes, "hopper-medium-v2"))
    check_same(dataset, episodes, kind)
    assert dataset.terminals.sum() == 2
    assert load_tasks(tmp_path, ("Hopper-v4",), True).terminals.sum() == 2


@KINDS
def test_actions_outside_the_bounds_are_clipped_and_counted(
    tmp_path: Path, rng: np.random.Generator, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As the environment clips what it is given: see the case of Meta-World's scripted experts."""
    episodes = random_episodes(rng)
    episodes[1].actions[2, 0], episodes[2].actions[0] = 17.5, -3
    path = written(kind, tmp_path, episodes)
    for dataset in (load_dataset(path), load_tasks(path, ("push-v3",), True)):
        wanted = np.concatenate([each.actions for each in episodes]).clip(-1, 1)
        np.testing.assert_array_equal(dataset.actions, wanted)
    (line,) = [record.getMessage() for record in caplog.records if "bounds" in record.getMessage()]
    assert "actions of 2 of 15 steps" in line, "said once, however often the data are read"
    assert "(-3 … 17.5)" in line
    assert "-1 … 1" in line


@KINDS
@pytest.mark.parametrize("task", ["push-v3", "hopper-medium-v2"])
def test_episodes_that_were_joined_are_refused(tmp_path: Path, rng: np.random.Generator, kind: str, task: str) -> None:
    limit, widths = (500, {}) if task == "push-v3" else (1000, HOPPER)
    if limit == 1000 and not FORMATS[kind].falls:
        pytest.skip("files of another suite's, or of robots")
    path = written(kind, tmp_path, random_episodes(rng, (4, limit), **widths), task)
    assert load_dataset(path).lengths.tolist() == [4, limit]
    shutil.rmtree(tmp_path)
    path = written(kind, tmp_path, random_episodes(rng, (4, limit + 1), **widths), task)
    canonical = "push-v3" if limit == 500 else "Hopper-v4"
    for load in (lambda: load_dataset(path), lambda: load_tasks(path, (canonical,), True)):
        with pytest.raises(InputError, match="several episodes joined") as caught:
            load()
        assert str(tmp_path) in str(caught.value.path)
        assert caught.value.field == "timeouts"
        assert str(limit + 1) in str(caught.value.found)
        assert str(limit) in str(caught.value.expected)


@KINDS
def test_whether_the_goal_is_hidden_is_seen(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    hidden, shown = random_episodes(rng), random_episodes(rng)
    for each in hidden:
        each.observations[:, 36:39] = 0
    path = written(kind, tmp_path / "hidden", hidden)
    assert load_dataset(path).goal_visible is False
    assert load_tasks(path, ("push-v3",), False).goal_visible is False
    with pytest.raises(InputError, match="whether the goal is visible") as caught:
        load_tasks(path, ("push-v3",), True)
    assert caught.value.found == "data: False"
    mixed = written(kind, tmp_path / "mixed", [*hidden, *shown])
    with pytest.raises(InputError, match="others hide it"):
        load_dataset(mixed)


@KINDS
def test_success_is_what_the_steps_say(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    episodes = random_episodes(rng, (6, 4, 5, 3), success=([], [2, 3], [0, 4], []))
    # No name of success but `dones` is customary in robomimic's files.
    reading = Reading(success="success" if kind == "robomimic" else None)
    dataset = load_dataset(written(kind, tmp_path, episodes), reading=reading)
    assert dataset.successes.tolist() == [0, 1, 1, 0]
    assert dataset.success_steps.tolist() == [-1, 2, 0, -1]
    assert dataset.episode(1).success_step == 2
    assert choose_demonstrations(dataset, "push-v3", 4) == [1, 2]
    assert kind in OURS or "success" in dataset.success_from


@KINDS
def test_success_is_unknown_where_no_step_says_it(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    dataset = load_dataset(written(kind, tmp_path, random_episodes(rng)))
    assert set(dataset.successes.tolist()) == {-1}
    assert set(dataset.success_steps.tolist()) == {-1}
    assert dataset.success_from == ""


@KINDS
def test_a_named_success_that_is_missing(
    tmp_path: Path, rng: np.random.Generator, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One rule: a customary name stands for the file's own, with a line; for any other one success is unknown."""
    if kind in OURS:
        pytest.skip("the success of the task itself is kept, whatever the key is called")
    path = written(kind, tmp_path, random_episodes(rng, (6, 4), success=([], [2, 3])))
    for key, outcomes in (("is_grasped", [-1, -1]), ("is_success", [0, 1])):
        dataset = load_dataset(path, reading=Reading(success=key))
        # Of robomimic's files an array of that name is read only where it is told.
        assert dataset.successes.tolist() == (outcomes if kind != "robomimic" else [-1, -1]), key
        assert f"no {key} in the data" in caplog.text
    assert kind == "robomimic" or "success says what succeeds" in caplog.text


@pytest.mark.parametrize("kind", FALLS)
def test_of_tasks_that_do_not_end_by_themselves_no_end_is_a_terminal(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    path = written(kind, tmp_path, random_episodes(rng, falls=(True, False, True)), "pour")
    falls = Reading(terminates=True) if kind == "decision transformer" else DEFAULT_READING
    assert load_dataset(path, reading=falls).terminals.sum() == 2
    dataset = load_dataset(path, reading=Reading(terminates=False))
    assert not dataset.terminals.any()
    observations = dataset.observations
    rows = np.setdiff1d(np.arange(len(observations) - 1), dataset.offsets[1:] - 1)
    np.testing.assert_array_equal(dataset.next_observations[rows], observations[rows + 1])


@KINDS
def test_actions_that_are_not_there_are_refused(
    tmp_path: Path, rng: np.random.Generator, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(kind, tmp_path, random_episodes(rng), "pour")
    reading = Reading(terminates=False, action="delta")
    with pytest.raises(InputError, match=r"no such|missing|no column") as caught:
        load_dataset(path, reading=reading)
    assert "delta" in f"{caught.value.field} {caught.value.found}"
    if FORMATS[kind].keys:
        return
    dataset = load_dataset(path, reading=Reading(("state", "goal"), terminates=False))
    assert dataset.state_dim == 39
    assert "observation = ['state', 'goal'] has no meaning" in caplog.text


@KINDS
def test_a_threshold_that_every_first_step_reaches_is_refused(tmp_path: Path, kind: str) -> None:
    if not FORMATS[kind].rewards:
        pytest.skip("no rewards, no return")
    lengths = (3, 4)
    episodes = [Episode(np.zeros((n + 1, 6)), np.zeros((n, 2)), np.full(n, -1.0)) for n in lengths]
    path = written(kind, tmp_path, episodes, "pour")
    assert load_dataset(path, reading=Reading(success_return=0.0, terminates=False)).successes.tolist() == [0, 0]
    with pytest.raises(InputError, match="at its first step") as caught:
        load_dataset(path, reading=Reading(success_return=-2.0, terminates=False))
    assert (caught.value.field, "return = -2" in str(caught.value.found)) == ("success", True)
    assert str(tmp_path) in str(caught.value.path)


@KINDS
def test_a_threshold_of_the_return_says_success(tmp_path: Path, kind: str) -> None:
    if not FORMATS[kind].rewards:
        pytest.skip("no rewards, no return")
    zeros = [np.zeros((n + 1, 39), np.float32) for n in (3, 4)]
    actions = [np.zeros((n, 4), np.float32) for n in (3, 4)]
    rewards = [np.full(3, 0.5, np.float32), np.full(4, 1.5, np.float32)]
    episodes = [Episode(*parts) for parts in zip(zeros, actions, rewards, strict=True)]
    dataset = load_dataset(written(kind, tmp_path, episodes), reading=Reading(success_return=3.0))
    assert (dataset.successes.tolist(), dataset.success_steps.tolist()) == ([0, 1], [-1, 1])


@KINDS
def test_seeds_of_others_are_unknown(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    """Minari's collector draws 64 bits, robots' recorders number their episodes: no seed of ours is among them."""
    dataset = load_dataset(written(kind, tmp_path, random_episodes(rng)))
    assert set(dataset.seeds.tolist()) == {-1}
    assert choose_demonstrations(dataset, "push-v3")


NAMES = ["push-v3", "push-v2", "push_v2", "push", "metaworld/push/expert-v0", "Meta-World/push-v3"]


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_tasks_in_any_spelling(tmp_path: Path, rng: np.random.Generator, kind: str, name: str) -> None:
    if "/" in name and kind not in ("minari", "minari of ours", "dicts npy", "dicts npz", "dicts pickle"):
        pytest.skip("no file has such a name")
    path = written(kind, tmp_path, random_episodes(rng), name)
    assert load_dataset(path).tasks == ("push-v3",)
    assert load_dataset(path, tasks=["push"]).num_episodes == 3
    assert load_tasks(path, ("push-v3",), True).num_episodes == 3
    for tasks in (("reach-v3",), ("reach-v3", "push-v3")):
        with pytest.raises(InputError, match="no such task") as caught:
            load_tasks(path, tasks, True)
        assert caught.value.found == "push-v3"
        assert caught.value.expected == "reach-v3"


@KINDS
def test_several_tasks_and_several_data_sets_of_one(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    # LeRobot's names are its texts, of which a task has one.
    other = "push-v3" if kind == "lerobot" else "push_v2"
    for number, (name, lengths) in enumerate([("push-v3", (3, 4)), ("reach-v3", (5,)), (other, (6,))]):
        written(kind, tmp_path / str(number), random_episodes(rng, lengths), name)
    dataset = load_tasks(tmp_path, ("reach-v3", "push-v3"), True)
    assert dataset.tasks == ("reach-v3", "push-v3")
    assert dataset.lengths[dataset.episodes_of("push-v3")].tolist() == [3, 4, 6]
    assert load_tasks(tmp_path, ("reach-v3",), True).lengths.tolist() == [5]


@pytest.mark.parametrize("kind", [name for name, each in FORMATS.items() if each.suffix])
@pytest.mark.parametrize("suffix", ["", ".bin", ".npz", ".hdf5", ".pkl"])
def test_the_content_says_what_a_file_is(tmp_path: Path, rng: np.random.Generator, kind: str, suffix: str) -> None:
    episodes = random_episodes(rng)
    path = written(kind, tmp_path / "a", episodes)
    renamed = path.rename(path.with_name(f"push-v3{suffix}"))
    check_same(load_dataset(renamed), episodes, kind)
    assert load_dataset(tmp_path).tasks == ("push-v3",)


@KINDS
def test_what_is_reached_twice_counts_once(
    tmp_path: Path, rng: np.random.Generator, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(kind, tmp_path / "data", random_episodes(rng))
    (tmp_path / "again").symlink_to(path, target_is_directory=path.is_dir())
    (tmp_path / "data" / "above").symlink_to(tmp_path, target_is_directory=True)
    assert load_dataset(tmp_path).num_episodes == 3
    assert sum("read once" in record.getMessage() for record in caplog.records) >= 1


@KINDS
@pytest.mark.parametrize("field", ["observations", "actions"])
def test_nan_is_refused(tmp_path: Path, rng: np.random.Generator, kind: str, field: str) -> None:
    if kind in OURS:
        pytest.skip("no such data set can be made")
    episodes = random_episodes(rng)
    getattr(episodes[1], field)[1, 2] = np.nan
    path = written(kind, tmp_path, episodes)
    with pytest.raises(InputError, match="NaN or Inf") as caught:
        load_dataset(path)
    assert str(tmp_path) in str(caught.value.path)
    assert caught.value.field is not None


@KINDS
def test_other_widths_than_the_tasks_are_refused(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    path = written(kind, tmp_path, random_episodes(rng, state_dim=20), "push-v3")
    with pytest.raises(InputError, match="does not match Meta-World"):
        load_tasks(path, ("push-v3",), True)


@pytest.mark.parametrize("kind", [name for name, each in FORMATS.items() if each.environment])
@pytest.mark.parametrize("asked", ["Walker2d-v4", "Walker2d-v5"])
def test_the_environment_of_the_data_is_kept_and_compared(
    tmp_path: Path, rng: np.random.Generator, kind: str, asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    episodes = random_episodes(rng, state_dim=17, action_dim=6)
    path = written(kind, tmp_path, episodes, "walker2d-medium", "Walker2d-v5")
    dataset = load_tasks(path, (asked,), True)
    assert (dataset.tasks, dataset.environments) == ((asked,), ("Walker2d-v5",))
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == (asked == "Walker2d-v4")
    assert all("recorded in Walker2d-v5, the evaluation is in Walker2d-v4" in line for line in lines)
