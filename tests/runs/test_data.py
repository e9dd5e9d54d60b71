from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from llmdpd.config.presets import PRESETS
from llmdpd.data import TrajectoryDataset, save_d4rl, save_minari
from llmdpd.data.collecting import scripted
from llmdpd.data.collecting.scripted import CollectConfig, Collected, content_hash
from llmdpd.data.config import DataConfig
from llmdpd.data.task_data import load_tasks
from llmdpd.errors import InputError
from llmdpd.prompts import metaworld_prompt
from llmdpd.runs import data as run_data
from llmdpd.runs.data import Embeddings, demonstrations, embed_texts, training_data
from llmdpd.tasks import COLLECTION_SEED_END, EVALUATION_SEED_START, SELECTION_SEED_START
from llmdpd.tasks.protocols import TaskConfig

MakeData = Callable[..., TrajectoryDataset]


def tasks_of(*seen: str) -> TaskConfig:
    return TaskConfig(seen=seen or ("reach-v3",), unseen=())


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
    save_d4rl(dataclasses.replace(metaworld_data(("reach-v3",)), tasks=(name,)), tmp_path / "file.hdf5")
    loaded = load_tasks(tmp_path / "file.hdf5", ("reach-v3",), True)
    assert loaded.tasks == ("reach-v3",)
    assert loaded.episodes_of("reach-v3").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "name", "asked", "parts"),
    [
        ({}, "sweep-v3", ("reach-v3",), ["no such task", "sweep-v3"]),
        ({}, "mine", ("reach-v3", "push-v3"), ["'mine'", "reach-v3, push-v3", "reach-v3.hdf5", "file.hdf5"]),
        ({"state_dim": 11}, "reach-v3", ("reach-v3",), ["11 numbers"]),
    ],
)
def test_data_that_do_not_fit_the_tasks(
    changes: dict[str, int],
    name: str,
    asked: tuple[str, ...],
    parts: list[str],
    metaworld_data: MakeData,
    tmp_path: Path,
) -> None:
    save_d4rl(dataclasses.replace(metaworld_data(("reach-v3",), **changes), tasks=(name,)), tmp_path / "file.hdf5")
    with pytest.raises(InputError) as error:
        load_tasks(tmp_path / "file.hdf5", asked, True)
    for part in parts:
        assert part in str(error.value)


def test_the_goal_is_visible_in_both_or_hidden_in_both(metaworld_data: MakeData, tmp_path: Path) -> None:
    save_minari(metaworld_data(goal_visible=False), tmp_path / "hidden")
    save_minari(metaworld_data(goal_visible=None), tmp_path / "unknown")
    with pytest.raises(InputError, match="data: False"):
        load_tasks(tmp_path / "hidden", ("reach-v3",), True)
    assert load_tasks(tmp_path / "hidden", ("reach-v3",), False).goal_visible is False
    # Where the data set does not say it, its observations do.
    assert load_tasks(tmp_path / "unknown", ("reach-v3",), True).goal_visible is True
    with pytest.raises(InputError, match="data: True"):
        load_tasks(tmp_path / "unknown", ("reach-v3",), False)


def test_failed_episodes_are_left_out_unless_asked_for(metaworld_data: MakeData, tmp_path: Path) -> None:
    data = metaworld_data(("reach-v3",), 4)
    save_minari(dataclasses.replace(data, successes=np.array([1, 0, -1, 0], np.int8)), tmp_path)
    dataset, words = training_data(DataConfig(path=str(tmp_path)), tasks_of())
    assert dataset.successes.tolist() == [1, -1]
    assert words == f"{tmp_path}, 4 episodes, failed ones left out"
    dataset, words = training_data(DataConfig(path=str(tmp_path), keep_failed=True), tasks_of())
    assert dataset.successes.tolist() == [1, 0, -1, 0]
    assert "left out" not in words


def test_a_fraction_is_of_each_task_and_part_of_a_greater_one(
    metaworld_data: MakeData, tmp_path: Path, rng: np.random.Generator
) -> None:
    tasks, whole = ("reach-v3", "push-v3"), DataConfig(path=str(tmp_path), seed=int(rng.integers(1000)))
    save_minari(metaworld_data(tasks, 7), tmp_path)
    found = {}
    for share in (1.0, 0.5, 0.3, 0.001):
        dataset, words = training_data(dataclasses.replace(whole, fraction=share), tasks_of(*tasks))
        assert [len(dataset.episodes_of(task)) for task in tasks] == [max(1, math.ceil(7 * share))] * 2
        assert ("of which" in words) == (share < 1)
        found[share] = set(zip(dataset.task_ids.tolist(), dataset.seeds.tolist(), strict=True))
    assert found[0.001] < found[0.3] < found[0.5] < found[1.0]
    other, _ = training_data(dataclasses.replace(whole, fraction=0.5), tasks_of("push-v3"))
    assert {(1, int(n)) for n in other.seeds} < found[0.5], "other tasks beside it change nothing"


