"""Resuming: interrupted at any moment a run ends as if it had never stopped; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from llmdpd.data import save_minari
from llmdpd.policy.policy import Policy
from llmdpd.runs import pipeline
from llmdpd.training.metrics import read_metrics
from llmdpd.utils.checkpoint import latest_checkpoint

Train = Callable[..., int]
Contents = Callable[[Path], dict[str, Any]]
Refused = Callable[..., str]
PATIENCE = 240.0
Begin = Callable[[Callable[[Path], object]], subprocess.Popen[str]]


@pytest.fixture
def begin(
    started: Callable[..., subprocess.Popen[str]],
    wait_until: Callable[..., None],
    tiny_options: list[str],
    tmp_path: Path,
) -> Begin:
    """Starts the real command in a process of its own, into tmp_path/run, and waits until that is as asked for."""

    def go(condition: Callable[[Path], object]) -> subprocess.Popen[str]:
        process = started("train", "--run-dir", "run", *tiny_options)
        wait_until(lambda: condition(tmp_path / "run"), process)
        return process

    return go


def checkpointed(run: Path) -> Path | None:
    return latest_checkpoint(run / "checkpoint")


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k != "wall_seconds"} for r in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_resumed_is_the_straight_run_bit_for_bit(
    number: int, begin: Begin, tmp_path: Path, train: Train, straight_run: Path, contents: Contents
) -> None:
    run = tmp_path / "run"
    process = begin(checkpointed)
    delay = random.SystemRandom().uniform(0, 1) if number == signal.SIGKILL else 0.0
    print(f"stopped {delay:.3f} s after the first checkpoint")
    time.sleep(delay)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    checkpoint = checkpointed(run)
    assert checkpoint is not None
    assert checkpoint.name < "step-00000200"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 143, output
        assert "saved; go on with: python -m llmdpd.train --resume run" in output
        assert "stopped by SIGTERM" in output
        assert "Traceback" not in output
        iteration = json.loads((checkpoint / "state.json").read_text())["iteration"]
        assert Policy.load(run).metadata["iterations"] == iteration
    assert train("--resume", run) == 0
    assert contents(run) == contents(straight_run)
    # A stop adds a record of its own.
    assert number != signal.SIGKILL or metrics_of(run) == metrics_of(straight_run)
    assert not list(run.rglob(".*.tmp"))


def test_a_live_run_is_not_resumed_by_another_process(
    begin: Begin,
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
    straight_run: Path,
    contents: Contents,
) -> None:
    run = tmp_path / "run"
    process = begin(checkpointed)
    (run / ".policy.0123abcd.tmp").mkdir()  # as if it were writing it just now
    assert train("--resume", run) == 2
    assert f"process {process.pid}" in capsys.readouterr().err
    assert (run / ".policy.0123abcd.tmp").is_dir()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert contents(run) == contents(straight_run)
    assert not (run / ".lock").exists()


def test_ctrl_c_in_a_selection_saves_and_the_resumed_run_makes_it(
    begin: Begin, tmp_path: Path, train: Train, straight_run: Path, contents: Contents
) -> None:
    run = tmp_path / "run"
    process = begin(lambda run: any(r["iteration"] == 50 for r in read_metrics(run / "metrics.jsonl")))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "stopped by SIGINT" in output
    checkpoint = checkpointed(run)
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["iteration"] == 50
    assert state["marks_due"], "the signal came after the selection"
    assert not (run / "policy_best").exists()
    assert train("--resume", run) == 0
    assert contents(run) == contents(straight_run)
    assert metrics_of(run) == metrics_of(straight_run)


def test_a_finished_run_resumed_evaluates_again(run_copy: Path, train: Train, contents: Contents) -> None:
    before = contents(run_copy)
    (run_copy / "results.json").unlink()
    command = json.loads((run_copy / "meta.json").read_text())["command"]
    assert train("--resume", run_copy, "--evaluation.episodes", 1) == 0
    after = contents(run_copy)
    assert [record["episodes"] for record in after["results"]] == [1] * len(before["results"])
    assert after["config"]["evaluation"]["episodes"] == 1
    assert json.loads((run_copy / "meta.json").read_text())["command"] == command
    assert train("--resume", run_copy, "--evaluation.episodes", 2) == 0
    assert contents(run_copy) == before


def test_a_run_is_resumed_from_another_directory(
    tmp_path: Path,
    train: Train,
    tiny_options: list[str],
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(data_folder)
    short = ["--training.iterations", 2, "--training.select-every", 0, "--evaluation.max-steps", 2]
    places = ["--data.path", "train", "--data.demonstrations", "prompts"]
    assert train("--run-dir", tmp_path / "run", *tiny_options, *short, *places) == 0
    times = json.loads((tmp_path / "run" / "meta.json").read_text())["times"]
    monkeypatch.chdir(tmp_path)
    assert train("--resume", "run") == 0, capsys.readouterr().err
    after = json.loads((tmp_path / "run" / "meta.json").read_text())["times"]
    for name in ("total_seconds", "data_seconds", "evaluation_seconds"):
        assert after[name] > times[name]


def test_what_a_resume_may_not_do(run_copy: Path, tmp_path: Path, refused: Refused, contents: Contents) -> None:
    before = contents(run_copy)
    changes = ("--method.lr", 1, "--training.iterations", 100, "--evaluation.episodes", 1)
    changed = ["another configuration", "method.lr: 0.0006 → 1.0", "training.iterations: 200 → 100"]
    wrong: list[tuple[list[object], list[str]]] = [
        ([tmp_path / "nowhere"], ["not a run folder", "nowhere"]),
        ([run_copy, "--preset", "smoke"], ["own configuration", "--preset", "smoke"]),
        ([run_copy, "--run-dir", "x"], ["own configuration and folder", "--run-dir"]),
        ([run_copy, "--method", "bc"], ["own configuration", "--method", "bc"]),
        ([run_copy, *changes], changed),
    ]
    for words, parts in wrong:
        error = refused("--resume", *words)
        assert all(part in error for part in parts), error
        assert "evaluation.episodes" not in error
    assert contents(run_copy) == before


def test_a_configuration_edited_by_hand_is_named(run_copy: Path, refused: Refused) -> None:
    """The options agree with config.json then; the checkpoint knows better."""
    config = json.loads((run_copy / "config.json").read_text())
    config["method"]["lr"] = 0.5
    config["evaluation"]["max_steps"] = 16
    (run_copy / "config.json").write_text(json.dumps(config))
    error = refused("--resume", run_copy)
    assert "config.method.lr: 0.0006 → 0.5" in error
    assert "config.evaluation.max_steps: 15 → 16" in error
    assert "training data" not in error


@pytest.mark.parametrize("which", ["training data", "demonstrations", "text embeddings"])
def test_other_inputs_than_the_checkpoints_are_named(
    which: str,
    tmp_path: Path,
    train: Train,
    refused: Refused,
    tiny_options: list[str],
    metaworld_data: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, every = tmp_path / "run", ("reach-v3", "push-v3", "door-lock-v3")
    for name in ("path", "demonstrations"):
        save_minari(metaworld_data(every), tmp_path / name)
    short = ["--training.iterations", 2, "--training.select-every", 0, "--evaluation.max-steps", 2]
    places = ["--data.path", tmp_path / "path", "--data.demonstrations", tmp_path / "demonstrations"]
    assert train("--run-dir", run, *tiny_options, *short, *places) == 0
    prompts = (run / "prompts.json").read_bytes()
    if which == "text embeddings":
        embed = pipeline.embed_texts

        def other(*arguments: Any) -> Any:
            texts = embed(*arguments)
            return dataclasses.replace(texts, vectors={text: v + 1e-6 for text, v in texts.vectors.items()})

        monkeypatch.setattr(pipeline, "embed_texts", other)
    else:
        name = "path" if which == "training data" else "demonstrations"
        save_minari(metaworld_data(every, seed=9, first_seed=50), tmp_path / name)
    error = refused("--resume", run)
    assert "not what its checkpoint learned from" in error
    inputs = ("training data:", "demonstrations:", "text embeddings:", "config.")
    assert [part for part in inputs if part in error] == [f"{which}:"]
    assert (run / "prompts.json").read_bytes() == prompts


def _other_sizes(file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    tensors["critic/q1.0.weight"] = torch.zeros(3, 3)
    safetensors.torch.save_file(tensors, file)


def _other_format(file: Path) -> None:
    state = json.loads((file.parent / "state.json").read_text())
    (file.parent / "state.json").write_text(json.dumps({**state, "format": 99}))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (Path.unlink, ["file not found", "networks.safetensors"]),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), ["altered since", "networks.safetensors"]),
        (_other_format, ["another format version", "99", "expected: 1"]),
        (_other_sizes, ["altered since", "networks.safetensors"]),
    ],
    ids=["missing", "cut off", "format", "other sizes"],
)
def test_a_damaged_checkpoint_is_named(
    damage: Callable[[Path], object], parts: list[str], run_copy: Path, refused: Refused
) -> None:
    (checkpoint,) = (run_copy / "checkpoint").iterdir()
    damage(checkpoint / "networks.safetensors")
    error = refused("--resume", run_copy)
    assert all(part in error for part in parts), error
    assert run_copy.is_dir()
