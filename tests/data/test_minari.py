"""Minari data sets: what we write is what Minari itself opens; what others wrote is read, or refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_datasets, join_episodes, load_dataset, save_minari
from llmdpd.data.minari import load_minari
from llmdpd.errors import InputError
from llmdpd.tasks.base import Reading

MakeDataset = Callable[..., TrajectoryDataset]
pytestmark = pytest.mark.filterwarnings("ignore:env_spec is None")
PER_STEP = ("observations", "actions", "rewards", "next_observations", "terminals", "expert_actions")
PER_EPISODE = ("noise_levels", "successes", "seeds", "success_steps")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def assert_same(a: TrajectoryDataset, b: TrajectoryDataset) -> None:
    for name in (*PER_STEP, *PER_EPISODE, "offsets", "task_ids"):
        left, right = getattr(a, name), getattr(b, name)
        if left is None:
            assert right is None, name
        else:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
    assert (a.tasks, a.texts, a.goal_visible) == (b.tasks, b.texts, b.goal_visible)


def test_minari_itself_opens_what_we_write(root: Path, make_dataset: MakeDataset) -> None:
    dataset = make_dataset(texts={"push-v3": "Task: push\nObjective: …"}, goal_visible=True)
    folders = save_minari(dataset, root)
    assert folders == [root / "metaworld" / task / "scripted-v0" for task in dataset.tasks]
    assert set(minari.list_local_datasets()) == {f"metaworld/{task}/scripted-v0" for task in dataset.tasks}
    assert dataset.expert_actions is not None
    for task in dataset.tasks:
        theirs = minari.load_dataset(f"metaworld/{task}/scripted-v0")
        ours = dataset.episodes_of(task)
        metadata = theirs.storage.metadata
        assert theirs.total_episodes == len(ours)
        assert theirs.total_steps == dataset.lengths[ours].sum()
        assert theirs.observation_space == spaces.Box(-np.inf, np.inf, (39,), np.float32)
        assert theirs.action_space == spaces.Box(-1, 1, (4,), np.float32)
        assert (metadata["task"], metadata["goal_visible"]) == (task, True)
        assert metadata["text_prompt"] == dataset.texts[dataset.task_index(task)]
        assert theirs.spec.namespace == f"metaworld/{task}"
        about = list(theirs.storage.get_episode_metadata(range(len(ours))))
        for number, (e, episode) in enumerate(zip(ours, theirs.iterate_episodes(), strict=True)):
            rows = slice(dataset.offsets[e], dataset.offsets[e + 1])
            np.testing.assert_array_equal(episode.observations[:-1], dataset.observations[rows])
            np.testing.assert_array_equal(episode.observations[1:], dataset.next_observations[rows])
            np.testing.assert_array_equal(episode.actions, dataset.actions[rows])
            np.testing.assert_array_equal(episode.rewards, dataset.rewards[rows])
            np.testing.assert_array_equal(episode.terminations, dataset.terminals[rows])
            assert episode.truncations[-1] != episode.terminations[-1]
            assert not episode.truncations[:-1].any()
            np.testing.assert_array_equal(episode.infos["expert_action"][:-1], dataset.expert_actions[rows])
            assert np.isnan(episode.infos["expert_action"][-1]).all()
            assert about[number]["seed"] == dataset.seeds[e]
            assert np.float32(about[number]["noise_level"]) == dataset.noise_levels[e]
            assert int(about[number].get("success", -1)) == dataset.successes[e]
            assert int(about[number].get("success_step", -1)) == dataset.episode(int(e)).success_step


@pytest.mark.parametrize("goal_visible", [True, False, None])
@pytest.mark.parametrize("expert", [True, False])
def test_what_we_write_we_read(root: Path, make_dataset: MakeDataset, goal_visible: bool | None, expert: bool) -> None:
    dataset = make_dataset(texts={"reach-v3": "ä 😀"}, goal_visible=goal_visible, expert=expert)
    for task, folder in zip(dataset.tasks, save_minari(dataset, root), strict=True):
        want = dataset.select_tasks([task])
        if goal_visible is None:  # the observations tell
            want = dataclasses.replace(want, goal_visible=True)
        for spec in (folder, folder / "data", f"minari:metaworld/{task}/scripted-v0"):
            assert_same(load_dataset(spec), want)
    by_path = sorted(dataset.tasks)
    joined = join_datasets([dataset.select_tasks([t]) for t in by_path])
    assert_same(load_dataset(root), dataclasses.replace(joined, goal_visible=goal_visible is not False))


def test_saving_replaces_and_leaves_nothing_behind(root: Path, make_dataset: MakeDataset) -> None:
    save_minari(make_dataset((("a", 3), ("b", 2))), root)
    second = make_dataset((("a", 4), ("b", 2))).select([0])
    save_minari(second, root)
    assert load_dataset(root, tasks=["a"]).lengths.tolist() == [4]
    assert load_dataset(root).lengths.tolist() == [4, 2]
    assert not [p for p in root.rglob(".*")]


def test_a_folder_of_other_files_is_kept(root: Path, make_dataset: MakeDataset) -> None:
    (folder,) = save_minari(make_dataset((("a", 3),)), root)
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="other files") as error:
        save_minari(make_dataset((("a", 4),)), root)
    assert (error.value.path, error.value.found) == (str(folder), "notes.txt")
    assert (folder / "notes.txt").read_text() == "precious"
    assert load_dataset(root).lengths.tolist() == [3]


def test_a_failed_write_keeps_the_old(root: Path, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_dataset((("a", 3),))
    (folder,) = save_minari(first, root)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmdpd.data.minari.atomic_write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_minari(make_dataset((("a", 9),)), root)
    monkeypatch.undo()
    assert_same(load_minari(folder), first)
    assert not [p for p in root.rglob(".*")]


def test_names_and_unknown_values(tmp_path: Path, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a relative folder
    record = EpisodeRecord(np.zeros((3, 2)), actions=np.full((2, 1), 5.0), rewards=np.ones(2), task="my task: 1")
    dataset, root = join_episodes([record]), Path("minari")
    (folder,) = save_minari(dataset, root, namespace="mine", name="replay-v1")
    assert folder == tmp_path / "minari" / "mine" / "my_task__1" / "replay-v1"
    assert_same(load_dataset("minari"), dataset)
    theirs = minari.load_dataset("mine/my_task__1/replay-v1")
    assert theirs.action_space == spaces.Box(-np.inf, np.inf, (1,), np.float32)
    assert "seed" not in next(iter(theirs.storage.get_episode_metadata([0])))


def test_names_that_ids_cannot_hold_stay_apart(tmp_path: Path, make_dataset: MakeDataset) -> None:
    names = ("pour.tea", "pour_tea", "倒水", "擦桌")
    dataset = make_dataset(tuple((name, number + 1) for number, name in enumerate(names)), expert=False)
    folders = save_minari(dataset, tmp_path)
    assert [folder.parent.name for folder in folders] == ["pour_tea-2", "pour_tea", "__", "__-2"]
    read = load_dataset(tmp_path)
    assert {name: read.lengths[read.episodes_of(name)].tolist() for name in names} == dict(
        zip(names, [[1], [2], [3], [4]], strict=True)
    )
    # One after the other, too, and again in the same place.
    for name in names:
        save_minari(dataset.select_tasks([name]), tmp_path / "single")
    assert set(load_dataset(tmp_path / "single").tasks) == set(names)
    assert save_minari(dataset.select_tasks(["擦桌"]), tmp_path / "single") == [
        tmp_path / "single" / "metaworld" / "__-2" / "scripted-v0"
    ]


def test_steps_that_do_not_follow_one_another_are_not_saved(root: Path, make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    dataset.next_observations[8, 3] += 1
    with pytest.raises(InputError, match="can't be kept as Minari") as caught:
        save_minari(dataset, root)
    assert "row 8" in str(caught.value.found)
    assert not root.exists()


def third_party(
    observation_space: Any = None, action_space: Any = None, ends: tuple[str, ...] = ("t", "u"), **keywords: Any
) -> Path:
    """A data set as another program would make it, with two episodes of three float64 steps."""
    observation_space = observation_space or spaces.Box(-9, 9, (3,), np.float64)
    action_space = action_space or spaces.Box(-1, 1, (2,), np.float64)
    buffers = [
        EpisodeBuffer(
            observations=[observation_space.sample() for _ in range(4)],
            actions=[action_space.sample() for _ in range(3)],
            rewards=[1.0, 2.0, 3.0],
            terminations=[False, False, "t" in end],
            truncations=[False, False, "u" in end],
            infos={"expert_action": np.zeros((4, 7))},
        )
        for end in ends
    ]
    name = f"theirs/thing-v{np.random.default_rng().integers(1 << 30)}"
    with pytest.warns(UserWarning, match="is set to None"):
        made = minari.create_dataset_from_buffers(
            name, buffers, observation_space=observation_space, action_space=action_space, **keywords
        )
    return Path(made.spec.data_path)


def test_somebody_elses_data_set() -> None:
    folder = third_party(ends=("t", "u", "tu", ""))
    dataset = load_dataset(folder)
    theirs = minari.MinariDataset(folder)
    assert dataset.tasks == (theirs.id,)
    assert dataset.lengths.tolist() == [3, 3, 3, 3]
    assert np.flatnonzero(dataset.terminals).tolist() == [2, 8]
    assert dataset.expert_actions is None
    assert dataset.observations.dtype == np.float32
    for e, episode in enumerate(theirs.iterate_episodes()):
        np.testing.assert_array_equal(dataset.episode(e).observations, episode.observations[:-1].astype(np.float32))
    assert_same(load_dataset(f"minari:{theirs.id}"), dataset)
    # Names that mean something else there are left alone.
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        file["episode_0"].attrs.update({"noise_level": "high", "success": 7})
    assert_same(load_dataset(folder), dataset)


DICT = spaces.Dict(
    {
        "observation": spaces.Box(-9, 9, (4,), np.float64),
        "achieved_goal": spaces.Box(-9, 9, (2,), np.float64),
        "desired_goal": spaces.Box(-9, 9, (2,), np.float64),
        "more": spaces.Dict({"force": spaces.Box(-1, 1, (), np.float32), "image": spaces.Box(0, 9, (2, 2, 3))}),
    }
)


def test_dict_observations_are_flattened_by_their_keys_or_as_gymnasium_does() -> None:
    plain = spaces.Dict({name: space for name, space in DICT.spaces.items() if name != "more"})
    actions = spaces.Dict({"b": spaces.Box(-1, 1, (1,)), "a": spaces.Box(-1, 1, (2,))})
    samples = [[plain.sample() for _ in range(4)], [actions.sample() for _ in range(3)]]
    folder = dict_data(plain, actions, *samples)
    dataset = load_dataset(folder)
    for have, space, values in ((dataset.observations, plain, samples[0]), (dataset.actions, actions, samples[1])):
        wanted = np.array([spaces.flatten(space, value) for value in values])
        np.testing.assert_array_equal(have, wanted[:3].astype(np.float32))
    chosen = load_dataset(folder, reading=Reading(("observation", "desired_goal"), action="a"))
    wanted = np.array([[*value["observation"], *value["desired_goal"]] for value in samples[0]], np.float32)
    np.testing.assert_array_equal(chosen.observations, wanted[:3])
    np.testing.assert_array_equal(chosen.next_observations, wanted[1:])
    np.testing.assert_array_equal(chosen.actions, np.array([value["a"] for value in samples[1]], np.float32))
    with pytest.raises(InputError, match="no such key") as caught:
        load_dataset(folder, reading=Reading(("observaton",)))
    assert "achieved_goal, desired_goal, observation" in str(caught.value.expected)


def test_keys_choose_around_what_cannot_be_read() -> None:
    actions = spaces.Box(-1, 1, (1,))
    samples = [[DICT.sample() for _ in range(4)], [actions.sample() for _ in range(3)]]
    folder = dict_data(DICT, actions, *samples)
    with pytest.raises(InputError, match="this space can't be used") as caught:
        load_dataset(folder)
    assert "more/image" in str(caught.value.hint)
    chosen = load_dataset(folder, reading=Reading(("more/force", "achieved_goal")))
    wanted = [[value["more"]["force"], *value["achieved_goal"]] for value in samples[0]]
    np.testing.assert_array_equal(chosen.observations, np.array(wanted, np.float32)[:3])


def test_keys_choose_around_images() -> None:
    """Minari keeps them as lists of bytes, JPEG."""
    space = spaces.Dict({"state": spaces.Box(-1, 1, (3,)), "image": spaces.Box(0, 255, (32, 40, 3), np.uint8)})
    actions = spaces.Box(-1, 1, (2,))
    samples = [[space.sample() for _ in range(4)], [actions.sample() for _ in range(3)]]
    folder = dict_data(space, actions, *samples)
    with h5py.File(folder / "main_data.hdf5") as file:
        assert h5py.check_vlen_dtype(file["episode_0/observations/image"].dtype) == np.uint8
    chosen = load_dataset(folder, reading=Reading(("state",)))
    np.testing.assert_array_equal(chosen.observations, np.array([value["state"] for value in samples[0][:3]]))


def dict_data(observation_space: Any, action_space: Any, observations: Any, actions: Any) -> Path:
    """A data set of one episode of three steps."""

    def columns(space: Any, values: list[Any]) -> Any:
        if not isinstance(space, spaces.Dict):
            return np.array(values)
        return {name: columns(inner, [value[name] for value in values]) for name, inner in space.spaces.items()}

    buffer = EpisodeBuffer(
        observations=columns(observation_space, observations),
        actions=columns(action_space, actions),
        rewards=[1.0, 2.0, 3.0],
        terminations=[False] * 3,
        truncations=[False, False, True],
    )
    name = f"theirs/dict-v{np.random.default_rng().integers(1 << 30)}"
    with pytest.warns(UserWarning, match="is set to None"):
        made = minari.create_dataset_from_buffers(
            name, [buffer], observation_space=observation_space, action_space=action_space
        )
    return Path(made.spec.data_path)


def test_the_id_names_the_task_where_the_environments_is_all_tasks() -> None:
    """One id may stand for all of a benchmark; what a suite knows of the two is the task."""
    spaces_of_metaworld = (spaces.Box(-9, 9, (39,)), spaces.Box(-1, 1, (4,)))
    folder = third_party(*spaces_of_metaworld)
    edit(folder, env_spec=json.dumps({"id": "Meta-World/MT1"}), dataset_id="metaworld/door-open/expert-v0")
    dataset = load_dataset(folder)
    assert (dataset.tasks, dataset.environments) == (("door-open-v3",), ("Meta-World/MT1",))


def test_the_environment_names_the_task() -> None:
    spec = gymnasium.spec("Pendulum-v1")
    observations, actions = spaces.Box(-8, 8, (3,), np.float32), spaces.Box(-2, 2, (1,), np.float32)
    folder = third_party(observations, actions, env=spec)
    assert load_dataset(folder).tasks == ("Pendulum-v1",)


def edit(folder: Path, **changes: Any) -> None:
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(metadata | changes))


@pytest.mark.parametrize(("ours", "field"), [(True, "task"), (False, "dataset_id")])
@pytest.mark.parametrize("name", ["", None, [], 3])
def test_a_name_that_is_none(root: Path, make_dataset: MakeDataset, ours: bool, field: str, name: Any) -> None:
    (folder,) = save_minari(make_dataset((("a", 2),)), root)
    if not ours:
        path = folder / "data" / "metadata.json"
        metadata = json.loads(path.read_text())
        del metadata["llmdpd_format"]
        path.write_text(json.dumps(metadata))
    edit(folder / "data", **{field: name})
    with pytest.raises(InputError, match="damaged metadata") as error:
        load_dataset(folder)
    assert error.value.field == field


def test_a_name_that_is_no_unicode(root: Path, make_dataset: MakeDataset) -> None:
    (folder,) = save_minari(make_dataset((("a", 2),)), root)
    for field, name in (("text_prompt", "texts"), ("task", "tasks")):
        edit(folder / "data", **{field: "\ud800"})
        with pytest.raises(InputError, match="no Unicode") as error:
            load_dataset(folder)
        assert error.value.field == name


def test_no_environment_is_made_to_learn_a_space(
    root: Path, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minari would import and run what the file's environment spec names."""
    (folder,) = save_minari(make_dataset((("a", 2),)), root)
    mark = root / "ran"
    evil = root / "evil_module.py"
    evil.write_text(f"open({str(mark)!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(root))
    edit(folder / "data", observation_space=None, env_spec=json.dumps({"id": "X-v0", "entry_point": "evil_module:Env"}))
    with pytest.raises(InputError, match="space is not in the metadata"):
        load_dataset(folder)
    assert not mark.exists()


def test_damaged_data_sets(root: Path, make_dataset: MakeDataset) -> None:
    (folder,) = save_minari(make_dataset((("a", 5), ("a", 4))), root)
    data = folder / "data"
    whole, metadata = (data / "main_data.hdf5").read_bytes(), (data / "metadata.json").read_text()

    def refused(words: str) -> InputError:
        with pytest.raises(InputError, match=words) as caught:
            load_dataset(folder)
        assert str(folder) in str(caught.value.path)
        (data / "main_data.hdf5").write_bytes(whole)
        (data / "metadata.json").write_text(metadata)
        load_dataset(folder)
        return caught.value

    (data / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])
    refused("cut off or damaged")
    (data / "main_data.hdf5").unlink()
    refused("file not found")
    (data / "metadata.json").write_text(metadata[:-9])
    refused("not JSON")
    edit(data, total_episodes=3)
    refused("can't be read")
    edit(data, total_episodes=0)
    refused("empty")
    edit(data, data_format="unheard-of")
    refused("can't be read")
    edit(data, action_space="{")
    refused("damaged metadata")
    for field, kind, shape in (
        ("action_space", "Discrete", None),
        ("observation_space", "Dict", None),
        ("observation_space", "Box", [2, 2]),
        ("observation_space", "MultiBinary", [4]),
    ):
        edit(data, **{field: json.dumps({"type": kind, "shape": shape})})
        error = refused("this space can't be used")
        assert (error.field, error.path) == (field, str(data / "metadata.json"))
        assert kind in str(error.found)

    def change(name: str, value: Any) -> None:
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file[f"episode_1/{name}"]
            if value is not None:
                file[f"episode_1/{name}"] = value

    change("rewards", np.zeros(3))
    assert refused("unequal lengths").field == "rewards of episode 1"
    change("observations", np.zeros((4, 39)))
    assert refused("unequal lengths").field == "observations of episode 1"
    change("actions", np.full((4, 4), np.nan))
    assert refused("NaN or Inf").field == "actions"
    change("actions", np.zeros((4, 3)))
    assert refused("don't fit together").field == "actions"
    change("terminations", np.array([False, True, False, False]))
    assert refused("wrong terminations").field == "terminations of episode 1"
    change("truncations", np.array([False, True, False, True]))
    assert refused("wrong truncations").field == "truncations of episode 1"
    change("terminations", np.array([0, 0, 0, 2]))
    assert refused("wrong flags").field == "terminations of episode 1"
    change("actions", None)
    refused("can't be read")
    with pytest.raises(InputError, match="no Minari data set here"):
        load_minari(root)


