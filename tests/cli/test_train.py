"""The training command: what a run leaves, and that wrong input leaves no trace (resuming: test_resume.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from llmdpd.cli.train import main
from llmdpd.config.parse import parse_train
from llmdpd.config.presets import PRESETS
from llmdpd.data import save_minari
from llmdpd.errors import InputError
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.trajectory_diffusion import TrajectoryDiffusionConfig
from llmdpd.policy.policy import Policy
from llmdpd.reporting.page import build_report
from llmdpd.runs import data
from llmdpd.tasks.metaworld.names import TASKS
from llmdpd.tasks.protocols import PROTOCOLS
from llmdpd.training.metrics import read_metrics
from llmdpd.utils.plain import differences, to_plain

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Train = Callable[..., int]
Contents = Callable[[Path], dict[str, Any]]
Refused = Callable[..., str]


def test_the_seed_decides_the_run(
    straight_run: Path, tmp_path: Path, train: Train, tiny_options: list[str], contents: Contents
) -> None:
    assert train("--run-dir", tmp_path / "again", *tiny_options) == 0
    assert contents(tmp_path / "again") == contents(straight_run)
    short = [*tiny_options, "--training.iterations", 10, "--training.select-every", 0, "--evaluation.episodes", 1]
    for seed in (0, 1):
        assert train("--run-dir", tmp_path / f"seed{seed}", *short, "--seed", seed) == 0
    first, second = (
        safetensors.torch.load_file(tmp_path / f"seed{seed}" / "policy" / "model.safetensors") for seed in (0, 1)
    )
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    assert set(first) - set(differ) == {"context.features.mean", "context.features.std"}


def test_the_run_folder_is_whole(straight_run: Path, data_folder: Path) -> None:
    meta = json.loads((straight_run / "meta.json").read_text())
    assert meta["command"]["argv"][:3] == ["python", "-m", "llmdpd.train"]
    assert str(data_folder / "train") in meta["command"]["argv"]
    assert {"data_seconds", "embedding_seconds", "training_seconds", "evaluation_seconds"} <= meta["times"].keys()
    assert {"torch", "metaworld", "python"} <= meta["versions"].keys()
    page = (straight_run / "report.html").read_text()
    for task in ("reach", "push", "door-lock"):
        assert task in page
    assert "llmdpd.train --run-dir" in page
    records = json.loads((straight_run / "results.json").read_text())["records"]
    found = [(r["task"], r["split"], r["checkpoint"]) for r in records]
    tasks = [("reach-v3", "seen"), ("push-v3", "seen"), ("door-lock-v3", "unseen")]
    assert found == [(*task, checkpoint) for checkpoint in ("last", "best") for task in tasks]
    assert {r["training_data"] for r in records} == {f"{data_folder / 'train'}, 6 episodes; clones the expert actions"}
    assert {tuple(r["trained_on"]) for r in records} == {("reach-v3", "push-v3")}
    assert records[0]["iterations"] == 200
    assert records[0]["prompts"] == {"text": "built in", "trajectory": str(straight_run / "prompt_data")}
    assert build_report([straight_run], straight_run.parent / "other.html").is_file()


def test_selection_scores_are_recorded_and_choose_the_best(straight_run: Path) -> None:
    records = [r for r in read_metrics(straight_run / "metrics.jsonl") if "eval/seen_success" in r]
    assert [r["iteration"] for r in records] == [50, 100, 150, 200]
    best = max(records, key=lambda r: (r["eval/seen_success"], r["iteration"]))
    assert Policy.load(straight_run / "policy_best").metadata["iterations"] == best["iteration"]
    assert all(r["eval/seen_success"] == (r["eval/reach-v3"] + r["eval/push-v3"]) / 2 for r in records)


def test_the_policy_is_the_ema(straight_run: Path) -> None:
    (checkpoint,) = (straight_run / "checkpoint").iterdir()
    networks = safetensors.torch.load_file(checkpoint / "networks.safetensors")
    policy = safetensors.torch.load_file(straight_run / "policy" / "model.safetensors")
    assert policy.keys() == {n.removeprefix("ema_policy/") for n in networks if n.startswith("ema_policy/")}
    assert all(torch.equal(policy[name], networks[f"ema_policy/{name}"]) for name in policy)
    assert any(not torch.equal(policy[name], networks[f"policy/{name}"]) for name in policy)


def _poison(at: int, action: Callable[[LLMDPD], None], monkeypatch: Patch) -> None:
    update = LLMDPD.update

    def poisoned(self: LLMDPD, batch: Any, iteration: int) -> dict[str, torch.Tensor]:
        if iteration == at:
            action(self)
        return update(self, batch, iteration)

    monkeypatch.setattr(LLMDPD, "update", poisoned)


def test_nan_stops_with_what_and_where_and_keeps_the_last_checkpoint(
    tmp_path: Path,
    train: Train,
    tiny_options: list[str],
    monkeypatch: Patch,
    capsys: Capture,
    straight_run: Path,
    contents: Contents,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        _poison(83, lambda agent: agent.policy.net.layers[0].weight.data.fill_(float("nan")), patch)
        assert train("--run-dir", run, *tiny_options) == 1
    error = capsys.readouterr().err
    assert "loss/critic" not in error, "the critics came first and were whole"
    assert "became nan at iteration 84" in error
    assert f"last good checkpoint is {run / 'checkpoint' / 'step-00000075'}" in error
    assert all(r["iteration"] <= 80 for r in read_metrics(run / "metrics.jsonl"))
    assert Policy.load(run).metadata["iterations"] == 75
    assert train("--resume", run) == 0
    assert contents(run) == contents(straight_run)


def test_a_rate_that_is_too_high_diverges_without_traceback(
    tmp_path: Path, train: Train, tiny_options: list[str], capsys: Capture
) -> None:
    assert train("--run-dir", tmp_path / "run", *tiny_options, "--method.critic-lr", 1e30) == 1
    error = capsys.readouterr().err
    assert "There was no checkpoint yet" in error
    assert "Traceback" not in error


def test_a_full_disk_keeps_the_last_checkpoint_whole(
    tmp_path: Path,
    train: Train,
    tiny_options: list[str],
    monkeypatch: Patch,
    capsys: Capture,
    straight_run: Path,
    contents: Contents,
) -> None:
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(agent: LLMDPD) -> None:
        size = (run / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, 20_000), hard))

    try:
        with monkeypatch.context() as patch:
            _poison(60, fill, patch)
            code = train("--run-dir", run, *tiny_options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert code == 2, error
    assert "could not be written" in error
    assert "File too large" in error
    assert f"{run / 'checkpoint' / 'step-00000050'} is whole" in error
    assert f"--resume {run}" in error
    assert not list(run.rglob("*.tmp"))
    assert Policy.load(run).metadata["iterations"] == 50
    assert train("--resume", run) == 0
    assert contents(run) == contents(straight_run)


def test_ctrl_c_while_collecting_is_heeded_at_once(
    tmp_path: Path, train: Train, monkeypatch: Patch, capsys: Capture
) -> None:
    finished = []

    def collect(config: object, progress: Callable[[int, int, int], None]) -> None:
        for done in range(1, 10):
            finished.append(done)
            if done == 3:
                os.kill(os.getpid(), signal.SIGINT)
            progress(done, 10, 100 * done)

    monkeypatch.setattr(data, "collect_scripted", collect)
    assert train("--run-dir", tmp_path / "run", "--data.root", tmp_path / "data") == 130
    assert finished == [1, 2, 3]
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").is_file()


def test_a_missing_llm_is_named_before_anything_is_collected(
    tmp_path: Path, refused: Refused, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(data, "collect_scripted", lambda *arguments: pytest.fail("collects"))
    words = ("--run-dir", tmp_path / "run", "--data.root", tmp_path / "data")
    assert "no-such-model" in refused(*words, "--llm", "no-such-model")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_early_takes_away_only_what_it_made(
    tmp_path: Path, train: Train, tiny_options: list[str], metaworld_data: Callable[..., Any]
) -> None:
    """Collected data may lie in the run's folder."""
    run = tmp_path / "run"

    def fail(*arguments: object) -> None:
        save_minari(metaworld_data(("reach-v3",)), run / "data" / "training")
        raise InputError("unfit data")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmdpd.runs.pipeline.training_data", fail)
        assert train("--run-dir", run, *tiny_options, "--data.root", run / "data") == 2
    assert [path.name for path in run.iterdir()] == ["data"]
    assert (run / "data" / "training" / "metaworld").is_dir()


