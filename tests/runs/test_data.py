from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmdpd.config.schema import PRESETS, DataConfig, TaskConfig, TrainConfig
from llmdpd.data import TrajectoryDataset, save_d4rl, save_minari
from llmdpd.errors import InputError
from llmdpd.prompts import metaworld_prompt
from llmdpd.runs.checks import check_values
from llmdpd.runs.data import Embeddings, embed_tasks, example_data, load_tasks, training_data
from llmdpd.tasks import COLLECTION_SEED_END, EVALUATION_SEED_START, SELECTION_SEED_START

MakeData = Callable[..., TrajectoryDataset]


def config_of(seen: tuple[str, ...] = ("reach-v3",), unseen: tuple[str, ...] = (), **data: object) -> TrainConfig:
    tasks = TaskConfig(seen=seen, unseen=unseen)
    return dataclasses.replace(PRESETS["smoke"], tasks=tasks, data=DataConfig(**data))  # type: ignore[arg-type]


def test_tasks_come_in_the_order_asked_for(metaworld_data: MakeData, tmp_path: Path) -> None:
    data = metaworld_data(("push-v3", "reach-v3", "sweep-v3"))
    save_minari(data, tmp_path)
    loaded = load_tasks(tmp_path, ("sweep-v3", "push-v3"), True)
    assert loaded.tasks == ("sweep-v3", "push-v3")
    for task in loaded.tasks:
        one, two = loaded.transitions_of(task), data.transitions_of(task)
        np.testing.assert_array_equal(loaded.observations[one], data.observations[two])


@pytest.mark.parametrize("name", ["reach-v3", "reach-v2", "reach", "d4rl_file", "my-replay-v0"])
def test_a_file_of_one_task_under_any_name(metaworld_data: MakeData, tmp_path: Path, name: str) -> None:
    data = metaworld_data(("reach-v3",))
    save_d4rl(dataclasses.replace(data, tasks=(name,)), tmp_path / "file.hdf5")
    loaded = load_tasks(tmp_path / "file.hdf5", ("reach-v3",), True)
    assert loaded.tasks == ("reach-v3",)
    assert loaded.episodes_of("reach-v3").tolist() == [0, 1, 2]


def test_a_file_of_another_task_is_not_taken(metaworld_data: MakeData, tmp_path: Path) -> None:
    save_d4rl(metaworld_data(("sweep-v3",)), tmp_path / "file.hdf5")
    with pytest.raises(InputError, match="no such task") as error:
        load_tasks(tmp_path / "file.hdf5", ("reach-v3",), True)
    assert "sweep-v3" in str(error.value)


def test_a_file_without_task_for_several(metaworld_data: MakeData, tmp_path: Path) -> None:
    save_d4rl(dataclasses.replace(metaworld_data(("reach-v3",)), tasks=("mine",)), tmp_path / "file.hdf5")
    with pytest.raises(InputError) as error:
        load_tasks(tmp_path / "file.hdf5", ("reach-v3", "push-v3"), True)
    for part in ("'mine'", "reach-v3, push-v3", "reach-v3.hdf5", str(tmp_path / "file.hdf5")):
        assert part in str(error.value)


def test_widths_and_the_goal_are_held_against_the_environment(metaworld_data: MakeData, tmp_path: Path) -> None:
    save_minari(metaworld_data(state_dim=11), tmp_path / "narrow")
    save_minari(metaworld_data(goal_visible=False), tmp_path / "hidden")
    save_minari(metaworld_data(goal_visible=None), tmp_path / "unknown")
    with pytest.raises(InputError, match="11 numbers"):
        load_tasks(tmp_path / "narrow", ("reach-v3",), True)
    with pytest.raises(InputError, match="data: False"):
        load_tasks(tmp_path / "hidden", ("reach-v3",), True)
    assert load_tasks(tmp_path / "hidden", ("reach-v3",), False).goal_visible is False
    assert load_tasks(tmp_path / "unknown", ("reach-v3",), True).goal_visible is None


def test_failed_episodes_are_left_out_unless_asked_for(metaworld_data: MakeData, tmp_path: Path) -> None:
    data = metaworld_data(("reach-v3",), 4)
    successes = np.array([1, 0, -1, 0], np.int8)
    save_minari(dataclasses.replace(data, successes=successes), tmp_path)
    dataset, words = training_data(config_of(path=str(tmp_path)))
    assert dataset.successes.tolist() == [1, -1]
    assert words == f"{tmp_path}, 4 episodes, failed ones left out; clones the expert actions"
    dataset, words = training_data(config_of(path=str(tmp_path), keep_failed=True))
    assert dataset.successes.tolist() == [1, 0, -1, 0]
    assert "left out" not in words


