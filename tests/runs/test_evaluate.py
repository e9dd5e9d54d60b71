"""Evaluating a run folder: its policies found or named, its results replaced whole, its videos."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.evaluation.config import EvaluationConfig
from llmdpd.evaluation.prompts import TaskPrompt, task_prompts
from llmdpd.evaluation.results import read_results
from llmdpd.runs import evaluate
from llmdpd.runs.evaluate import evaluate_run, load_policies, record_run
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks.simulation.processes import WorkerError
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest, EpisodeResult, LostEpisodesError

CONFIG = EvaluationConfig(episodes=2, max_steps=8)


@pytest.fixture
def prompts(straight_run: Path) -> dict[str, TaskPrompt]:
    return task_prompts(("reach-v3", "door-lock-v3"), straight_run / "prompt_data", True)


@pytest.fixture
def run(run_copy: Path) -> RunFolder:
    return RunFolder(run_copy)


def test_the_results_are_replaced_whole_or_not_at_all(run: RunFolder, prompts: dict[str, TaskPrompt]) -> None:
    before = run.results.read_bytes()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, CONFIG, prompts, workers=1, check=stop)
    assert run.results.read_bytes() == before
    evaluate_run(run, CONFIG, prompts, workers=1)
    found = [(record.checkpoint, record.task) for record in read_results(run.results)]
    assert found == [(checkpoint, task) for checkpoint in ("last", "best") for task in prompts]


def test_results_of_tasks_are_kept_where_workers_die_of_another_ones_episode(
    run: RunFolder, prompts: dict[str, TaskPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, roll_out = run.results.read_bytes(), EnvPool.run
    kept = run.path / "results-incomplete.json"

    def losing(self: EnvPool, requests: Sequence[EpisodeRequest], *others: Any) -> list[EpisodeResult]:
        first, *rest = roll_out(self, requests, *others)
        assert first.request.task == "reach-v3"
        raise LostEpisodesError("3 workers died in the episode of task reach-v3", [None, *rest])

    with monkeypatch.context() as patch:
        patch.setattr(EnvPool, "run", losing)
        with pytest.raises(
            WorkerError, match=r"3 workers died in the episode of task reach(?s:.)*Results of door-lock-v3 .*incomplete"
        ):
            evaluate_run(run, CONFIG, prompts, workers=1)
    assert run.results.read_bytes() == before
    evaluate_run(run, CONFIG, prompts, workers=1)
    whole = [record for record in read_results(run.results) if record.checkpoint == "last"]
    assert not kept.exists(), "nothing is left once all is there"
    with monkeypatch.context() as patch:
        patch.setattr(EnvPool, "run", losing)
        with pytest.raises(WorkerError):
            evaluate_run(run, CONFIG, prompts, workers=1)
    (record,) = read_results(kept)
    assert dataclasses.replace(record, wall_seconds=0.0) == dataclasses.replace(whole[1], wall_seconds=0.0)


def test_a_policy_that_is_not_there(run: RunFolder) -> None:
    shutil.rmtree(run.policy("best"))
    with pytest.raises(InputError) as error:
        load_policies(run, ("best",), {}, "cpu")
    assert (error.value.found, error.value.hint) == ("last", None)
    assert list(load_policies(run, ("last", "best"), {}, "cpu")) == ["last"]
    shutil.rmtree(run.policy("last"))
    with pytest.raises(InputError, match="--resume"):
        load_policies(run, ("last", "best"), {}, "cpu")


def test_videos_are_of_the_last_policy_and_what_it_was_evaluated_on(
    run: RunFolder, prompts: dict[str, TaskPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        evaluate,
        "record_videos",
        lambda policy, prompts, folder, **others: asked.append({"policy": policy, "folder": folder, **others}),
    )
    record_run(run, EvaluationConfig(max_steps=3, video_tasks=5), prompts)
    assert (asked[0]["policy"].metadata["iterations"], asked[0]["folder"]) == (200, run.path / "videos")
    assert (asked[0]["max_steps"], asked[0]["most"], asked[0]["seen"]) == (3, 5, ["reach-v3", "push-v3"])
    with pytest.raises(InputError, match="absent"):
        record_run(run, CONFIG, prompts, device="cuda:99")
