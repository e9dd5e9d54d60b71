"""LeRobot's data sets of versions 2 and 3: what is read of them, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdpd.data import load_dataset
from llmdpd.data.lerobot import load_lerobot
from llmdpd.data.parquet import read_table
from llmdpd.errors import InputError
from llmdpd.tasks.base import DEFAULT_READING, Reading

Recording = dict[str, Any]
Record = Callable[..., Recording]
Write = Callable[..., Path]
TEXTS = ("Push the T-shaped block onto the target.", "Put the red cube in the box.")
DATA = {"v2.1": "data/chunk-000/episode_000000.parquet", "v3.0": "data/chunk-000/file-000.parquet"}
VERSIONS = pytest.mark.parametrize("version", list(DATA))


def check_same(dataset: Any, recordings: list[Recording]) -> None:
    """The data set holds these recordings, each without its last step, whose next observation is not known."""
    assert dataset.lengths.tolist() == [len(each["action"]) - 1 for each in recordings]
    for e, each in enumerate(recordings):
        rows = slice(dataset.offsets[e], dataset.offsets[e + 1])
        np.testing.assert_array_equal(dataset.observations[rows], each["observation.state"][:-1])
        np.testing.assert_array_equal(dataset.next_observations[rows], each["observation.state"][1:])
        np.testing.assert_array_equal(dataset.actions[rows], each["action"][:-1])
        assert dataset.texts[dataset.task_ids[e]] == each["task"]


@pytest.mark.parametrize("version", ["v2.0", *DATA])
def test_a_robots_log_is_read_as_it_was_written(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    recordings = [random_recording(steps, TEXTS[number % 2]) for number, steps in enumerate((4, 2, 9, 3, 5))]
    dataset = load_dataset(write_lerobot(tmp_path / "log", recordings, version=version))
    check_same(dataset, recordings)
    assert (dataset.state_dim, dataset.action_dim) == (20, 7)
    assert dataset.tasks == ("push-the-t-shaped-block-onto-the-target", "put-the-red-cube-in-the-box")
    assert dataset.texts == TEXTS
    assert set(dataset.successes.tolist()) == {-1}
    assert not dataset.terminals.any()
    assert not dataset.rewards.any()
    assert "no column next.reward" in caplog.text
    assert (dataset.environments, dataset.success_from) == (("so101_follower at 30 fps",) * 2, "")
    one = load_dataset(tmp_path, tasks=["put-the-red-cube-in-the-box"])
    assert one.lengths.tolist() == [1, 2]


@VERSIONS
def test_rewards_ends_and_successes(
    tmp_path: Path,
    random_recording: Record,
    write_lerobot: Write,
    rng: np.random.Generator,
    version: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flags = ([0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1])
    recordings = [
        random_recording(
            4,
            TEXTS[0],
            **{
                "next.reward": rng.normal(size=4).astype(np.float32),
                "next.done": np.array([0, 0, 0, 1], np.bool_),
                "next.success": np.array(values, np.bool_),
                "reached": np.array([0, 1, 0, 0], np.bool_),
            },
        )
        for values in flags
    ]
    write_lerobot(tmp_path, recordings, version=version)
    dataset = load_dataset(tmp_path)
    check_same(dataset, recordings)
    assert dataset.success_from == "next.success"
    np.testing.assert_array_equal(dataset.rewards, np.concatenate([each["next.reward"][:-1] for each in recordings]))
    # The last success is in the step that is left out.
    assert (dataset.successes.tolist(), dataset.success_steps.tolist()) == ([1, 0, 1], [2, -1, -1])
    assert not dataset.terminals.any()
    told = load_dataset(tmp_path, reading=Reading(success="reached"))
    assert (told.successes.tolist(), told.success_steps.tolist()) == ([1, 1, 1], [1, 1, 1])
    # The name may be that of an environment's infos.
    told = load_dataset(tmp_path, reading=Reading(success="is_success"))
    assert (told.successes.tolist(), told.success_from) == ([1, 0, 1], "next.success")
    assert "no is_success in the data; next.success says" in caplog.text


def test_columns_are_chosen(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, rng: np.random.Generator
) -> None:
    extra = {
        "observation.environment_state": rng.normal(size=(6, 3)),
        "observation.force": rng.normal(size=6),
        "action.delta": rng.normal(size=(6, 2)).astype(np.float32),
    }
    recording = random_recording(6, TEXTS[0], **extra)
    write_lerobot(tmp_path, [recording])
    parts = [recording["observation.state"], extra["observation.environment_state"]]
    wanted = np.concatenate(parts, axis=1).astype(np.float32)
    np.testing.assert_array_equal(load_dataset(tmp_path).observations, wanted[:-1])
    reading = Reading(observation=("observation.force", "observation.environment_state"), action="action.delta")
    dataset = load_dataset(tmp_path, reading=reading)
    np.testing.assert_array_equal(dataset.observations[:, 0], extra["observation.force"][:-1].astype(np.float32))
    assert dataset.state_dim == 4
    np.testing.assert_array_equal(dataset.actions, extra["action.delta"][:-1])
    for key, problem in (("observation.images.top", "can't be read"), ("observation.stat", "no such column")):
        with pytest.raises(InputError, match=problem) as caught:
            load_dataset(tmp_path, reading=Reading(observation=(key,)))
        assert caught.value.field == f"features.{key}"
        assert caught.value.path == str(tmp_path / "meta/info.json")
    assert "observation.state" in str(caught.value.hint)


@pytest.mark.parametrize(("missing", "choice"), [("observation.state", "`observation`"), ("action", "`action`")])
def test_what_is_missing_is_asked_for(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, missing: str, choice: str
) -> None:
    recording = random_recording(4, TEXTS[0])
    write_lerobot(tmp_path, [recording | {missing.replace(".", "_") + "s": recording[missing]}])
    change_info(tmp_path, lambda info: info["features"].pop(missing))
    with pytest.raises(InputError, match=f"no column {missing}") as caught:
        load_dataset(tmp_path)
    assert choice in str(caught.value)
    assert "observation.images.top [480, 640, 3]" in str(caught.value.found)


@VERSIONS
def test_names_of_tasks(tmp_path: Path, random_recording: Record, write_lerobot: Write, version: str) -> None:
    # Not every line separator of Unicode is one of JSON's.
    texts = ["Pick the cube", "pick the cube!", "把杯子放下", "", "w" * 70, "a\u2028" * 50 + "end"]
    write_lerobot(tmp_path, [random_recording(3, text) for text in texts], version=version)
    dataset = load_dataset(tmp_path)
    assert dataset.texts == tuple(texts)
    assert dataset.tasks[:5] == ("pick-the-cube-0", "pick-the-cube-1", "把杯子放下", "task-3", "w" * 60)
    assert dataset.tasks[5] == "-".join("a" * 30)


def test_two_indices_of_one_text_are_one_task(tmp_path: Path, random_recording: Record, write_lerobot: Write) -> None:
    write_lerobot(tmp_path, [random_recording(3, text) for text in ("a", "b", "a")], version="v2.1")
    rows = [json.dumps({"task_index": index, "task": "push it"}) for index in (0, 1)]
    (tmp_path / "meta/tasks.jsonl").write_text("\n".join(rows))
    assert load_dataset(tmp_path).tasks == ("push-it",)


@pytest.mark.parametrize("kind", ["list", "large list", "float64", "chunked"])
def test_any_type_of_lists_is_read(tmp_path: Path, random_recording: Record, write_lerobot: Write, kind: str) -> None:
    recordings = [random_recording(steps, TEXTS[0]) for steps in (5, 3)]
    path = write_lerobot(tmp_path, recordings) / DATA["v3.0"]
    table = pq.read_table(path)
    inner = pa.float64() if kind == "float64" else pa.float32()
    kinds = {"list": pa.list_(inner), "large list": pa.large_list(inner)}
    for name in ("observation.state", "action"):
        column = table.column(name).cast(kinds.get(kind, pa.list_(inner)))
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path, row_group_size=2 if kind == "chunked" else None)
    check_same(load_dataset(tmp_path), recordings)


def test_data_may_be_links_as_in_the_hubs_cache(tmp_path: Path, random_recording: Record, write_lerobot: Write) -> None:
    recordings = [random_recording(4, TEXTS[0])]
    path = write_lerobot(tmp_path / "snapshot", recordings) / DATA["v3.0"]
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    check_same(load_dataset(tmp_path / "snapshot"), recordings)


@VERSIONS
def test_a_split_chooses_episodes(tmp_path: Path, random_recording: Record, write_lerobot: Write, version: str) -> None:
    recordings = [random_recording(steps, TEXTS[0]) for steps in range(2, 8)]
    write_lerobot(
        tmp_path, recordings, version=version, splits={"train": "0:3", "test": "3:6", "bad": "all", "past": "9:10"}
    )
    # What is not requested is not read.
    (tmp_path / DATA[version]).write_bytes(b"broken")
    dataset = load_dataset(tmp_path, reading=Reading(part="test"))
    check_same(dataset, recordings[3:])
    for part, problem in (("valid", "no such split"), ("bad", "no such split"), ("past", "no episode")):
        with pytest.raises(InputError, match=problem):
            load_dataset(tmp_path, reading=Reading(part=part))


def change_info(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        (lambda info: info.update(codebase_version="v1.6"), "codebase_version", "this version"),
        (lambda info: info.update(codebase_version="v4.0"), "codebase_version", "this version"),
        (lambda info: info.update(codebase_version=3), "codebase_version", "this version"),
        (lambda info: info.pop("features"), "features", "damaged"),
        (lambda info: info["features"].update(action=3), "features.action", "damaged"),
        (lambda info: info["features"]["action"].pop("shape"), "features.action", "damaged"),
        (lambda info: info["features"]["action"].update(shape=[8]), "action", "wrong width"),
        (lambda info: info["features"]["action"].update(dtype="string"), "features.action", "can't be read"),
        *[
            (lambda info, width=width: info["features"]["action"].update(shape=[width]), "features.action", "can't be")
            for width in (True, -1, 0, 2**64, 10**30, 1.0)
        ],
        (lambda info: info.update(data_path="a" * 300), None, "cannot be read"),
        (lambda info: info.update(total_episodes=4), "total_episodes", "disagree"),
        (lambda info: info.update(total_frames=99), "total_frames", "disagree"),
        (lambda info: info.update(total_frames="9"), "total_frames", "damaged"),
        (lambda info: info.update(data_path=3), "data_path", "damaged"),
        (lambda info: info.update(data_path="../{chunk_index}/{episode_index}"), "data_path", "wrong path"),
        (lambda info: info.update(data_path="/data/a.parquet"), "data_path", "wrong path"),
        (lambda info: info.update(data_path="data/{nothing:03d}.parquet"), "data_path", "wrong path"),
    ],
)
@VERSIONS
def test_wrong_metadata_are_named(
    tmp_path: Path,
    random_recording: Record,
    write_lerobot: Write,
    version: str,
    change: Callable[[dict[str, Any]], object],
    field: str,
    problem: str,
) -> None:
    write_lerobot(tmp_path, [random_recording(4, TEXTS[0]) for _ in range(3)], version=version)
    change_info(tmp_path, change)
    with pytest.raises(InputError, match=problem) as caught:
        load_dataset(tmp_path)
    assert caught.value.field == field
    assert str(tmp_path) in str(caught.value.path)


@pytest.mark.parametrize("how", ["missing", "empty", "cut off", "text", "fifo"])
@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("v2.1", "meta/info.json"),
        ("v2.1", "meta/tasks.jsonl"),
        ("v2.1", "meta/episodes.jsonl"),
        ("v2.1", "data/chunk-000/episode_000001.parquet"),
        ("v3.0", "meta/info.json"),
        ("v3.0", "meta/tasks.parquet"),
        ("v3.0", "meta/episodes/chunk-000/file-000.parquet"),
        ("v3.0", "data/chunk-000/file-001.parquet"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, version: str, name: str, how: str
) -> None:
    write_lerobot(tmp_path, [random_recording(4, TEXTS[0]) for _ in range(3)], version=version)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how != "missing":
        path.write_bytes({"empty": b"", "cut off": content[: len(content) // 2], "text": b"no such thing"}[how])
    with pytest.raises(InputError) as caught:
        load_dataset(tmp_path)
    named = path.parent.parent if how == "missing" and "episodes/" in name else path
    # An empty list of episodes is whole in itself; the totals don't agree with it.
    assert caught.value.path in (str(named), str(tmp_path / "meta/info.json"))
    assert str(named) in str(caught.value)


def test_a_missing_chunk_is_named(tmp_path: Path, random_recording: Record, write_lerobot: Write) -> None:
    write_lerobot(tmp_path, [random_recording(4, TEXTS[0])])
    shutil.rmtree(tmp_path / "data/chunk-000")
    with pytest.raises(InputError, match="not found") as caught:
        load_dataset(tmp_path)
    assert caught.value.path == str(tmp_path / DATA["v3.0"])


def change_rows(path: Path, change: Callable[[dict[str, list[Any]]], object]) -> None:
    table = pq.read_table(path)
    rows = table.to_pydict()
    change(rows)
    pq.write_table(pa.table(rows), path)


def cut(rows: dict[str, list[Any]]) -> None:
    for values in rows.values():
        values.pop()


ROWS: dict[str, tuple[Callable[[dict[str, list[Any]]], object], str, str]] = {
    "NaN": (lambda rows: rows["action"][1].__setitem__(2, np.nan), "action", r"NaN.*\[1, 2\]"),
    "Inf": (lambda rows: rows["observation.state"][0].__setitem__(0, np.inf), "observation.state", "NaN"),
    "too large": (lambda rows: rows["observation.state"][0].__setitem__(0, 1e300), "observation.state", "NaN"),
    "null": (lambda rows: rows["action"][1].__setitem__(2, None), "action", "missing values"),
    "no list": (lambda rows: rows["action"].__setitem__(1, None), "action", "missing values"),
    "ragged": (lambda rows: rows["action"][1].pop(), "action", "wrong width"),
    "text": (lambda rows: rows.update(action=[["a"] * 7] * 4), "action", "not numbers"),
    "no column": (lambda rows: rows.pop("action"), "action", "column is missing"),
    "no episodes": (lambda rows: rows.pop("episode_index"), "episode_index", "column is missing"),
    "no frames": (lambda rows: rows.pop("frame_index"), "frame_index", "column is missing"),
    "no tasks": (lambda rows: rows.pop("task_index"), "task_index", "column is missing"),
    "fractions": (lambda rows: rows.update(task_index=[0.0] * 4), "task_index", "not whole"),
    "cut off": (cut, "frame_index of episode 0", "steps are missing"),
    "a gap": (lambda rows: rows["frame_index"].__setitem__(2, 3), "frame_index of episode 0", "steps are missing"),
    "another episode": (lambda rows: rows["episode_index"].__setitem__(3, 7), "episode_index", "disagree"),
    "in two places": (lambda rows: rows["episode_index"].__setitem__(1, 7), "episode_index", "two places"),
    "several tasks": (lambda rows: rows["task_index"].__setitem__(1, 1), "task_index of episode 0", "several tasks"),
    "unknown task": (lambda rows: rows.update(task_index=[5] * 4), "task_index of episode 0", "not listed"),
}


@pytest.mark.parametrize("kind", ROWS)
@VERSIONS
def test_wrong_rows_are_named(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, version: str, kind: str
) -> None:
    change, field, problem = ROWS[kind]
    write_lerobot(tmp_path, [random_recording(4, text) for text in TEXTS], version=version, per_file=1)
    change_rows(tmp_path / DATA[version], change)
    with pytest.raises(InputError, match=f"(?s){problem}") as caught:
        load_dataset(tmp_path)
    assert (caught.value.path, caught.value.field) == (str(tmp_path / DATA[version]), field)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows["dataset_to_index"].__setitem__(0, 9), "disagree"),
        (lambda rows: rows["length"].__setitem__(0, 9), "disagree"),
        (lambda rows: rows.pop("episode_index"), "damaged"),
        (lambda rows: rows.pop("data/file_index"), "wrong path"),
        (cut, "disagree"),
    ],
)
def test_wrong_lists_of_episodes_are_named(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, change: Callable[..., object], problem: str
) -> None:
    write_lerobot(tmp_path, [random_recording(4, TEXTS[0]) for _ in range(3)])
    change_rows(tmp_path / "meta/episodes/chunk-000/file-000.parquet", change)
    with pytest.raises(InputError, match=problem) as caught:
        load_dataset(tmp_path)
    assert str(tmp_path / "meta") in str(caught.value.path)


def test_metadata_may_leave_out_the_length(tmp_path: Path, random_recording: Record, write_lerobot: Write) -> None:
    recordings = [random_recording(4, TEXTS[0]) for _ in range(3)]
    write_lerobot(tmp_path, recordings)
    change_rows(tmp_path / "meta/episodes/chunk-000/file-000.parquet", lambda rows: rows.pop("length"))
    check_same(load_dataset(tmp_path), recordings)


@pytest.mark.parametrize(
    ("line", "name", "problem"),
    [
        ("{", "tasks", "line 2"),
        ("[1]", "tasks", "line 2"),
        ('{"task_index": "1", "task": "a"}', "tasks", "row 1"),
        ('{"task_index": 0, "task": "another"}', "tasks", "two texts"),
        ('{"episode_index": 1}', "episodes", "length"),
        ('{"episode_index": -1, "length": 3}', "episodes", "length"),
    ],
)
def test_wrong_lines_are_named(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, line: str, name: str, problem: str
) -> None:
    path = write_lerobot(tmp_path, [random_recording(4, TEXTS[0])], version="v2.1") / f"meta/{name}.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=problem) as caught:
        load_dataset(tmp_path)
    assert caught.value.path == str(path)


def test_recordings_of_one_step_alone_are_refused(
    tmp_path: Path, random_recording: Record, write_lerobot: Write
) -> None:
    write_lerobot(tmp_path, [random_recording(1, TEXTS[0]) for _ in range(2)])
    with pytest.raises(InputError, match=r"(?s)no step with a next observation.*2 episodes of one step"):
        load_lerobot(tmp_path, DEFAULT_READING)


def test_without_pyarrow_it_is_named(
    tmp_path: Path, random_recording: Record, write_lerobot: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lerobot(tmp_path, [random_recording(4, TEXTS[0])])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pyarrow") as caught:
        load_dataset(tmp_path)
    assert "pip install 'llmdpd[lerobot]'" in str(caught.value)


def test_a_small_table_of_many_rows_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": np.zeros(10_000_000)})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, compression="zstd") as writer:
        for _ in range(5):
            writer.write_table(table, row_group_size=10_000_000)
    with pytest.raises(InputError, match="more numbers than such a file can hold"):
        read_table(tmp_path / "a.parquet")