def test_an_unknown_id_offers_the_nearest(
    root: Path, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, force_download: bool) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(InputError, match="no such Minari data set") as caught:
        load_dataset("minari:metaworld/pusj-v3/scripted-v0")
    assert "minari download metaworld/pusj-v3/scripted-v0" in str(caught.value.hint)
    save_minari(make_dataset(), root)
    with pytest.raises(InputError) as caught:
        load_dataset("minari:metaworld/pusj-v3/scripted-v0")
    assert "nearest local ids: metaworld/push-v3/scripted-v0" in str(caught.value.hint)


def test_an_id_that_is_not_here_is_downloaded(
    root: Path, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def download(name: str, force_download: bool) -> None:
        asked.append((name, force_download))
        save_minari(make_dataset((("push-v3", 4),)), root)

    monkeypatch.setattr(minari, "download_dataset", download)
    name = "metaworld/push-v3/scripted-v0"
    assert load_dataset(f"minari:{name}").tasks == ("push-v3",)
    assert load_dataset(f"minari:{name}").tasks == ("push-v3",)
    assert asked == [(name, False)], "once"
    (root / name / "data" / "main_data.hdf5").unlink()  # as where a download broke off
    assert load_dataset(f"minari:{name}").tasks == ("push-v3",)
    assert asked == [(name, False), (name, True)]


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("text", "expected"), [("Put the cup away.", "Put the cup away."), ("  ", ""), (None, "")])
def test_the_description_of_somebodys_data_set_is_its_text(text: str | None, expected: str) -> None:
    folder = third_party()
    edit(folder, description=text)
    assert load_dataset(folder).texts == (expected,)


@pytest.mark.parametrize("task", [None, 3, ""])
def test_metadata_without_a_task(root: Path, make_dataset: MakeDataset, task: Any) -> None:
    (folder,) = save_minari(make_dataset((("a", 5),)), root)
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["task"]
    path.write_text(json.dumps(metadata if task is None else {**metadata, "task": task}))
    with pytest.raises(InputError, match="damaged metadata") as error:
        load_dataset(folder)
    assert error.value.field == "task"