def test_presets_are_what_they_are_named() -> None:
    assert list(PRESETS) == [config.preset for config in PRESETS.values()]
    assert {"metaworld", "metaworld-paper", "smoke"} <= PRESETS.keys()
    paper = PRESETS["metaworld-paper"].method
    assert isinstance(paper, LLMDPDConfig)
    assert (paper.clone, paper.critic_sees_prompts, paper.prompts_per_batch) == ("executed", False, 1)


def test_what_presets_share_with_the_default_and_what_not() -> None:
    def told(name: str) -> tuple[int, int, int, float]:
        config = PRESETS[name]
        assert isinstance(config.method, LLMDPDConfig)
        training = config.training
        return training.iterations, training.select_every, training.select_episodes, config.method.self_prompted

    assert told("metaworld")[:2] == (9000, 0)
    assert told("metaworld")[3] == 0.25
    tracked = [getattr(PRESETS[name].method.acting, "track_after", None) for name in ("metaworld", "tasks")]
    assert tracked == [3.0, 0.0], "elsewhere it was not measured"
    # Of a user's few tasks ten episodes each are a choice; without an environment it costs nothing.
    assert told("tasks") == told("tasks-plain") == (8000, 4000, 10, 0.0)
    assert (*told("ogbench-scene")[:2], told("ogbench-scene")[3]) == (6000, 0, 0.0)
    assert told("metaworld-paper")[3] == 0, "the paper's demonstrations are of other episodes"


