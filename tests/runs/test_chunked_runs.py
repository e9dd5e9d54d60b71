"""Runs of a policy with chunks: the same commands, folders and checks as any other's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmdpd.cli.evaluate import main as evaluate
from llmdpd.evaluation.episodes import evaluate_tasks
from llmdpd.evaluation.prompts import task_prompts
from llmdpd.evaluation.results import read_results
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.policy.policy import Policy
from llmdpd.tasks.simulation.rollout import EnvPool
from llmdpd.training.metrics import read_metrics

Train = Callable[..., int]
Contents = Callable[[Path], dict[str, Any]]
FIELDS = {
    **{"policy.chunk": 4, "acting.replan": 3, "agent.eta": 0},
    **{"training.iterations": 40, "training.select-every": 20, "training.checkpoint-every": 10},
    **{"evaluation.max-steps": 8, "evaluation.episodes": 2},
}


@pytest.fixture(scope="module")
def options(tiny_options: list[str]) -> list[str]:
    return [*tiny_options, *(word for name, value in FIELDS.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def chunked_run(tmp_path_factory: pytest.TempPathFactory, train: Train, options: list[str]) -> Path:
    """A tiny run that was never disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "chunked"
    assert train("--run-dir", folder, *options) == 0
    return folder


def test_the_run_is_whole(chunked_run: Path) -> None:
    description = json.loads((chunked_run / "policy" / "policy.json").read_text())
    assert (description["policy"]["chunk"], description["acting"]["replan"]) == (4, 3)
    assert "critic.safetensors" not in description["sha256"]
    policy = Policy.load(chunked_run)
    assert policy.replan == 3
    assert policy.network.net.action_dim == 16
    records = read_results(chunked_run / "results.json")
    assert len(records) == 6
    assert {record.acting.action_horizon for record in records} == {3}
    losses = [r["loss/diffusion"] for r in read_metrics(chunked_run / "metrics.jsonl") if "loss/diffusion" in r]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("at", [7, 33])
def test_stopped_and_resumed_it_is_the_straight_run_bit_for_bit(
    at: int,
    chunked_run: Path,
    tmp_path: Path,
    options: list[str],
    contents: Contents,
    stopped_and_resumed: Callable[..., None],
) -> None:
    run = tmp_path / "run"
    stopped_and_resumed(run, options, LLMDPD, at)
    assert contents(run) == contents(chunked_run)


def test_its_episodes_hang_on_nothing_but_their_seeds(chunked_run: Path) -> None:
    """In any number of workers bit for bit the same; in other batches but for rounding."""
    policy = Policy.load(chunked_run)
    prompts = task_prompts(("reach-v3", "door-lock-v3"), chunked_run / "prompt_data", True)

    def ends(workers: int, parallel: int) -> np.ndarray:
        with EnvPool(workers, parallel=parallel) as pool:
            results = evaluate_tasks(policy, prompts, 3, pool, max_steps=7)
        return np.array([result.final_observation for episodes in results.values() for result in episodes])

    first = ends(1, 6)
    np.testing.assert_array_equal(ends(2, 6), first)
    np.testing.assert_allclose(ends(1, 2), first, rtol=0, atol=1e-4)
    assert len(np.unique(first, axis=0)) == 6


def test_evaluated_with_another_replan(
    chunked_run: Path, tmp_path: Path, cache_home: Path, torch_settings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(chunked_run), "--episodes", "1", "--workers", "1", "--threads", "1", "--tasks", "reach"]
    for replan in (1, 4):
        out = tmp_path / f"{replan}.json"
        assert evaluate([*words, "--action-horizon", str(replan), "--out", str(out)]) == 0
        assert {record.acting.action_horizon for record in read_results(out)} == {replan}
    capsys.readouterr()
    assert evaluate([*words, "--action-horizon", "5", "--out", str(tmp_path / "5.json")]) == 2
    error = capsys.readouterr().err
    assert "acting.replan" in error
    assert "1 to 4 (policy.chunk)" in error
    assert not (tmp_path / "5.json").exists()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (["--agent.eta", 0.1], "agent.eta"),
        (["--acting.replan", 5], "acting.replan"),
        (["--policy.chunk", 0], "policy.chunk"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_made(
    changes: list[Any],
    field: str,
    tmp_path: Path,
    train: Train,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train("--run-dir", tmp_path / "run", *options, *changes) == 2
    assert field in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_begun_before_there_were_chunks_is_resumed(
    straight_run: Path, tmp_path: Path, train: Train, contents: Contents, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(straight_run, tmp_path / "run")
    before = contents(run)
    (state,) = run.glob("checkpoint/*/state.json")
    files = [(run / "config.json", ()), (state, ("config",))]
    for file, place in files:
        whole = json.loads(file.read_text())
        config = whole
        for name in place:
            config = config[name]
        assert config["policy"].pop("chunk") == 1
        config["acting"].pop("replan")
        file.write_text(json.dumps(whole))
    assert train("--resume", run, "--policy.chunk", 2, "--agent.eta", 0) == 2
    assert "policy.chunk: 1 → 2" in capsys.readouterr().err
    assert train("--resume", run) == 0
    after = contents(run)
    for name in ("results", "policy/model.safetensors", "checkpoint"):
        assert after[name] == before[name]
