"""The evaluation command: prompts from any file that can be read, results where they are asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmdpd.cli.evaluate import main
from llmdpd.data import TrajectoryDataset, load_dataset, save_d4rl, save_minari
from llmdpd.evaluation.results import read_results, wilson_interval
from llmdpd.runs.folder import RunFolder

MakeData = Callable[..., TrajectoryDataset]
FAST = ("--max-steps", 6, "--workers", 1, "--threads", 1)


@pytest.fixture
def evaluate(cache_home: Path, torch_settings: None) -> Callable[..., int]:
    return lambda *words: main([str(word) for word in (*FAST, *words)])


def save_mtdiff(data: TrajectoryDataset, path: Path) -> Path:
    """One episode a dict, as MTDiff's files are."""
    records = np.empty(data.num_episodes, object)
    for e in range(data.num_episodes):
        rows = slice(int(data.offsets[e]), int(data.offsets[e + 1]))
        terminals = np.zeros((rows.stop - rows.start, 1), np.float32)
        terminals[-1] = 1
        records[e] = {
            "observations": data.observations[rows],
            "actions": data.actions[rows],
            "rewards": data.rewards[rows, None],
            "next_observations": data.next_observations[rows],
            "terminals": terminals,
            "task": np.array([data.tasks[data.task_ids[e]].replace("-v3", "-v2")]),
        }
    np.save(path, records, allow_pickle=True)
    return path


def save(data: TrajectoryDataset, kind: str, folder: Path) -> Path:
    """The data in a file of this kind, and its path."""
    folder.mkdir()
    if kind == "minari":
        save_minari(data, folder)
        return folder
    if kind == "mtdiff":
        return save_mtdiff(data, folder / "replay.npy")
    if kind == "hdf5 folder":
        for task in data.tasks:
            save_d4rl(data.select_tasks([task]), folder / f"{task}.hdf5")
        return folder
    return save_d4rl(dataclasses.replace(data, tasks=("some-replay",)), folder / "replay.hdf5")


def test_all_tasks_of_the_run_by_default(run_copy: Path, cache_home: Path, torch_settings: None) -> None:
    before = read_results(run_copy / "results.json")
    assert main([str(run_copy), "--episodes", "3", "--workers", "1", "--threads", "1"]) == 0
    value = json.loads((run_copy / "results.json").read_text())
    assert value["schema"] == 2
    assert [(r["task"], r["checkpoint"]) for r in value["records"]] == [(r.task, r.checkpoint) for r in before]
    for record in value["records"]:
        assert record["episodes"] == 3
        assert record["max_steps"] == 15, "the run's own"
        assert record["success_rate"] == record["successes"] / 3
        assert record["ci95"] == pytest.approx(wilson_interval(record["successes"], 3))
        assert record["prompts"] == {"text": "built in", "trajectory": str(run_copy / "prompt_data")}


def test_tasks_that_were_trained_on_may_have_a_number_of_episodes_of_their_own(
    run_copy: Path, cache_home: Path, torch_settings: None
) -> None:
    def results(episodes: int, seen: int) -> bytes:
        counts = ("--episodes", str(episodes), "--seen-episodes", str(seen))
        assert main([str(run_copy), "--workers", "1", "--threads", "1", *counts]) == 0
        return (run_copy / "results.json").read_bytes()

    before = results(2, 3)
    counts = {record.split: record.episodes for record in read_results(run_copy / "results.json")}
    assert counts == {"seen": 3, "unseen": 2}
    assert results(4, 2) == before, "fewer of one split than there are"
    assert results(2, 4) != before


@pytest.mark.parametrize(
    "option",
    [("--noise-scale", 0.5), ("--tasks", "reach"), ("--checkpoint", "best"), ("--max-steps", 16), ("--episodes", 1)],
)
def test_another_evaluation_than_the_runs_own_gets_a_file_of_its_own(
    option: tuple[Any, ...],
    run_copy: Path,
    cache_home: Path,
    torch_settings: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (run_copy / "results.json").read_bytes()
    words = [run_copy, "--episodes", 2, "--workers", 1, "--threads", 1, *option]
    assert main([str(word) for word in words]) == 0
    assert (run_copy / "results.json").read_bytes() == before
    (out,) = (run_copy / "evaluations").iterdir()
    assert str(out) in capsys.readouterr().out
    assert {r.episodes for r in read_results(out)} == {1 if "--episodes" in option else 2}


def test_the_runs_own_results_come_with_a_new_report_and_not_while_it_trains(
    run_copy: Path, cache_home: Path, torch_settings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run_copy), "--episodes", "3", "--workers", "1"]
    before = (run_copy / "report.html").read_bytes()
    with RunFolder(run_copy).lock():
        assert main(words) == 2
    assert "another process is at work in this run" in capsys.readouterr().err
    assert (run_copy / "report.html").read_bytes() == before
    assert main(words) == 0
    assert "evaluated for 3 episodes" in (run_copy / "report.html").read_text()


