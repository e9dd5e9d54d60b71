"""The evaluation command: prompts from any file that can be read, results where they are asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdpd.cli.evaluate import main
from llmdpd.config.presets import PRESETS, with_method
from llmdpd.data import TrajectoryDataset, load_dataset, save_d4rl, save_minari
from llmdpd.errors import InputError
from llmdpd.evaluation import scoring
from llmdpd.evaluation.intervals import wilson_interval
from llmdpd.evaluation.results import read_results
from llmdpd.policy.policy import Policy
from llmdpd.runs.evaluate import EvaluateConfig, check_evaluation
from llmdpd.runs.folder import RunFolder

Capture = pytest.CaptureFixture[str]
MakeData = Callable[..., TrajectoryDataset]
Evaluate = Callable[..., int]


@pytest.fixture
def evaluate_whole(cache_home: Path, torch_settings: None) -> Evaluate:
    """The command with episodes of the run's own length."""
    return lambda *words: main([str(word) for word in ("--workers", 1, "--threads", 1, *words)])


@pytest.fixture
def evaluate(evaluate_whole: Evaluate) -> Evaluate:
    """The command with episodes of six steps."""
    return lambda *words: evaluate_whole("--max-steps", 6, *words)


def save(data: TrajectoryDataset, folder: Path) -> Path:
    save_minari(data, folder)
    return folder


def test_the_runs_own_results_are_of_all_its_tasks_and_come_with_a_new_report(
    run_copy: Path, evaluate_whole: Evaluate, capsys: Capture
) -> None:
    before = read_results(run_copy / "results.json")
    report = (run_copy / "report.html").read_bytes()
    with RunFolder(run_copy).lock():
        assert evaluate_whole(run_copy, "--episodes", 3) == 2
    assert "another process is at work in this run" in capsys.readouterr().err
    assert (run_copy / "report.html").read_bytes() == report
    assert evaluate_whole(run_copy, "--episodes", 3) == 0
    assert "evaluated for 3 episodes" in " ".join((run_copy / "report.html").read_text().split())
    value = json.loads((run_copy / "results.json").read_text())
    assert value["schema"] == 2
    assert [(r["task"], r["checkpoint"]) for r in value["records"]] == [(r.task, r.checkpoint) for r in before]
    lines = capsys.readouterr().out.splitlines()
    for record in value["records"]:
        assert (record["episodes"], record["max_steps"]) == (3, 15), "steps are the run's own"
        assert record["success_rate"] == record["successes"] / 3
        assert record["ci95"] == pytest.approx(wilson_interval(record["successes"], 3))
        assert record["prompts"] == {"text": "built in", "trajectory": str(run_copy / "prompt_data")}
        shown = [set(line.split()) for line in lines if line.startswith(record["task"])]
        expected = {record["split"], record["checkpoint"], "3", f"{record['success_rate']:.0%}"}
        assert any(expected <= words for words in shown)


def test_tasks_that_were_trained_on_may_have_a_number_of_episodes_of_their_own(
    run_copy: Path, evaluate_whole: Evaluate
) -> None:
    def results(episodes: int, seen: int) -> bytes:
        assert evaluate_whole(run_copy, "--episodes", episodes, "--seen-episodes", seen) == 0
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
    option: tuple[Any, ...], run_copy: Path, evaluate_whole: Evaluate, capsys: Capture
) -> None:
    before = (run_copy / "results.json").read_bytes()
    assert evaluate_whole(run_copy, "--episodes", 2, *option) == 0
    assert (run_copy / "results.json").read_bytes() == before
    (out,) = (run_copy / "evaluations").iterdir()
    assert str(out) in capsys.readouterr().out
    assert {r.episodes for r in read_results(out)} == {1 if "--episodes" in option else 2}


