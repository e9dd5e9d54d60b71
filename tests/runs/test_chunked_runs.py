"""Runs of a policy with action chunks: what is theirs alone (the rest: tests/methods/test_every_method.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmdpd.cli.evaluate import main as evaluate
from llmdpd.cli.export import main as export
from llmdpd.evaluation.episodes import evaluate_tasks
from llmdpd.evaluation.prompts import task_prompts
from llmdpd.evaluation.results import read_results
from llmdpd.policy.policy import Policy
from llmdpd.tasks.simulation.rollout import EnvPool

FIELDS = {
    **{"method.network.chunk": 4, "method.acting.action-horizon": 3, "method.eta": 0, "evaluation.max-steps": 8},
    **{"training.iterations": 40, "training.select-every": 0},
}


@pytest.fixture(scope="module")
def chunked_run(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., int], tiny_options: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "chunked"
    own = [word for name, value in FIELDS.items() for word in (f"--{name}", value)]
    assert train("--run-dir", folder, *tiny_options, *own) == 0
    return folder


def test_its_episodes_depend_on_nothing_but_their_seeds(chunked_run: Path) -> None:
    """In any number of workers bit for bit the same; in other batches but for rounding."""
    policy = Policy.load(chunked_run)
    assert policy.action_horizon == 3
    prompts = task_prompts(("reach-v3", "door-lock-v3"), chunked_run / "prompt_data", True)

    def ends(workers: int, parallel: int) -> np.ndarray:
        with EnvPool(workers, parallel=parallel) as pool:
            results = evaluate_tasks(policy, prompts, 3, pool, max_steps=7)
        return np.array([result.final_observation for episodes in results.values() for result in episodes])

    first = ends(1, 6)
    np.testing.assert_array_equal(ends(2, 6), first)
    np.testing.assert_allclose(ends(1, 2), first, rtol=0, atol=1e-4)
    assert len(np.unique(first, axis=0)) == 6


def test_evaluated_with_another_action_horizon(
    chunked_run: Path, tmp_path: Path, cache_home: Path, torch_settings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(chunked_run), "--episodes", "1", "--workers", "1", "--threads", "1", "--tasks", "reach"]
    for horizon in (1, 4):
        out = tmp_path / f"{horizon}.json"
        assert evaluate([*words, "--action-horizon", str(horizon), "--out", str(out)]) == 0
        assert {record.acting.action_horizon for record in read_results(out)} == {horizon}
    capsys.readouterr()
    assert evaluate([*words, "--replan", "5", "--out", str(tmp_path / "5.json")]) == 2
    error = capsys.readouterr().err
    assert "acting.action_horizon" in error
    assert "1 to 4" in error
    assert not (tmp_path / "5.json").exists()


def test_an_export_refuses_a_way_of_acting_that_has_no_effect(
    chunked_run: Path, tmp_path: Path, cache_home: Path, torch_settings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(chunked_run), "--task", "reach", "--out", str(tmp_path / "out")]
    assert export([*words, "--contradicted-text", "drop"]) == 2
    said = capsys.readouterr().err
    assert "no effect on the run's policy" in said
    assert "--contradicted-text" in said
    assert export([*words, "--action-horizon", "2", "--contradicted-text", "keep"]) == 0