def test_a_task_whose_episodes_all_failed(metaworld_data: MakeData, tmp_path: Path) -> None:
    data = metaworld_data(("reach-v3", "push-v3"), 2)
    save_minari(dataclasses.replace(data, successes=np.array([1, 1, 0, 0], np.int8)), tmp_path)
    with pytest.raises(InputError) as error:
        training_data(DataConfig(path=str(tmp_path)), tasks_of("reach-v3", "push-v3"))
    assert (error.value.field, error.value.found) == ("push-v3", "2 failed episodes")


@pytest.mark.parametrize("preset", ["smoke", "metaworld-trajectory-diffusion"])
def test_expert_actions_are_asked_for_where_they_are_cloned(metaworld_data: MakeData, preset: str) -> None:
    data, method = metaworld_data(expert=False), PRESETS[preset].method
    with pytest.raises(InputError, match="no expert actions") as error:
        method.use_of(data)
    assert error.value.hint == "use --method.clone executed"
    assert dataclasses.replace(method, clone="executed").use_of(data) == "clones the executed actions"


def test_collected_data_is_found_again_and_shares_no_seed_with_the_demonstrations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"episodes": 2, "demonstration_episodes": 2, "workers": 1}
    data = DataConfig(root=str(tmp_path), noise="clean:0.5,random:0.5", keep_failed=True, **counts)
    dataset, words = training_data(data, tasks_of())
    again, _ = training_data(data, tasks_of())
    np.testing.assert_array_equal(dataset.observations, again.observations)
    shown = demonstrations(data, tasks_of())
    assert "scripted experts, 2 episodes a task, noise clean:0.5,random:0.5" in words
    assert shown.noise_levels.tolist() == [0, 0]
    seeds = {*dataset.seeds.tolist(), *shown.seeds.tolist()}
    assert len(seeds) == 4
    assert max(seeds) < COLLECTION_SEED_END <= EVALUATION_SEED_START < SELECTION_SEED_START
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["example", "training"]
    output = capsys.readouterr().out
    assert output.count("\ntraining data: 2 episodes") == 2
    assert "\ndemonstrations: 2 episodes" in output


def test_collected_episodes_go_on_after_their_success_as_long_as_asked(tmp_path: Path) -> None:
    lengths = {}
    for steps in (0, 3):
        counts = {"episodes": 2, "demonstration_episodes": 2, "workers": 1, "post_success_steps": steps}
        data = DataConfig(root=str(tmp_path), noise="clean", **counts)
        parts = [training_data(data, tasks_of())[0], demonstrations(data, tasks_of())]
        assert all((part.successes == 1).all() for part in parts)
        lengths[steps] = np.concatenate([part.lengths for part in parts])
    np.testing.assert_array_equal(lengths[3], lengths[0] + 3)


def test_texts_are_embedded_by_their_wording(cache_home: Path) -> None:
    texts = embed_texts("minilm", "cpu", ("reach-v3", "push-v3"))
    assert texts.llm is not None
    assert (texts.llm.model, texts.llm.dtype) == ("minilm", "float32")
    assert texts.llm.revision.startswith("sha256:")
    assert list(texts.vectors) == [metaworld_prompt(task).render() for task in ("reach-v3", "push-v3")]
    assert all(vector.shape == (texts.width,) for vector in texts.vectors.values())
    assert not torch.equal(*texts.vectors.values())
    assert embed_texts("minilm", "cpu", ()) == Embeddings({}, 0, None)


def test_a_task_is_collected_once_for_all_runs_that_want_it(tmp_path: Path, fresh_seed: int) -> None:
    def data(root: str, **changes: object) -> DataConfig:
        config = DataConfig(root=str(tmp_path / root), episodes=2, noise="clean", seed=fresh_seed, workers=1)
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]

    def collected(root: str, *seen: str, **changes: object) -> TrajectoryDataset:
        return training_data(data(root, **changes), tasks_of(*seen))[0]

    def tasks_in(root: str) -> list[str]:
        manifests = (json.loads(file.read_text()) for file in (tmp_path / root).glob("*/collect.json"))
        return sorted(task for manifest in manifests for task in manifest["config"]["tasks"])

    collected("shared", "reach-v3", "drawer-close-v3")
    collected("shared", "button-press-v3", "reach-v3")
    assert tasks_in("shared") == ["button-press-v3", "drawer-close-v3", "reach-v3"], "each task once"
    order = ("button-press-v3", "drawer-close-v3", "reach-v3")
    whole = collected("shared", *order)
    assert tasks_in("shared") == ["button-press-v3", "drawer-close-v3", "reach-v3"], "nothing was left to collect"
    alone = collected("alone", *order)
    assert whole.tasks == alone.tasks == order
    assert content_hash(whole) == content_hash(alone)
    assert whole.success_steps.tolist() == alone.success_steps.tolist()
    collected("shared", "reach-v3", episodes=3)
    assert tasks_in("shared").count("reach-v3") == 2, "other settings are another collection"