def test_a_protocol_is_a_choice_of_tasks() -> None:
    ml45, paper, design = (PROTOCOLS[name] for name in ("ml45", "paper", "design"))
    assert parse_train([]).tasks == ml45, "the default"
    assert parse_train(["--protocol", "paper"]).tasks == parse_train(["--preset", "metaworld-paper"]).tasks == paper
    words = ["--protocol", "design", "--preset", "metaworld-paper"]
    assert parse_train(words) == dataclasses.replace(parse_train(["--preset", "metaworld-paper"]), tasks=design)
    # The design's choices were made without the tasks that either protocol tests on.
    assert set(design.unseen) <= set(ml45.seen)
    assert set(design.seen) == set(ml45.seen) - set(design.unseen)
    assert not set(design.unseen) & {*ml45.unseen, *paper.seen, *paper.unseen}


def test_folds_hold_out_each_task_once() -> None:
    folds = [PROTOCOLS[f"fold-{number}"] for number in range(10)]
    assert sorted(task for fold in folds for task in fold.unseen) == sorted(TASKS)
    for fold in folds:
        assert len(fold.unseen) == 5
        assert {*fold.seen, *fold.unseen} == set(TASKS)
        assert not set(fold.seen) & set(fold.unseen)
    # The folds are part of what a result means: they stay what they are, also where a task is added.
    first = {"button-press-topdown-v3", "door-open-v3", "lever-pull-v3", "pick-place-wall-v3", "shelf-place-v3"}
    assert set(folds[0].unseen) == first
    assert zlib.crc32(repr([sorted(fold.unseen) for fold in folds]).encode()) == 2707789164
    assert parse_train(["--protocol", "fold-3"]).tasks == folds[3]


def test_the_same_words_are_parsed_once(monkeypatch: Patch, rng: np.random.Generator) -> None:
    words = ["--method.lr", f"{rng.uniform(1e-5, 1e-4)}"]
    first = parse_train(words)
    monkeypatch.setattr("llmdpd.utils.command_line.tyro.cli", None)
    assert parse_train(words) == first
    with pytest.raises(TypeError):
        parse_train([*words, "--seed", "1"])


def test_short_spellings(monkeypatch: Patch) -> None:
    short = "--data x --iterations 7 --tasks reach push --lr 0.5 --batch-size 24 --cuda-graph off"
    long = "--data.path x --training.iterations 7 --tasks.seen reach push --method.lr 0.5 --method.batch-size=24"
    assert parse_train(short.split()) == parse_train([*long.split(), "--training.cuda-graph", "off"])
    monkeypatch.setattr("llmdpd.config.schema.check_device", torch.device)
    assert parse_train(["--gpu"]).device == "cuda"