def test_videos_are_of_what_was_evaluated_and_never_replace_the_runs(
    run_copy: Path, tmp_path: Path, evaluate_whole: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def noted(policy: Policy, prompts: object, folder: Path, **others: Any) -> None:
        asked.append({"folder": folder, "noise_scale": policy.acting.noise_scale, **others})

    monkeypatch.setattr("llmdpd.runs.evaluate.record_videos", noted)
    words = [run_copy, "--episodes", 2, "--tasks", "reach", "--videos"]
    own = ["--checkpoint", "best", "--noise-scale", 0.5, "--max-steps", 4, "--out", tmp_path / "mine.json"]
    assert evaluate_whole(*words, *own) == 0
    assert asked[0].pop("check") is not None
    assert asked[0] == {
        **{"folder": tmp_path / "mine-videos", "noise_scale": 0.5, "checkpoint": "best", "max_steps": 4, "most": None},
        **{"goal_visible": True, "seen": ("reach-v3", "push-v3")},
    }
    assert evaluate_whole(*words) == 0
    (out,) = (run_copy / "evaluations").iterdir()
    assert asked[1]["folder"] == out.with_name(f"{out.stem}-videos")
    assert evaluate_whole(run_copy, "--episodes", 2, "--films") == 0, "the last version's spelling"
    assert (asked[2]["folder"], asked[2]["checkpoint"], asked[2]["max_steps"]) == (run_copy / "videos", "last", 15)


def test_demonstrations_from_other_data(
    run_copy: Path, tmp_path: Path, metaworld_data: MakeData, evaluate: Evaluate
) -> None:
    path = save(metaworld_data(("push-v3", "soccer-v3", "reach-v3"), seed=7), tmp_path / "data")
    out = tmp_path / "new" / "out.json"
    options = ["--episodes", 2, "--checkpoint", "last", "--prompt-data", path, "--tasks", "soccer", "reach-v2"]
    assert evaluate(run_copy, *options, "--out", out) == 0
    records = read_results(out)
    assert [(r.task, r.split, r.checkpoint) for r in records] == [
        ("soccer-v3", "unseen", "last"),
        ("reach-v3", "seen", "last"),
    ]
    assert {r.prompts.trajectory for r in records} == {str(path)}


def test_a_plain_hdf5_file_is_the_demonstration_of_the_task_asked_for(
    run_copy: Path, tmp_path: Path, metaworld_data: MakeData, evaluate: Evaluate, capsys: Capture
) -> None:
    data = dataclasses.replace(metaworld_data(("box-close-v3",)), tasks=("some-replay",))
    path = save_d4rl(data, tmp_path / "replay.hdf5")
    assert load_dataset(path).tasks == ("some-replay",)
    out = tmp_path / "out.json"
    assert evaluate(run_copy, "--episodes", 1, "--prompt-data", path, "--tasks", "box-close", "--out", out) == 0
    assert {r.task for r in read_results(out)} == {"box-close-v3"}
    assert evaluate(run_copy, "--prompt-data", path) == 2
    error = capsys.readouterr().err
    assert "'some-replay', which no task suite knows" in error
    assert "ask for one task alone" in error


def test_prompts_change_what_the_policy_does(
    run_copy: Path, tmp_path: Path, metaworld_data: MakeData, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[bytes] = []
    evaluate_tasks = scoring.evaluate_tasks

    def noted(*arguments: Any, **keywords: Any) -> Any:
        results = evaluate_tasks(*arguments, **keywords)
        observed.append(results["reach-v3"][0].final_observation.tobytes())
        return results

    monkeypatch.setattr(scoring, "evaluate_tasks", noted)
    data = save(metaworld_data(("reach-v3",), seed=9), tmp_path / "data")
    (tmp_path / "text.txt").write_text("Open the window with great care.\n")
    plain = [run_copy, "--episodes", 1, "--checkpoint", "last", "--tasks", "reach", "--out", tmp_path / "out.json"]
    for more in ([], [], ["--prompt-data", data], ["--prompt-text", tmp_path / "text.txt"]):
        assert evaluate(*plain, *more) == 0
    (record,) = read_results(tmp_path / "out.json")
    assert record.prompts.text == str(tmp_path / "text.txt")
    assert record.prompts.trajectory == str(run_copy / "prompt_data")
    assert observed[0] == observed[1]
    assert len(set(observed)) == 3


WRONG: dict[str, tuple[list[object], list[str]]] = {
    "misspelled": (["--epsodes", 3], ["no such option", "found:    --epsodes", "--episodes"]),
    "task": (["--tasks", "reech"], ["unknown task", "reach-v3"]),
    "no demonstration": (["--tasks", "soccer"], ["no demonstration of this task", "soccer-v3", "--prompt-data"]),
    "prompt data": (["--prompt-data", "no/such"], ["no such file or folder", "no/such"]),
    "prompt text": (["--prompt-text", "no-such.txt"], ["file not found", "no-such.txt", "a text prompt"]),
    "device": (["--device", "cuda:9"], ["GPU", "cuda:9"]),
    "episodes": (["--episodes", 0], ["episodes", "1 to 100000"]),
    "steps": (["--max-steps", 900], ["max_steps", "900", "500"]),
    "samples": (["--samples", 0], ["samples", "at least 1"]),
    "noise": (["--noise-scale", -1], ["noise_scale", "-1"]),
    "no horizon": (["--action-horizon", 0], ["action_horizon", "found:    0"]),
    "horizon": (["--action-horizon", 2], ["action_horizon", "1 to 1"]),
    "out": (["--out", "."], ["cannot be written", "a folder"]),
    "behaviour": (["--prompt-behaviours", "slo"], ["unknown behaviour", "nearest: slow"]),
    "two places": (["--prompt-behaviours", "slow", "--prompt-data", "x"], ["demonstrations from two places"]),
    "no choice": (["--prompts", "no-trajectory", "--demonstrations", 2], ["no choice of them", "--demonstrations"]),
    "too few": (["--demonstrations", 2], ["not as many demonstrations", "--demonstrations 2"]),
    "too many": (["--together", "--demonstrations", 17], ["too many demonstrations", "1 to 16"]),
    "together without": (["--prompts", "no-trajectory", "--together"], ["no choice of them", "--together"]),
    "baseline's prompt": (["--baseline", "replay", "--together"], ["no use for this", "--together"]),
    "alone": (["--prompts", "swapped"], ["door-lock-v3 alone among the unseen tasks"]),
    "baseline's samples": (["--baseline", "replay", "--samples", 3], ["no use for this", "--samples"]),
    "baseline's text": (["--baseline", "replay", "--prompts", "no-trajectory"], ["reads no text"]),
}
WITHOUT_A_RUN: dict[str, tuple[list[object], list[str]]] = {
    "no run": (["no/such/run"], ["not a run folder"]),
    "nothing": ([], ["nothing to evaluate", "--baseline"]),
    "no tasks": (["--baseline", "tracker"], ["no tasks"]),
    "no data": (["--baseline", "tracker", "--tasks", "push"], ["no demonstrations to follow", "--prompt-behaviours"]),
}


@pytest.mark.parametrize("case", [*WRONG, *WITHOUT_A_RUN])
def test_wrong_options_are_named(case: str, straight_run: Path, evaluate: Evaluate, capsys: Capture) -> None:
    words, parts = WITHOUT_A_RUN[case] if case in WITHOUT_A_RUN else WRONG[case]
    before = (straight_run / "results.json").read_bytes()
    assert evaluate(*([straight_run] if case in WRONG else []), *words) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert "Traceback" not in error
    assert (straight_run / "results.json").read_bytes() == before


@pytest.mark.parametrize("option", ["--prompt-data", "--prompt-text"])
def test_a_prompt_that_the_policy_was_not_trained_with(option: str) -> None:
    given: dict[str, Any] = {option.removeprefix("--").replace("-", "_"): Path("x")}
    with pytest.raises(InputError, match="trained without such prompts") as caught:
        check_evaluation(EvaluateConfig(run=Path("run"), **given), PRESETS["metaworld-no-prompts"])
    assert caught.value.field == option


def test_a_baseline_is_evaluated_with_a_run_and_without(
    run_copy: Path, tmp_path: Path, metaworld_data: MakeData, evaluate: Evaluate
) -> None:
    assert evaluate(run_copy, "--baseline", "replay", "--episodes", 2) == 0
    (out,) = (run_copy / "evaluations").iterdir()
    records = read_results(out)
    assert [(r.task, r.split) for r in records] == [
        ("reach-v3", "seen"),
        ("push-v3", "seen"),
        ("door-lock-v3", "unseen"),
    ]
    for record in records:
        assert (record.context, record.checkpoint, record.iterations) == ("non-learned-replay", "last", 0)
        assert (record.trained_on, record.training_data) == ((), "none")
        assert (record.prompts.text, record.prompts.trajectory) == (False, str(run_copy / "prompt_data"))
    path = save(metaworld_data(("push-v3", "soccer-v3")), tmp_path / "data")
    nearest = ["--baseline", "retrieve-and-play", "--episodes", 1, "--out", tmp_path / "nearest.json"]
    nearest += ["--together", "--demonstrations", 3]
    assert evaluate(run_copy, *nearest, "--prompt-data", path, "--tasks", "push") == 0
    (record,) = read_results(tmp_path / "nearest.json")
    assert record.context == "non-learned-retrieve-and-play"
    assert str(record.prompts.trajectory).endswith("as one prompt")
    alone = ["--control", "tracker", "--episodes", 1, "--out", tmp_path / "alone.json"]
    assert evaluate(*alone, "--tasks", "soccer", "push", "--prompt-data", path, "--prompts", "swapped") == 0
    (soccer, _) = read_results(tmp_path / "alone.json")
    assert (soccer.task, soccer.context, soccer.protocol) == ("soccer-v3", "non-learned-tracker", "none")
    assert soccer.prompts.trajectory == f"swapped (push-v3's): {path}"


def test_demonstrations_by_behaviours_are_collected_once_and_kept_apart(
    run_copy: Path, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    words: list[object] = [run_copy, "--tasks", "reach", "--episodes", 3, "--checkpoint", "last", "--examples", 2]
    words += ["--prompt-behaviours", "clean", "cut", "--data-root", tmp_path / "data", "--out", tmp_path / "o.json"]
    assert evaluate(*words) == 0
    records = read_results(tmp_path / "o.json")
    assert [(r.prompts.kind, r.episodes) for r in records] == [("clean", 3), ("cut", 3)]
    output = capsys.readouterr().out
    for record in records:
        kind = record.prompts.kind
        assert str(record.prompts.trajectory).startswith(f"{kind}: 2 demonstrations from {tmp_path}/data/")
        assert f"prompts: {kind}" in output
    folders = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "data").iterdir() if folder.is_dir()}
    assert len(folders) == 2
    assert evaluate(*words) == 0
    assert {folder: folder.stat().st_mtime_ns for folder in folders} == folders


def test_demonstrations_together_are_one_prompt(run_copy: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    words: list[object] = [run_copy, "--tasks", "reach", "--episodes", 2, "--checkpoint", "last"]
    words += ["--prompt-behaviours", "clean", "--together", "--data-root", tmp_path / "data"]
    assert evaluate(*words, "--out", tmp_path / "five.json") == 0
    assert evaluate(*words, "--demonstrations", 2, "--out", tmp_path / "two.json") == 0
    for name, count in (("five", 5), ("two", 2)):
        (record,) = read_results(tmp_path / f"{name}.json")
        source = str(record.prompts.trajectory)
        assert source.startswith(f"clean: {count} demonstrations from {tmp_path}/data/")
        assert source.endswith(", as one prompt")


def test_whole_episodes_go_on_after_the_success_and_record_their_returns(
    run_copy: Path, tmp_path: Path, evaluate: Evaluate, capsys: Capture
) -> None:
    words: list[object] = ["--tasks", "door-lock", "--episodes", 2, "--checkpoint", "last", "--max-steps", 100]
    assert evaluate(run_copy, *words, "--out", tmp_path / "short.json") == 0
    assert evaluate(run_copy, *words, "--whole-episodes", "--out", tmp_path / "whole.json") == 0
    (short,), (whole,) = read_results(tmp_path / "short.json"), read_results(tmp_path / "whole.json")
    assert (short.returns_mean, short.normalised_score) == (None, None)
    assert whole.successes == short.successes
    assert whole.returns_mean is not None
    assert whole.normalised_score == pytest.approx(100 * (whole.returns_mean - 112.3) / (811.5 - 112.3))
    shown = capsys.readouterr().out.splitlines()[-2:]
    assert f"{whole.normalised_score:.1f}" in " ".join(shown)


@pytest.mark.parametrize("method", ["prompt-dt", "mtdiff"])
def test_a_policy_that_reads_one_demonstration(method: str) -> None:
    with pytest.raises(InputError, match="one demonstration a prompt") as caught:
        check_evaluation(EvaluateConfig(run=Path("run"), together=True), with_method(PRESETS["metaworld"], method))
    assert caught.value.field == "--together"


def test_swapped_prompts_reach_the_policy_and_the_record(run_copy: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    words = [run_copy, "--episodes", 1, "--checkpoint", "last", "--prompts", "swapped", "--out", tmp_path / "o.json"]
    assert evaluate(*words, "--tasks", "reach", "push") == 0
    for record, other in zip(read_results(tmp_path / "o.json"), ("push-v3", "reach-v3"), strict=True):
        assert record.prompts.text == f"swapped ({other}'s): built in"
        assert record.prompts.trajectory == f"swapped ({other}'s): {run_copy / 'prompt_data'}"


def test_one_prompt_alone_where_dropout_taught_it(
    tmp_path: Path, train: Callable[..., int], tiny_options: list[str], evaluate: Evaluate, capsys: Capture
) -> None:
    run, out = tmp_path / "dropped", tmp_path / "o.json"
    dropout = ("--method.network.context.text-dropout", 0.5, "--method.network.context.trajectory-dropout", 0)
    assert train("--run-dir", run, *tiny_options, *dropout, "--training.iterations", 50) == 0
    assert evaluate(run, "--prompts", "no-text", "--episodes", 1, "--checkpoint", "last", "--out", out) == 0
    assert {record.prompts.kind for record in read_results(out)} == {"demonstration alone"}
    capsys.readouterr()
    assert evaluate(run, "--prompts", "no-trajectory") == 2
    assert "this policy was trained with a trajectory prompt at every step" in capsys.readouterr().err
