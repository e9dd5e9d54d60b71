"""Evaluating a run folder: its policies found or named, its results replaced whole, its videos."""

from __future__ import annotations

import shutil
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