def test_help_shows_one_methods_options(capsys: Capture) -> None:
    shown = {}
    for method in ("llmdpd", "bc", "sac"):
        with pytest.raises(SystemExit) as done:
            main(["--method", method, "--help"])
        assert done.value.code == 0
        shown[method] = capsys.readouterr().out
        assert len(shown[method].splitlines()) <= 120
        assert f"options of {method}, with their defaults" in shown[method]
        assert "--method.lr " in shown[method]
    assert [method for method, text in shown.items() if "--method.eta " in text] == ["llmdpd"]
    assert [method for method, text in shown.items() if "--data.path " in text] == ["llmdpd", "bc"]
    with pytest.raises(SystemExit):
        main(["--help-all"])
    assert "--method.network.context.encoder.width" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["metaworld", "metaworld-paper"])
def test_each_ablation_of_table_3_is_its_base_with_one_change(base: str) -> None:
    def changes(name: str) -> set[str]:
        config = PRESETS[f"{base}-{name}"].resolved()
        lines = differences(to_plain(PRESETS[base].resolved()), to_plain(config))
        return {line.split(":")[0] for line in lines} - {"preset"}

    text, trajectory = "method.network.context.text", "method.network.context.trajectory"
    assert changes("no-prompts") == {text, trajectory}
    assert changes("no-text") == {text}
    assert changes("no-trajectory") == {trajectory}
    assert changes("olmo-1b") == {"llm"}
    whole, plans = PRESETS[base], PRESETS[f"{base}-trajectory-diffusion"]
    assert dataclasses.replace(plans, method=whole.method, preset=base) == whole
    method = plans.method
    assert isinstance(method, TrajectoryDiffusionConfig)
    assert method.network.context == whole.method.network.context_config()
    assert method.acting.coefficients(method.network).steps < method.network.diffusion_steps


