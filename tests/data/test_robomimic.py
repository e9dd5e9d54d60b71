"""robomimic's layout: which numbers are observations, what a success is, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from llmdpd.data import load_dataset
from llmdpd.data.robomimic import is_robomimic, load_robomimic
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading

Demo = dict[str, Any]
RandomDemo = Callable[..., Demo]
Write = Callable[..., Path]
KEYS = {"object": 14, "robot0_eef_pos": 3, "robot0_gripper_qpos": 2}
CHOICE = Reading(observation=("robot0_eef_pos", "robot0_gripper_qpos", "object"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "low_dim_v141.bin"  # by its content, not by its suffix


def test_an_episode_is_read_as_it_was_written(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    demos = [random_demo(steps, KEYS) for steps in (4, 1, 3)]
    dataset = load_dataset(write_robomimic(path, demos), reading=CHOICE)
    assert (dataset.tasks, dataset.texts) == (("PickPlaceCan",), ("",))
    assert dataset.lengths.tolist() == [4, 1, 3]
    for part, wanted in (("obs", dataset.observations), ("next_obs", dataset.next_observations)):
        rows = [np.concatenate([demo[f"{part}/{key}"] for key in CHOICE.observation], axis=1) for demo in demos]
        np.testing.assert_array_equal(wanted, np.concatenate(rows).astype(np.float32))
    for name, have in (("actions", dataset.actions), ("rewards", dataset.rewards)):
        np.testing.assert_array_equal(have, np.concatenate([demo[name] for demo in demos]).astype(np.float32))
    assert not dataset.terminals.any()
    assert (dataset.goal_visible, dataset.source) == (None, str(path))
    assert (dataset.environments, dataset.success_from) == (("PickPlaceCan 1.4.1",), "rewards")


def test_episodes_come_in_the_order_of_their_numbers(
    path: Path, random_demo: RandomDemo, write_robomimic: Write
) -> None:
    lengths = {10: 3, 9: 4, 0: 5, 100: 6, 2: 7}
    demos = [random_demo(steps, {"flat": 4}) for steps in lengths.values()]
    dataset = load_robomimic(write_robomimic(path, demos, numbers=list(lengths)), DEFAULT_READING)
    assert dataset.lengths.tolist() == [lengths[number] for number in sorted(lengths)]


def test_without_next_observations_the_last_step_is_left_out(
    path: Path, random_demo: RandomDemo, write_robomimic: Write, caplog: pytest.LogCaptureFixture
) -> None:
    demos = [random_demo(steps, {"flat": 4}) for steps in (5, 1, 2)]
    for demo in demos:
        demo["next_obs/flat"] = None
    dataset = load_robomimic(write_robomimic(path, demos), DEFAULT_READING)
    assert dataset.lengths.tolist() == [4, 1]
    for e, demo in enumerate((demos[0], demos[2])):
        rows = slice(dataset.offsets[e], dataset.offsets[e + 1])
        whole = demo["obs/flat"].astype(np.float32)
        np.testing.assert_array_equal(dataset.observations[rows], whole[:-1])
        np.testing.assert_array_equal(dataset.next_observations[rows], whole[1:])
        np.testing.assert_array_equal(dataset.actions[rows], demo["actions"][:-1].astype(np.float32))
    # The success was in the step that is left out: the episode succeeded all the same.
    assert (dataset.successes.tolist(), dataset.success_steps.tolist()) == ([1, 1], [-1, -1])
    assert "1 episodes of one step" in caplog.text


def test_the_only_key_needs_no_choice_and_several_do(
    path: Path, random_demo: RandomDemo, write_robomimic: Write
) -> None:
    image = np.zeros((3, 8, 8, 3), np.uint8)
    one = random_demo(3, {"flat": 4}) | {"obs/agentview_image": image, "next_obs/agentview_image": image}
    assert load_robomimic(write_robomimic(path, [one]), DEFAULT_READING).state_dim == 4
    several = random_demo(3, KEYS) | {"obs/agentview_image": image, "next_obs/agentview_image": image}
    write_robomimic(path, [several])
    with pytest.raises(InputError, match="chosen") as caught:
        load_robomimic(path, DEFAULT_READING)
    assert caught.value.field == "data/demo_0/obs"
    for part in ("object [14]", "robot0_eef_pos [3]", "agentview_image [8, 8, 3]", "`observation`", "images"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="images and matrices") as caught:
        load_robomimic(path, Reading(observation=("object", "agentview_image")))
    assert caught.value.field == "data/demo_0/obs/agentview_image"
    with pytest.raises(InputError, match="no such observation") as caught:
        load_robomimic(path, Reading(observation=("robot0_eef_poss",)))
    assert "robot0_eef_pos" in str(caught.value.hint)


def test_a_number_a_step_is_a_column(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    demo = random_demo(3, {"flat": 2, "time": 1})
    for part in ("obs", "next_obs"):
        demo[f"{part}/time"] = demo[f"{part}/time"][:, 0]
    dataset = load_robomimic(write_robomimic(path, [demo]), Reading(observation=("time", "flat")))
    np.testing.assert_array_equal(dataset.observations[:, 0], demo["obs/time"].astype(np.float32))
    assert dataset.state_dim == 3


def test_other_actions_are_chosen(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    demo = random_demo(3, {"flat": 2})
    demo["actions_abs"] = demo["actions"][:, :6] * 2
    dataset = load_robomimic(write_robomimic(path, [demo]), Reading(action="actions_abs"))
    np.testing.assert_array_equal(dataset.actions, demo["actions_abs"].astype(np.float32))
    with pytest.raises(InputError, match="missing") as caught:
        load_robomimic(path, Reading(action="actions_rel"))
    assert caught.value.field == "data/demo_0/actions_rel"


def test_a_filter_key_chooses_episodes(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    demos = [random_demo(steps, {"flat": 4}) for steps in range(1, 13)]
    masks = {"valid": ["demo_10", "demo_2"], "none": [], "lost": ["demo_1", "demo_12"]}
    write_robomimic(path, demos, masks=masks)
    assert load_dataset(path, reading=Reading(part="valid")).lengths.tolist() == [3, 11]
    assert load_dataset(path).num_episodes == 12
    for part, field, found in (("none", "mask/none", "no episode"), ("lost", "mask/lost", "demo_12")):
        with pytest.raises(InputError, match="wrong filter key") as caught:
            load_robomimic(path, Reading(part=part))
        assert (caught.value.field, caught.value.found) == (field, found)
    with pytest.raises(InputError, match="no such filter key") as caught:
        load_robomimic(path, Reading(part="train"))
    assert caught.value.found == "lost, none, valid"
    with pytest.raises(InputError, match="no such filter key"):
        load_robomimic(write_robomimic(path, demos), Reading(part="train"))


@pytest.mark.parametrize(
    ("env_args", "rewards", "wanted"),
    [
        ({"type": 1, "env_kwargs": {"reward_shaping": False}}, [0, 1, 1], (1, 1)),
        ({"type": 1, "env_kwargs": {}}, [1, 0, 0], (1, 0)),
        # Shaped rewards, and those of any Gym environment, may be 1 without a success.
        ({"type": 1, "env_kwargs": {"reward_shaping": True}}, [0, 1, 1], (-1, -1)),
        ({"type": 2, "env_kwargs": {}}, [1, 1, 1], (-1, -1)),
        ({"type": 1, "env_kwargs": {}}, [0, 0.5, 1], (-1, -1)),
        (None, [0, 0, 1], (-1, -1)),
    ],
)
def test_a_success_is_only_what_the_file_says(
    path: Path,
    random_demo: RandomDemo,
    write_robomimic: Write,
    env_args: object,
    rewards: list[float],
    wanted: tuple[int, int],
) -> None:
    demos = [random_demo(3, {"flat": 2}) for _ in range(2)]
    for demo, values in zip(demos, (rewards, [0, 0, 0]), strict=True):
        demo["rewards"] = np.array(values, np.float64)
        demo["dones"] = np.array([0, 0, 1])  # an end, which every episode has
    dataset = load_robomimic(write_robomimic(path, demos, env_args=env_args), DEFAULT_READING)
    assert (dataset.successes[0], dataset.success_steps[0]) == wanted
    assert dataset.successes[1] == (0 if wanted[0] == 1 else -1)
    assert dataset.success_from == ("rewards" if wanted[0] == 1 else "")
    assert not dataset.terminals.any()
    told = load_robomimic(path, Reading(success="dones"))
    assert (told.successes.tolist(), told.success_steps.tolist()) == ([1, 1], [2, 2])
    assert told.success_from == "dones"
    # The name may be that of an environment's infos.
    other = load_robomimic(path, Reading(success="is_success"))
    assert (other.successes.tolist(), other.success_from) == (dataset.successes.tolist(), dataset.success_from)


def test_rewards_of_zero_alone_say_nothing(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    demo = random_demo(3, {"flat": 2}) | {"rewards": np.zeros(3)}
    assert load_robomimic(write_robomimic(path, [demo]), DEFAULT_READING).successes.tolist() == [-1]


def test_isaac_labs_files_have_success_and_seed_and_no_rewards(
    path: Path, random_demo: RandomDemo, write_robomimic: Write, caplog: pytest.LogCaptureFixture
) -> None:
    demos = [random_demo(3, {"flat": 2}) | {"rewards": None, "dones": None} for _ in range(3)]
    write_robomimic(path, demos, env_args={"env_name": "Isaac-Stack-Cube-Franka-v0", "type": 2})
    with h5py.File(path, "r+") as file:
        file["data/demo_0"].attrs.update({"success": True, "seed": 7})
        file["data/demo_1"].attrs["success"] = np.bool_(False)
    with caplog.at_level(logging.WARNING):
        dataset = load_robomimic(path, DEFAULT_READING)
    assert dataset.tasks == ("Isaac-Stack-Cube-Franka-v0",)
    assert (dataset.successes.tolist(), dataset.seeds.tolist()) == ([1, 0, -1], [-1, -1, -1])
    assert not dataset.rewards.any()
    load_robomimic(path, DEFAULT_READING)
    assert caplog.text.count("no rewards: they are 0") == 1, "however often the data are read"


def test_an_instruction_names_the_task_and_is_its_text(
    tmp_path: Path, random_demo: RandomDemo, write_robomimic: Write
) -> None:
    scene = {"env_name": "Libero_Kitchen_Tabletop_Manipulation", "type": 1, "env_kwargs": {}}
    for number, text in enumerate(("turn on the stove", "Put the bowl on the plate.")):
        info = json.dumps({"language_instruction": text})
        demos = [random_demo(3, {"flat": 2})]
        write_robomimic(tmp_path / f"{number}.hdf5", demos, env_args=scene, problem_info=info)
    dataset = load_dataset(tmp_path)
    assert dataset.tasks == ("turn-on-the-stove", "put-the-bowl-on-the-plate")
    assert dataset.texts == ("turn on the stove", "Put the bowl on the plate.")
    write_robomimic(tmp_path / "casa.hdf5", demos, env_args=scene | {"env_kwargs": {"env_lang": "open the door"}})
    dataset = load_robomimic(tmp_path / "casa.hdf5", DEFAULT_READING)
    assert (dataset.tasks, dataset.texts) == (("open-the-door",), ("open the door",))


def test_without_a_name_the_file_names_the_task(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    write_robomimic(path, [random_demo(3, {"flat": 2})], env_args=None)
    assert load_dataset(path).tasks == ("low_dim_v141",)


def damage(file: h5py.File, name: str, values: Any) -> None:
    del file[name]
    file[name] = values


DAMAGES: dict[str, tuple[Callable[[h5py.File], object], str, str]] = {
    "no obs": (lambda f: f.pop("data/demo_1/obs"), "data/demo_1/obs", "missing"),
    "no actions": (lambda f: f.pop("data/demo_1/actions"), "data/demo_1/actions", "missing"),
    "a key in one episode alone": (lambda f: f.pop("data/demo_1/obs/flat"), "data/demo_1/obs/flat", "no such"),
    "short actions": (
        lambda f: damage(f, "data/demo_1/actions", np.zeros((2, 7))),
        "actions of data/demo_1",
        "unequal",
    ),
    "cut off episode": (
        lambda f: f["data/demo_1"].attrs.update(num_samples=4),
        "obs of data/demo_1",
        "unequal lengths",
    ),
    "no rewards in one episode": (lambda f: f.pop("data/demo_1/rewards"), "data/demo_1/rewards", "missing"),
    "no next_obs in one episode": (lambda f: f.pop("data/demo_1/next_obs"), "data/demo_1/next_obs", "missing"),
    "short rewards": (lambda f: damage(f, "data/demo_1/rewards", np.zeros(2)), "rewards of data/demo_1", "unequal"),
    "short next_obs": (
        lambda f: damage(f, "data/demo_1/next_obs/flat", np.zeros((2, 2))),
        "next_obs of data/demo_1",
        "unequal",
    ),
    "wide actions": (lambda f: damage(f, "data/demo_1/actions", np.zeros((3, 8))), "actions", "don't fit"),
    "NaN": (lambda f: damage(f, "data/demo_1/obs/flat", np.full((3, 2), np.nan)), "data/demo_1/obs/flat", "NaN"),
    "text": (lambda f: damage(f, "data/demo_1/actions", ["a"] * 3), "data/demo_1/actions", "not an array"),
    "flags": (lambda f: damage(f, "data/demo_1/dones", [0, 2, 1]), "data/demo_1/dones", "wrong flags"),
    "env_args": (lambda f: f["data"].attrs.update(env_args="{"), "env_args of data", "damaged"),
    "env_args list": (lambda f: f["data"].attrs.update(env_args="[1]"), "env_args of data", "damaged"),
    "env_name": (lambda f: f["data"].attrs.update(env_args='{"env_name": 3}'), "env_args.env_name of data", "name"),
    "a link out": (
        lambda f: damage(f, "data/demo_1", h5py.ExternalLink("x.hdf5", "/data/demo_1")),
        "data/demo_1",
        "not followed",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(path: Path, random_demo: RandomDemo, write_robomimic: Write, kind: str) -> None:
    change, field, problem = DAMAGES[kind]
    write_robomimic(path, [random_demo(3, {"flat": 2}) for _ in range(3)])
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(InputError, match=problem) as caught:
        load_dataset(path)
    assert caught.value.path == str(path)
    assert str(caught.value.field).startswith(field)


def test_a_file_that_is_cut_off_is_named(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    write_robomimic(path, [random_demo(30, {"flat": 20})])
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match="cut off"):
        load_robomimic(path, DEFAULT_READING)


def test_only_robomimics_files_are_recognised(path: Path, random_demo: RandomDemo, write_robomimic: Write) -> None:
    assert is_robomimic(write_robomimic(path, [random_demo(3, {"flat": 2})]))
    for content in ({"observations": np.zeros((3, 2))}, {"data/episode_0": np.zeros(3)}, {"data": np.zeros(3)}):
        with h5py.File(path, "w") as file:
            for name, values in content.items():
                file[name] = values
        assert not is_robomimic(path)
        with pytest.raises(InputError, match=r"no episode|not a group"):
            load_robomimic(path, DEFAULT_READING)
    path.write_text("no HDF5")
    assert not is_robomimic(path)