def test_films_are_of_what_was_evaluated_and_never_replace_the_runs(
    run_copy: Path, tmp_path: Path, evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "llmdpd.cli.evaluate.film_run", lambda run, prompts, steps, **more: asked.append(more | {"s": steps})
    )
    words = [str(run_copy), "--episodes", "2", "--workers", "1", "--threads", "1", "--tasks", "reach", "--films"]
    out = tmp_path / "mine.json"
    assert main([*words, "--checkpoint", "best", "--noise-scale", "0.5", "--max-steps", "4", "--out", str(out)]) == 0
    assert asked[0].pop("check") is not None
    assert asked == [
        {
            "checkpoint": "best",
            "acting": {"noise_scale": 0.5},
            "device": "cpu",
            "folder": tmp_path / "mine-films",
            "s": 4,
            "most": None,
        }
    ]
    assert main(words) == 0
    (own,) = (run_copy / "evaluations").iterdir()
    assert asked[1]["folder"] == own.with_name(f"{own.stem}-films")
    assert main([word for word in words if word not in ("--tasks", "reach")]) == 0
    assert (asked[2]["folder"], asked[2]["checkpoint"], asked[2]["s"]) == (run_copy / "films", "last", 15)


@pytest.mark.parametrize("kind", ["minari", "mtdiff", "hdf5 folder"])
def test_examples_from_any_readable_data(
    kind: str, run_copy: Path, tmp_path: Path, metaworld_data: MakeData, evaluate: Callable[..., int]
) -> None:
    path = save(metaworld_data(("push-v3", "soccer-v3", "reach-v3"), seed=7), kind, tmp_path / "data")
    before = (run_copy / "results.json").read_bytes()
    out = tmp_path / "new" / "out.json"
    options = ["--episodes", 2, "--checkpoint", "last", "--prompt-data", path, "--tasks", "soccer", "reach-v2"]
    assert evaluate(run_copy, *options, "--out", out) == 0
    records = read_results(out)
    assert [(r.task, r.split, r.checkpoint) for r in records] == [
        ("soccer-v3", "unseen", "last"),
        ("reach-v3", "seen", "last"),
    ]
    assert {r.prompts.trajectory for r in records} == {str(path)}
    assert (run_copy / "results.json").read_bytes() == before