def test_a_fraction_is_of_each_task_and_part_of_a_greater_one(
    metaworld_data: MakeData, tmp_path: Path, rng: np.random.Generator
) -> None:
    seed, tasks = int(rng.integers(1000)), ("reach-v3", "push-v3")
    save_minari(metaworld_data(tasks, 7), tmp_path)
    found = {}
    for share in (1.0, 0.5, 0.3, 0.001):
        dataset, words = training_data(config_of(tasks, path=str(tmp_path), fraction=share, seed=seed))
        per_task = max(1, math.ceil(7 * share))
        assert [len(dataset.episodes_of(task)) for task in tasks] == [per_task] * 2
        assert ("of which" in words) == (share < 1)
        found[share] = set(zip(dataset.task_ids.tolist(), dataset.seeds.tolist(), strict=True))
    assert found[0.001] < found[0.3] < found[0.5] < found[1.0]
    other, _ = training_data(config_of(("push-v3",), path=str(tmp_path), fraction=0.5, seed=seed))
    assert {(1, int(n)) for n in other.seeds} < found[0.5], "other tasks beside it change nothing"
    with pytest.raises(InputError, match=r"data\.fraction"):
        check_values(config_of(tasks, fraction=1.5))


def test_a_task_whose_episodes_all_failed(metaworld_data: MakeData, tmp_path: Path) -> None:
    data = metaworld_data(("reach-v3", "push-v3"), 2)
    save_minari(dataclasses.replace(data, successes=np.array([1, 1, 0, 0], np.int8)), tmp_path)
    with pytest.raises(InputError) as error:
        training_data(config_of(("reach-v3", "push-v3"), path=str(tmp_path)))
    assert error.value.field == "push-v3"
    assert error.value.found == "2 failed episodes"


def test_expert_actions_are_asked_for_where_they_are_cloned(metaworld_data: MakeData, tmp_path: Path) -> None:
    save_minari(metaworld_data(expert=False), tmp_path)
    config = config_of(path=str(tmp_path))
    with pytest.raises(InputError, match="no expert actions"):
        training_data(config)
    executed = dataclasses.replace(config, agent=dataclasses.replace(config.agent, clone="executed"))
    assert training_data(executed)[1].endswith("clones the executed actions")


def test_collected_data_is_found_again_and_shares_no_seed_with_the_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(root=str(tmp_path), episodes=2, prompt_episodes=2, noise="clean:0.5,random:0.5", workers=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, keep_failed=True))
    dataset, words = training_data(config)
    again, _ = training_data(config)
    np.testing.assert_array_equal(dataset.observations, again.observations)
    examples = example_data(config)
    assert "scripted experts, 2 episodes a task, noise clean:0.5,random:0.5" in words
    assert examples.noise_levels.tolist() == [0, 0]
    seeds = {*dataset.seeds.tolist(), *examples.seeds.tolist()}
    assert len(seeds) == 4
    assert max(seeds) < COLLECTION_SEED_END <= EVALUATION_SEED_START < SELECTION_SEED_START
    assert len(list(tmp_path.iterdir())) == 2
    output = capsys.readouterr().out
    assert output.count("\ntraining data: 2 episodes") == 2
    assert "\nexample data: 2 episodes" in output


def test_collected_episodes_go_on_after_their_success_as_long_as_asked(tmp_path: Path) -> None:
    lengths = {}
    for tail in (0, 3):
        config = config_of(root=str(tmp_path), episodes=2, prompt_episodes=2, noise="clean", workers=1, tail=tail)
        data = [training_data(config)[0], example_data(config)]
        assert all((part.successes == 1).all() for part in data)
        lengths[tail] = np.concatenate([part.lengths for part in data])
    np.testing.assert_array_equal(lengths[3], lengths[0] + 3)


def test_texts_are_embedded_by_their_wording(cache_home: Path) -> None:
    config = config_of()
    texts = embed_tasks(config, ("reach-v3", "push-v3"))
    vectors, width = texts.vectors, texts.width
    assert texts.llm is not None
    assert (texts.llm.model, texts.llm.dtype) == ("minilm", "float32")
    assert texts.llm.revision.startswith("sha256:")
    assert list(vectors) == [metaworld_prompt(task).render() for task in ("reach-v3", "push-v3")]
    assert all(vector.shape == (width,) for vector in vectors.values())
    assert not torch.equal(*vectors.values())
    context = dataclasses.replace(config.policy.context, text=False)
    silent = dataclasses.replace(config, policy=dataclasses.replace(config.policy, context=context))
    assert embed_tasks(silent, ("reach-v3",)) == Embeddings({}, 0, None)