@pytest.mark.parametrize("damage", ["content", "json", "steps"])
def test_a_collection_that_is_damaged_is_no_source_for_another(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(root=str(tmp_path), episodes=1, noise="clean", workers=1)
    training_data(config, tasks_of("reach-v3", "drawer-close-v3"))
    manifest = next(tmp_path.glob("*/collect.json"))
    if damage == "content":
        manifest.write_text(manifest.read_text().replace('"content": "', '"content": "0'))
    elif damage == "json":
        manifest.write_text(manifest.read_text()[:100])
    else:  # as a collection of version 0.1, which the hash of the content does not tell
        for path in manifest.parent.rglob("*.hdf5"):
            with h5py.File(path, "r+") as file:
                for episode in file.values():
                    del episode.attrs["success_step"]
    data, _ = training_data(config, tasks_of("reach-v3"))
    assert len(list(tmp_path.glob("*/collect.json"))) == 2, "collected anew"
    assert (data.success_steps >= 0).all()
    assert ("left out" in caplog.text) == (damage != "steps")


def test_what_a_killed_run_collected_is_used_by_others_and_removed_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(root=str(tmp_path / "shared"), episodes=2, noise="clean", workers=1)

    def collected(*tasks: str, stop_after: int | None = None, **changes: object) -> list[str]:
        """The names of the tasks of which episodes were made."""
        made: list[str] = []
        run = scripted.map_unordered

        def noted(factory: str, arguments: Any, method: str, items: Any, **options: Any) -> Iterator[Any]:
            for number, done in enumerate(run(factory, arguments, method, items, **options)):
                if number == stop_after:
                    raise KeyboardInterrupt
                made.append(items[done[0]][0].task)
                yield done

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(scripted, "map_unordered", noted)
            training_data(dataclasses.replace(config, **changes), tasks_of(*tasks))  # type: ignore[arg-type]
        return sorted(made)

    def unfinished() -> int:
        return len(list((tmp_path / "shared").glob("*.partial")))

    one, two, three = "drawer-close-v3", "reach-v3", "button-press-v3"
    assert collected(one, two, stop_after=3) == [one, one, two]
    assert unfinished() == 1
    assert collected(two, three, stop_after=0, episodes=3) == [], "other settings take nothing"
    assert collected(two, three) == [three, three, two], "an episode of it was there"
    assert unfinished() == 2, "one task is wanted by whoever goes on"
    assert collected(one) == [], "both were there"
    assert unfinished() == 1
    elsewhere = dataclasses.replace(config, root=str(tmp_path / "alone"))
    alone, shared = (training_data(each, tasks_of(one, two, three))[0] for each in (elsewhere, config))
    assert content_hash(shared) == content_hash(alone)


def test_a_lock_that_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks = []
    collect = run_data.collect_scripted

    def noted(config: CollectConfig, progress: Callable[..., None]) -> Collected:
        locks.extend(tmp_path.glob(".*0tasks*.lock"))
        return collect(config, progress)

    monkeypatch.setattr(run_data, "collect_scripted", noted)
    config = DataConfig(root=str(tmp_path), episodes=1, noise="clean", workers=1)
    training_data(config, tasks_of("reach-v3"))
    (lock,) = locks
    assert not lock.exists()
    lock.touch()
    training_data(config, tasks_of("reach-v3"))
    assert not lock.exists()


def test_of_runs_that_start_together_one_collects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    collect = run_data.collect_scripted

    def slowly(config: CollectConfig, progress: Callable[..., None]) -> Collected:
        calls.append(config.tasks)
        time.sleep(0.5)
        return collect(config, progress)

    monkeypatch.setattr(run_data, "collect_scripted", slowly)
    config = DataConfig(root=str(tmp_path), episodes=1, noise="clean", workers=1)
    orders = (("reach-v3", "drawer-close-v3"), ("drawer-close-v3", "reach-v3"))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda tasks: training_data(config, tasks_of(*tasks))[0], orders))
    assert len(calls) == 1
    assert [data.tasks for data in found] == list(orders)