CHUNK, HORIZON = ["--method.network.chunk"], ["--method.acting.action-horizon"]
WRONG: dict[str, tuple[list[object], list[str]]] = {
    "preset": (["--preset", "smoak"], ["unknown preset", "smoak", "nearest names: smoke"]),
    "protocol": (["--protocol", "ml46"], ["unknown protocol", "ml46", "paper, ml45, design"]),
    "method": (["--method", "td3bc"], ["unknown method", "td3bc", "td3-bc"]),
    "task": (["--tasks.seen", "sweep-in"], ["unknown task", "sweep-into-v3"]),
    "seen and unseen": (["--tasks.unseen", "reach-v2"], ["both seen and unseen", "reach-v3"]),
    "no task": (["--tasks.seen"], ["no task to train on", "tasks.seen"]),
    "cuda": (["--device", "cuda:77"], ["GPU", "cuda:77", "--device cpu"]),
    "device": (["--device", "abacus"], ["no such device", "abacus"]),
    "CUDA graph": (["--cuda-graph", "on"], ["needs a CUDA device", "training.cuda_graph"]),
    "batch": (["--method.batch-size", 15], ["shared out evenly", "method.batch_size", "15", "multiple of 2"]),
    "prompts a batch": (["--method.prompts-per-batch", 3], ["prompts_per_batch", "3"]),
    "iterations": (["--training.iterations", 0], ["training.iterations", "0", "at least 1"]),
    "log": (["--training.log-every", 0], ["training.log_every"]),
    "checkpoints": (["--training.checkpoint-every", 0], ["training.checkpoint_every"]),
    "selection": (["--training.select-episodes", 0], ["training.select_episodes"]),
    "episodes": (["--evaluation.episodes", 0], ["evaluation.episodes"]),
    "fraction": (["--data.fraction", 1.5], ["data.fraction"]),
    "workers": (["--data.workers", 0], ["data.workers"]),
    "threads": (["--threads", -1], ["threads", "-1"]),
    "heads": (["--method.network.context.encoder.heads", 3], ["encoder.heads", "3", "16"]),
    "samples": (["--method.eta", 0, "--method.acting.samples", 5], ["no critic", "acting.samples"]),
    "chunk and reward": ([*CHUNK, 4, "--method.eta", 0.1], ["method.eta"]),
    "action horizon": ([*CHUNK, 4, "--method.eta", 0, *HORIZON, 5], ["method.acting.action_horizon", "1 to 4"]),
    "chunk": ([*CHUNK, 0], ["method.network.chunk"]),
    "sampler": (["--method.acting.steps", 3], ["ddpm walks every training step", "method.acting.steps"]),
    "misspelled": (["--method.network.hiden-dim", 3], ["no such option", "perhaps --method.network.hidden-dim"]),
    "data": (["--data.path", "no/such/data"], ["no such file or folder", "no/such/data", "Minari"]),
    "demonstrations": (["--data.demonstrations", "no/such/data"], ["no such file or folder", "no/such/data"]),
    "llm": (["--llm", "no-such-model-anywhere"], ["no-such-model-anywhere"]),
    "option without value": (["--run-dir"], ["an option without its value", "--run-dir"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_named_and_leave_no_run(
    case: str, tmp_path: Path, refused: Refused, tiny_options: list[str]
) -> None:
    words, parts = WRONG[case]
    place = [] if case == "option without value" else ["--run-dir", tmp_path / "run"]
    error = refused(*place, *tiny_options, *words)
    assert all(part in error for part in parts), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("which", "changes", "options", "parts"),
    [
        ("path", {"state_dim": 38}, [], ["does not match Meta-World", "38 numbers", "39 numbers"]),
        ("path", {"expert": False}, [], ["no expert actions", "method.clone", "--method.clone executed"]),
        ("path", {"success": 0}, [], ["every episode of a task failed", "reach-v3", "3 failed episodes"]),
        ("path", {"success": 0}, ["--data.keep-failed"], ["no episode", "reach-v3"]),
        ("path", {"goal_visible": False}, [], ["goal is visible", "tasks.goal_visible"]),
        ("path", {"tasks": ("reach-v3",)}, [], ["no such task", "push-v3"]),
        ("demonstrations", {"state_dim": 38}, [], ["does not match Meta-World", "38 numbers"]),
        ("demonstrations", {"success": 0}, [], ["no episode", "reach-v3"]),
        ("demonstrations", {"goal_visible": False}, [], ["goal is visible"]),
        ("demonstrations", {"first_seed": 1_000_000_000}, [], ["no episode", "0 of 3 episodes", "not evaluated"]),
        ("demonstrations", {"tasks": ("reach-v3", "push-v3")}, [], ["no such task", "door-lock-v3"]),
    ],
)
def test_unfit_data_is_named_and_leaves_no_run(
    which: str,
    changes: dict[str, Any],
    options: list[str],
    parts: list[str],
    tmp_path: Path,
    refused: Refused,
    tiny_options: list[str],
    metaworld_data: Callable[..., Any],
) -> None:
    every = ("reach-v3", "push-v3", "door-lock-v3")
    save_minari(metaworld_data(**({"tasks": every} | changes)), tmp_path / "data")
    error = refused("--run-dir", tmp_path / "run", *tiny_options, f"--data.{which}", tmp_path / "data", *options)
    assert all(part in error for part in [*parts, str(tmp_path / "data")]), error
    assert not (tmp_path / "run").exists()


def test_an_empty_data_set_is_named(tmp_path: Path, refused: Refused, tiny_options: list[str]) -> None:
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "reach-v2.npy", np.array([], dtype=object), allow_pickle=True)
    assert "empty" in refused("--run-dir", tmp_path / "run", *tiny_options, "--data.path", tmp_path / "data")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused(run_copy: Path, refused: Refused, tiny_options: list[str]) -> None:
    error = refused("--run-dir", run_copy, *tiny_options)
    assert "not empty" in error
    assert f"--resume {run_copy}" in error
    assert "is a file" in refused("--run-dir", run_copy / "config.json", *tiny_options)
    assert (run_copy / "results.json").is_file()


def test_a_run_that_cannot_go_on_keeps_its_end(run_copy: Path, refused: Refused) -> None:
    before = (run_copy / "config.json").read_bytes()
    (networks,) = (run_copy / "checkpoint").glob("*/networks.safetensors")
    networks.write_bytes(networks.read_bytes()[:-1] + b"\0")
    assert "altered since it was written" in refused("--resume", run_copy, "--training.iterations", 300)
    assert (run_copy / "config.json").read_bytes() == before


def test_a_run_that_is_extended_and_stopped_keeps_no_report_of_its_former_end(
    run_copy: Path, train: Callable[..., int], monkeypatch: Patch
) -> None:
    update = LLMDPD.update

    def stopped(self: Any, batch: Any, iteration: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch, iteration)

    monkeypatch.setattr(LLMDPD, "update", stopped)
    assert (run_copy / "report.html").is_file()
    assert train("--resume", run_copy, "--training.iterations", 300) == 143
    assert json.loads((run_copy / "policy" / "policy.json").read_text())["metadata"]["iterations"] == 201
    assert not (run_copy / "report.html").exists()