def test_a_plain_hdf5_file_is_the_example_of_the_task_asked_for(
    run_copy: Path,
    tmp_path: Path,
    metaworld_data: MakeData,
    evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = save(metaworld_data(("box-close-v3",)), "hdf5", tmp_path / "data")
    assert load_dataset(path).tasks == ("some-replay",)
    out = tmp_path / "out.json"
    assert evaluate(run_copy, "--episodes", 1, "--prompt-data", path, "--tasks", "box-close", "--out", out) == 0
    assert {r.task for r in read_results(out)} == {"box-close-v3"}
    assert evaluate(run_copy, "--prompt-data", path) == 2
    error = capsys.readouterr().err
    assert "'some-replay', which no task suite knows" in error
    assert "ask for one task alone" in error


def test_prompts_change_what_the_policy_does(
    run_copy: Path,
    tmp_path: Path,
    metaworld_data: MakeData,
    evaluate: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmdpd.evaluation import scoring

    observed: list[bytes] = []
    evaluate_tasks = scoring.evaluate_tasks

    def noted(*arguments: Any, **keywords: Any) -> Any:
        results = evaluate_tasks(*arguments, **keywords)
        observed.append(results["reach-v3"][0].final_observation.tobytes())
        return results

    monkeypatch.setattr(scoring, "evaluate_tasks", noted)
    data = save(metaworld_data(("reach-v3",), seed=9), "minari", tmp_path / "data")
    (tmp_path / "text.txt").write_text("Open the window with great care.\n")
    plain = [run_copy, "--episodes", 1, "--checkpoint", "last", "--tasks", "reach", "--out", tmp_path / "out.json"]
    assert evaluate(*plain) == 0
    assert evaluate(*plain) == 0
    assert evaluate(*plain, "--prompt-data", data) == 0
    assert evaluate(*plain, "--prompt-text", tmp_path / "text.txt") == 0
    (record,) = read_results(tmp_path / "out.json")
    assert record.prompts.text == str(tmp_path / "text.txt")
    assert record.prompts.trajectory == str(run_copy / "prompt_data")
    assert observed[0] == observed[1]
    assert len(set(observed)) == 3


def test_the_table_tells_what_the_file_holds(
    run_copy: Path, tmp_path: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert evaluate(run_copy, "--episodes", 2, "--checkpoint", "best", "--out", out) == 0
    text = capsys.readouterr().out
    for record in read_results(out):
        assert record.success_rate is not None
        (line,) = (line for line in text.splitlines() if line.startswith(record.task))
        assert line.split()[1:5] == [record.split, "best", "2", f"{record.success_rate:.0%}"]
    assert f"results: {out}" in text


def test_fewer_workers_find_the_same(run_copy: Path, tmp_path: Path, cache_home: Path, torch_settings: None) -> None:
    found = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}.json"
        words = [run_copy, "--episodes", 3, "--max-steps", 30, "--workers", workers, "--threads", 1, "--out", out]
        assert main([str(word) for word in words]) == 0
        found.append([dataclasses.replace(r, wall_seconds=0) for r in read_results(out)])
    assert found[0] == found[1]


WRONG: dict[str, tuple[list[object], list[str]]] = {
    "task": (["--tasks", "reech"], ["unknown task", "reach-v3"]),
    "no example": (["--tasks", "soccer"], ["no example of this task", "soccer-v3", "--prompt-data"]),
    "prompt data": (["--prompt-data", "no/such"], ["no such file or folder", "no/such"]),
    "prompt text": (["--prompt-text", "no-such.txt"], ["cannot read the text prompt", "no-such.txt"]),
    "device": (["--device", "cuda:9"], ["GPU", "cuda:9"]),
    "episodes": (["--episodes", 0], ["episodes", "at least 1"]),
    "steps": (["--max-steps", 900], ["max_steps", "900", "500"]),
    "samples": (["--samples", 0], ["samples", "at least 1"]),
    "noise": (["--noise-scale", -1], ["noise_scale", "-1"]),
    "no replan": (["--replan", 0], ["replan", "found:    0"]),
    "replan": (["--replan", 2], ["acting.replan", "1 to 1 (policy.chunk)"]),
    "no views": (["--views", 0], ["views", "found:    0"]),
    "odd views": (["--views", 3], ["acting.views", "found:    3", "even"]),
    "views of no example": (["--views", 4, "--prompts", "no-trajectory"], ["--views", "found:    4", "one view"]),
    "out": (["--out", "."], ["cannot be written", "a folder"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_told(
    case: str, straight_run: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words, parts = WRONG[case]
    before = (straight_run / "results.json").read_bytes()
    assert evaluate(straight_run, *words) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert "Traceback" not in error
    assert (straight_run / "results.json").read_bytes() == before


def test_what_is_no_run_or_has_no_policy(
    run_copy: Path, tmp_path: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path / "nothing") == 2
    assert "not a run folder" in capsys.readouterr().err
    (run_copy / "policy" / "model.safetensors").write_bytes(b"something else")
    assert evaluate(run_copy) == 2
    assert "altered" in capsys.readouterr().err


def test_a_prompt_that_the_policy_was_not_trained_with(
    run_copy: Path, tmp_path: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    config["policy"]["context"].update(text=False, trajectory=False)
    (run_copy / "config.json").write_text(json.dumps(config))
    for option in ("--prompt-data", "--prompt-text"):
        assert evaluate(run_copy, option, tmp_path) == 2
        error = capsys.readouterr().err
        assert "trained without such prompts" in error
        assert option in error


def test_a_control_is_evaluated_with_a_run_and_without(
    run_copy: Path,
    tmp_path: Path,
    metaworld_data: MakeData,
    evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(run_copy, "--control", "replay", "--episodes", 2) == 0
    (out,) = (run_copy / "evaluations").iterdir()
    records = read_results(out)
    assert [(r.task, r.split) for r in records] == [
        ("reach-v3", "seen"),
        ("push-v3", "seen"),
        ("door-lock-v3", "unseen"),
    ]
    for record in records:
        assert (record.context, record.checkpoint, record.iterations) == ("control-replay", "last", 0)
        assert (record.trained_on, record.training_data) == ((), "none")
        assert (record.prompts.text, record.prompts.trajectory) == (False, str(run_copy / "prompt_data"))
    path = save(metaworld_data(("push-v3", "soccer-v3")), "minari", tmp_path / "data")
    alone = ["--control", "tracker", "--episodes", 1, "--out", tmp_path / "alone.json"]
    assert evaluate(*alone, "--tasks", "soccer", "push", "--prompt-data", path, "--prompts", "swapped") == 0
    (soccer, _) = read_results(tmp_path / "alone.json")
    assert (soccer.task, soccer.context, soccer.protocol) == ("soccer-v3", "control-tracker", "none")
    assert soccer.prompts.trajectory == f"swapped (push-v3's): {path}"
    capsys.readouterr()
    for words, parts in (
        (["--episodes", 1], ["nothing to evaluate", "--control"]),
        (alone, ["no tasks"]),
        ([*alone, "--tasks", "push"], ["no examples to follow", "--prompt-behaviours"]),
        ([run_copy, *alone, "--samples", 3], ["no use for this", "--samples"]),
        ([run_copy, *alone, "--prompts", "no-trajectory"], ["reads no text"]),
    ):
        assert evaluate(*words) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in parts), error


def test_examples_by_behaviours_are_collected_once_and_told_apart(
    run_copy: Path, tmp_path: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[object] = [run_copy, "--tasks", "reach", "--episodes", 3, "--checkpoint", "last", "--examples", 2]
    words += ["--prompt-behaviours", "clean", "cut", "--data-root", tmp_path / "examples", "--out", tmp_path / "o.json"]
    assert evaluate(*words) == 0
    records = read_results(tmp_path / "o.json")
    assert [(r.prompts.kind, r.episodes) for r in records] == [("clean", 3), ("cut", 3)]
    for record in records:
        assert str(record.prompts.trajectory).startswith(f"{record.prompts.kind}: 2 examples from {tmp_path}/examples/")
    output = capsys.readouterr().out
    assert "prompts: clean" in output
    assert "prompts: cut" in output
    folders = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "examples").iterdir() if folder.is_dir()}
    assert len(folders) == 2
    assert evaluate(*words) == 0
    assert {folder: folder.stat().st_mtime_ns for folder in folders} == folders


def test_swapped_prompts_reach_the_policy_and_the_record(
    run_copy: Path, tmp_path: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run_copy, "--episodes", 1, "--checkpoint", "last", "--prompts", "swapped", "--out", tmp_path / "o.json"]
    assert evaluate(*words) == 2
    assert "door-lock-v3 alone among the unseen tasks" in capsys.readouterr().err
    assert evaluate(*words, "--tasks", "reach", "push") == 0
    for record, other in zip(read_results(tmp_path / "o.json"), ("push-v3", "reach-v3"), strict=True):
        assert record.prompts.text == f"swapped ({other}'s): built in"
        assert record.prompts.trajectory == f"swapped ({other}'s): {run_copy / 'prompt_data'}"


def test_one_prompt_alone_where_dropout_taught_it(
    tmp_path: Path,
    train: Callable[..., int],
    tiny_options: list[str],
    evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = tmp_path / "dropped", tmp_path / "o.json"
    dropout = ("--policy.context.text-dropout", 0.5, "--policy.context.trajectory-dropout", 0)
    assert train("--run-dir", run, *tiny_options, *dropout, "--training.iterations", 50) == 0
    assert evaluate(run, "--prompts", "no-text", "--episodes", 1, "--checkpoint", "last", "--out", out) == 0
    assert {record.prompts.kind for record in read_results(out)} == {"example alone"}
    capsys.readouterr()
    assert evaluate(run, "--prompts", "no-trajectory") == 2
    assert "this policy was trained with a trajectory prompt at every step" in capsys.readouterr().err


CONTRADICTIONS: dict[str, tuple[list[object], list[str]]] = {
    "behaviour": (["--prompt-behaviours", "slo"], ["unknown behaviour", "nearest: slow"]),
    "two places": (["--prompt-behaviours", "slow", "--prompt-data", "x"], ["examples from two places"]),
    "no choice": (["--prompts", "no-trajectory", "--examples", 2], ["no choice of them", "--examples"]),
    "too few": (["--examples", 2], ["not as many examples", "--examples 2"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_told(
    case: str, straight_run: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words, parts = CONTRADICTIONS[case]
    assert evaluate(straight_run, *words) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
