"""Data sets in memory: what a batch, an episode and a selection hold, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_datasets, join_episodes, load_dataset, save_minari
from llmdpd.errors import InputError

FIELDS = [f.name for f in dataclasses.fields(TrajectoryDataset)]
MakeDataset = Callable[..., TrajectoryDataset]


def same(a: TrajectoryDataset, b: TrajectoryDataset, *, without: tuple[str, ...] = ()) -> None:
    for name in FIELDS:
        left, right = getattr(a, name), getattr(b, name)
        if name in without:
            continue
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
        else:
            assert left == right, name


def numbered(parts: Parts) -> TrajectoryDataset:
    """Every number tells its episode and step: state [e, t], action [100 e + t], reward t + 1."""
    records = [
        EpisodeRecord(
            observations=[[e, t] for t in range(length + 1)],
            actions=[[100 * e + t] for t in range(length)],
            rewards=[[t + 1] for t in range(length)],
            task=task,
            seed=e,
        )
        for e, (length, task) in enumerate(parts)
    ]
    return join_episodes(records)


Parts = list[tuple[int, str]]
episodes = st.lists(st.tuples(st.integers(1, 6), st.sampled_from("abc")), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(episodes, st.data())
def test_gather_knows_step_episode_and_successor(parts: Parts, data: st.DataObject) -> None:
    dataset = numbered(parts)
    index = data.draw(st.lists(st.integers(0, dataset.num_transitions - 1), max_size=20))
    batch = dataset.gather(np.array(index, np.int64))
    rows = [(e, t) for e, (length, _) in enumerate(parts) for t in range(length)]
    want = np.array([rows[i] for i in index], np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(batch.observations, want)
    np.testing.assert_array_equal(batch.next_observations, want + np.array([0, 1]))
    np.testing.assert_array_equal(batch.actions[:, 0], 100 * want[:, 0] + want[:, 1])
    np.testing.assert_array_equal(batch.rewards, want[:, 1] + 1)
    np.testing.assert_array_equal(batch.timesteps, want[:, 1])
    assert batch.timesteps.dtype == np.int64
    assert batch.terminals.dtype == np.float32
    assert batch.expert_actions is None


@settings(max_examples=60, deadline=None)
@given(episodes, st.integers(1, 8), st.data())
def test_windows_begin_and_end_with_their_episode(parts: Parts, horizon: int, data: st.DataObject) -> None:
    lengths, _ = zip(*parts, strict=True)
    dataset = numbered(parts)
    rows = data.draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=20))
    before = data.draw(st.integers(0, 4))
    index, mask = dataset.windows(np.array(rows, np.int64), horizon, before)
    assert index.shape == mask.shape == (len(rows), before + horizon)
    for row, steps, real in zip(rows, index, mask, strict=True):
        (episode,), (start,) = dataset.episode_ids([row]), dataset.gather([row]).timesteps
        wanted = [start + h for h in range(-before, horizon)]
        expected = [min(max(t, 0), lengths[episode] - 1) for t in wanted]
        assert dataset.observations[steps].tolist() == [[episode, t] for t in expected]
        assert real.tolist() == [0 <= t < lengths[episode] for t in wanted]


@settings(max_examples=60, deadline=None)
@given(episodes)
def test_returns_are_sums_within_an_episode(parts: Parts) -> None:
    lengths, tasks = zip(*parts, strict=True)
    dataset = numbered(parts)  # rewards 1, 2, 3 …
    expected = [sum(range(step + 1, length + 1)) for length in lengths for step in range(length)]
    assert dataset.returns_to_go().tolist() == expected
    totals = [length * (length + 1) / 2 for length in lengths]
    for share in (0.1, 0.5, 1.0):
        for task, value in dataset.target_returns(share).items():
            own = sorted(total for total, name in zip(totals, tasks, strict=True) if name == task)
            best = own[-math.ceil(share * len(own)) :]
            assert value == pytest.approx(sum(best) / len(best))
    # Where success is known: of those that succeeded the shortest.
    known = dataclasses.replace(dataset, successes=np.arange(len(parts), dtype=dataset.successes.dtype) % 2)
    for task, value in known.target_returns(0.3).items():
        done = sorted(n for e, (n, name) in enumerate(parts) if name == task and e % 2)
        if done:
            best = [n * (n + 1) / 2 for n in done[: math.ceil(0.3 * len(done))]]
            assert value == pytest.approx(sum(best) / len(best))


@settings(max_examples=60, deadline=None)
@given(episodes, st.data())
def test_select_is_the_episodes_asked_for(parts: Parts, data: st.DataObject) -> None:
    dataset = numbered(parts)
    chosen = data.draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=10))
    part = dataset.select(chosen)
    assert part.tasks == dataset.tasks
    assert part.num_episodes == len(chosen)
    for new, old in enumerate(chosen):
        have, want = part.episode(new), dataset.episode(old)
        np.testing.assert_array_equal(have.observations, want.observations)
        np.testing.assert_array_equal(have.actions, want.actions)
        assert (have.task, have.seed) == (want.task, want.seed) == (parts[old][1], old)
    np.testing.assert_array_equal(part.returns(), dataset.returns()[chosen])


@settings(max_examples=40, deadline=None)
@given(episodes)
def test_transitions_of_a_task_are_those_of_its_episodes(parts: Parts) -> None:
    dataset = numbered(parts)
    for task in dataset.tasks:
        ids = [e for e, (_, name) in enumerate(parts) if name == task]
        np.testing.assert_array_equal(dataset.episodes_of(task), ids)
        rows = dataset.transitions_of(task)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(dataset.observations[:, 0], ids)))


def test_episode_holds_views_and_what_is_known(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(texts={"push-v3": "push it"})
    episode = dataset.episode(2)
    assert len(episode) == 7
    assert np.shares_memory(episode.observations, dataset.observations)
    assert episode.task == "push-v3"
    known = (episode.seed, episode.success, episode.success_step)
    assert known == (dataset.seeds[2], dataset.successes[2], dataset.success_steps[2])
    assert episode.noise_level == dataset.noise_levels[2]
    assert dataset.texts == ("push it", "", "")
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            dataset.episode(outside)


@pytest.mark.parametrize("index", [[-1], [16], [0, 99], [0.5], [[0]]])
def test_indices_outside_are_refused(make_dataset: MakeDataset, index: Any) -> None:
    dataset = make_dataset()
    assert dataset.num_transitions == 16
    for method in (dataset.gather, dataset.episode_ids):
        with pytest.raises(IndexError):
            method(index)


def test_select_keeps_what_is_known(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(texts={"sweep-v3": "sweep"}, goal_visible=False, source="here")
    same(dataset.select(np.array([False, True, True, False])), dataset.select([1, 2]))
    assert np.shares_memory(dataset.select([1, 2]).observations, dataset.observations)
    part = dataset.select([3, 0])
    assert not np.shares_memory(part.observations, dataset.observations)
    assert (part.texts, part.goal_visible, part.source) == (dataset.texts, False, "here")
    for name in ("noise_levels", "successes", "seeds", "success_steps", "task_ids"):
        np.testing.assert_array_equal(getattr(part, name), getattr(dataset, name)[[3, 0]])
    assert part.expert_actions is not None
    assert dataset.expert_actions is not None
    np.testing.assert_array_equal(part.expert_actions[:3], dataset.expert_actions[-3:])
    with pytest.raises(InputError, match="no episode selected"):
        dataset.select([])
    for outside in ([4], [True, False]):
        with pytest.raises(IndexError):
            dataset.select(outside)


def test_select_tasks_in_the_order_asked(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(texts={"push-v3": "P", "sweep-v3": "S"})
    part = dataset.select_tasks(["sweep", "push-v2"])
    assert part.tasks == ("sweep-v3", "push-v3")
    assert part.texts == ("S", "P")
    assert part.num_episodes == 3
    assert [part.episode(e).task for e in range(3)] == ["push-v3", "push-v3", "sweep-v3"]
    np.testing.assert_array_equal(part.episode(2).observations, dataset.episode(3).observations)


def test_tasks_that_cannot_be_selected(make_dataset: MakeDataset) -> None:
    twice = numbered([(1, "push-v2"), (1, "push-v3")])
    assert twice.select_tasks(["push-v2"]).tasks == ("push-v2",)
    part = make_dataset().select([0])
    for data, names, problem in (
        (twice, ["push"], "no such task"),
        (part, ["reach-v3"], "without episodes"),
        (part, [], "no task requested"),
    ):
        with pytest.raises(InputError, match=problem):
            data.select_tasks(names)
    dataset = make_dataset(source="data.hdf5")
    for method in (dataset.episodes_of, dataset.transitions_of, lambda name: dataset.select_tasks([name])):
        with pytest.raises(InputError) as caught:
            method("pusch-v3")
        assert caught.value.path == "data.hdf5"
        assert caught.value.found == "'pusch-v3'"
        assert "push-v3" in str(caught.value.hint)


def test_check_matches_names_what_differs(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(source="some.npy")
    dataset.check_matches(39, 4, "push-v3")
    with pytest.raises(InputError, match="does not match Hopper-v4") as caught:
        dataset.check_matches(11, 4, "Hopper-v4")
    assert (caught.value.path, caught.value.field) == ("some.npy", "observations")
    assert "39" in str(caught.value.found)
    assert "11" in str(caught.value.expected)
    with pytest.raises(InputError) as caught:
        dataset.check_matches(39, 3, "x")
    assert caught.value.field == "actions"


def test_concat_merges_tasks_by_name(make_dataset: MakeDataset) -> None:
    a = make_dataset((("x", 2), ("y", 3)), texts={"x": "tx"}, goal_visible=True, source="a")
    b = make_dataset((("y", 4), ("x", 1), ("z", 2)), texts={"y": "ty", "x": "tx"}, goal_visible=True, source="b")
    joined = join_datasets([a, b])
    assert joined.tasks == ("x", "y", "z")
    assert joined.texts == ("tx", "ty", "")
    assert joined.goal_visible is True
    assert joined.source == "a and 1 more"
    assert joined.lengths.tolist() == [2, 3, 4, 1, 2]
    for new, (part, old) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1), (b, 2)]):
        have, want = joined.episode(new), part.episode(old)
        assert (have.task, have.seed, have.success) == (want.task, want.seed, want.success)
        np.testing.assert_array_equal(have.actions, want.actions)
    np.testing.assert_array_equal(joined.terminals, np.concatenate([a.terminals, b.terminals]))
    assert joined.expert_actions is not None
    np.testing.assert_array_equal(joined.expert_actions[5:], b.expert_actions)
    same(join_datasets([a]), a)
    mixed = join_datasets([make_dataset(goal_visible=True), make_dataset(goal_visible=None)])
    assert mixed.goal_visible is None
    for nothing in (lambda: join_datasets([]), lambda: join_episodes([])):
        with pytest.raises(InputError, match=r"no data set|empty"):
            nothing()


@pytest.mark.parametrize(
    ("other", "field", "words"),
    [
        ({"state_dim": 11}, "observations", "don't fit together"),
        ({"action_dim": 3}, "actions", "don't fit together"),
        ({"expert": False}, "expert_actions", "don't fit together"),
        ({"texts": {"push-v3": "other"}}, "text of push-v3", "different texts"),
        ({"goal_visible": False}, "goal_visible", "others hide it"),
    ],
)
def test_concat_refuses_what_does_not_fit(
    make_dataset: MakeDataset, other: dict[str, Any], field: str, words: str
) -> None:
    first = make_dataset(texts={"push-v3": "one"}, goal_visible=True, source="first")
    with pytest.raises(InputError, match=words) as caught:
        join_datasets([first, make_dataset(source="second", **other)])
    assert caught.value.field == field
    assert "second" in str(caught.value)


def test_from_episodes_takes_any_real_numbers() -> None:
    record = EpisodeRecord(
        observations=np.arange(6).reshape(3, 2), actions=[[True], [False]], rewards=np.ones((2, 1)), task="t"
    )
    dataset = join_episodes([record])
    assert dataset.observations.dtype == dataset.actions.dtype == dataset.rewards.dtype == np.float32
    np.testing.assert_array_equal(dataset.next_observations, [[2, 3], [4, 5]])
    assert (dataset.seeds[0], dataset.successes[0], dataset.goal_visible) == (-1, -1, None)
    assert np.isnan(dataset.noise_levels[0])


ROWS = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"observations": ROWS[:2]}, "observations of episode 1", "unequal lengths"),
        ({"rewards": ROWS[:1, 0]}, "rewards of episode 1", "unequal lengths"),
        ({"rewards": ROWS[:2]}, "rewards of episode 1", "dimensions"),
        ({"expert_actions": ROWS}, "expert_actions of episode 1", "unequal lengths"),
        ({"next_observations": ROWS}, "observations of episode 1", "unequal lengths"),
        ({"actions": ROWS[:0]}, "actions of episode 1", "without steps"),
        ({"actions": ROWS[:2, 0]}, "actions of episode 1", "dimensions"),
        ({"observations": np.zeros((3, 5))}, "observations", "don't fit together"),
        ({"actions": [["a", "b"]]}, "actions of episode 1", "not numbers"),
        ({"actions": [[1], [1, 2]]}, "actions of episode 1", "not an array"),
        ({"actions": np.zeros((2, 2), complex)}, "actions of episode 1", "not numbers"),
        ({"observations": np.full((3, 2), 1e300)}, "observations", "NaN or Inf"),
    ],
)
def test_from_episodes_names_what_is_wrong(changes: dict[str, Any], field: str, words: str) -> None:
    good = EpisodeRecord(observations=ROWS, actions=ROWS[:2], rewards=ROWS[:2, 0], task="t")
    join_episodes([good, good])
    with pytest.raises(InputError, match=words) as caught:
        join_episodes([good, dataclasses.replace(good, **changes)], source="where")
    assert (caught.value.field, caught.value.path) == (field, "where")


def test_a_data_set_shows_what_it_holds_in_a_line(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    text = repr(dataset)
    assert "\n" not in text
    for part in (dataset.tasks[0], f"{dataset.num_episodes} episodes", f"{dataset.num_transitions} transitions"):
        assert part in text


def test_behaviours_go_with_their_episodes(make_dataset: MakeDataset, tmp_path: Path) -> None:
    names = ("clean", "slow", "", "cut")
    known = dataclasses.replace(make_dataset(source="here"), behaviours=names)
    assert known.select([3, 0]).behaviours == ("cut", "clean")
    assert known.episode(1).behaviour == "slow"
    unknown = make_dataset()
    assert (unknown.behaviours, unknown.select([2]).behaviours, unknown.episode(0).behaviour) == ((), (), "")
    assert join_datasets([unknown, known]).behaviours == ("", "", "", "", *names)
    assert join_datasets([unknown, unknown]).behaviours == ()
    save_minari(known, tmp_path)
    read = load_dataset(tmp_path)
    assert sorted(read.behaviours) == sorted(names)
    assert read.select_tasks(["push-v3"]).behaviours == ("clean", "")


CHANGES: dict[str, Callable[[np.ndarray], Any]] = {
    "shorter": lambda a: a[:-1],
    "wider": lambda a: np.repeat(a, 2, axis=1),
    "float64": lambda a: a.astype(np.float64),
    "a list": lambda a: a.tolist(),
    "a column": lambda a: a[:, None],
}
WRONG_ARRAYS = [
    *[
        (name, how)
        for name in ("observations", "actions", "rewards", "terminals", "seeds")
        for how in ("shorter", "a list")
    ],
    *[(name, "wider") for name in ("next_observations", "expert_actions")],
    *[(name, how) for name in ("rewards", "offsets") for how in ("float64", "a column")],
    *[(name, "shorter") for name in ("task_ids", "noise_levels", "successes")],
]


@pytest.mark.parametrize(("name", "how"), WRONG_ARRAYS)
def test_wrong_arrays_are_refused_by_name(make_dataset: MakeDataset, name: str, how: str) -> None:
    dataset = make_dataset(source="file.h5")
    with pytest.raises(InputError) as caught:
        dataclasses.replace(dataset, **{name: CHANGES[how](getattr(dataset, name))})
    assert (caught.value.field, caught.value.path) == (name, "file.h5")
    assert caught.value.expected is not None


@pytest.mark.parametrize("rows_per_check", [4, 1 << 16])
@pytest.mark.parametrize("name", ["observations", "actions", "next_observations", "expert_actions"])
def test_nan_and_inf_are_located(
    make_dataset: MakeDataset, name: str, rows_per_check: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmdpd.data.trajectories._ROWS_PER_CHECK", rows_per_check)
    dataset = make_dataset()
    for value in (np.nan, -np.inf):
        array = getattr(dataset, name).copy()
        array[9, 3] = value
        with pytest.raises(InputError, match=r"(?s)NaN or Inf.*at \[9, 3\]") as caught:
            dataclasses.replace(dataset, **{name: array})
        assert caught.value.field == name


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"offsets": [0]}, "empty"),
        ({"offsets": [1, 5, 6, 13, 16]}, "wrong episode offsets"),
        ({"offsets": [0, 6, 5, 13, 16]}, "wrong episode offsets"),
        ({"offsets": [0, 5, 5, 13, 16]}, "without steps"),
        ({"offsets": [0, 5, 6, 13, 17]}, "unequal lengths"),
        ({"task_ids": [0, 1, 0, 3]}, "out of range"),
        ({"task_ids": [0, 1, -1, 2]}, "out of range"),
        ({"successes": [0, 1, 2, 0]}, "success"),
        ({"successes": [1, 1, 1, 1], "success_steps": [-1, 0, 7, 2]}, "(?s)wrong step of success.*episode 2 of 7"),
        ({"successes": [1, 0, 1, 1], "success_steps": [-1, 0, 6, 2]}, "(?s)wrong step of success.*episode 1"),
        ({"terminals": np.arange(16) == 7}, "(?s)terminal inside an episode.*row 7"),
        ({"texts": ("a",)}, "one text a task"),
        ({"tasks": ("a", "b", "a")}, "listed twice"),
        ({"behaviours": ("clean",)}, "one behaviour an episode"),
    ],
)
def test_wrong_structure_is_refused(make_dataset: MakeDataset, changes: dict[str, Any], problem: str) -> None:
    dataset = make_dataset()
    assert np.flatnonzero(dataset.terminals).tolist() == [5, 15]
    values = {
        name: value if isinstance(value, tuple) else np.array(value, getattr(dataset, name).dtype)
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match=problem):
        dataclasses.replace(dataset, **values)
