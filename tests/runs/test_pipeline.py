"""Whole runs in variants: which seeds are rolled out when, and the paper's ablations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmdpd.config.presets import PRESETS
from llmdpd.config.schema import TrainConfig
from llmdpd.data.config import DataConfig
from llmdpd.errors import StopRequestedError
from llmdpd.evaluation.results import read_results
from llmdpd.policy.policy import Policy
from llmdpd.runs import pipeline
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.pipeline import STAGES, execute
from llmdpd.tasks import EVALUATION_SEED_START, SELECTION_SEED_START
from llmdpd.tasks.simulation.rollout import EnvPool, EpisodeRequest
from llmdpd.training.stopping import StopSignals

Patch = pytest.MonkeyPatch
SHORT = ("--training.iterations", 4, "--training.select-every", 4, "--evaluation.max-steps", 3)


def test_selection_and_evaluation_have_seeds_of_their_own(
    tmp_path: Path, train: Callable[..., int], tiny_options: list[str], monkeypatch: Patch
) -> None:
    calls: list[set[tuple[str, int]]] = []
    run = EnvPool.run

    def noted(pool: EnvPool, requests: Sequence[EpisodeRequest], *arguments: Any) -> Any:
        calls.append({(request.task, request.seed) for request in requests})
        return run(pool, requests, *arguments)

    monkeypatch.setattr(EnvPool, "run", noted)
    assert train("--run-dir", tmp_path / "run", *tiny_options, *SHORT, "--training.select-episodes", 2) == 0
    seen, unseen = ("reach-v3", "push-v3"), ("door-lock-v3",)
    selection, evaluation = calls
    assert selection == {(task, SELECTION_SEED_START + i) for task in seen for i in range(2)}
    assert evaluation == {(task, EVALUATION_SEED_START + i) for task in (*seen, *unseen) for i in range(2)}


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ((), 0.25),
        (("--method.self-prompted", 0.6), 0.6),
        (("--method.network.context.no-trajectory",), 0.0),
    ],
)
def test_a_share_of_the_prompts_is_over_themselves(
    tmp_path: Path,
    train: Callable[..., int],
    tiny_options: list[str],
    monkeypatch: Patch,
    options: tuple[object, ...],
    share: float,
) -> None:
    shares: list[float] = []

    class Noted(pipeline.BatchSampler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            shares.append(self._self_prompted)

    monkeypatch.setattr(pipeline, "BatchSampler", Noted)
    run = ("--run-dir", tmp_path / "run", *tiny_options, *SHORT, "--evaluation.mode", "none", *options)
    assert train(*run) == 0
    assert shares == [share]


def test_places_are_kept_as_absolute_paths(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()

    def resolved(llm: str = "minilm", **data: str) -> TrainConfig:
        return dataclasses.replace(PRESETS["smoke"], llm=llm, data=DataConfig(**data)).resolved()  # type: ignore[arg-type]

    one = resolved("model", path="../a/b.hdf5", demonstrations="~/c", root="data")
    places = (str(tmp_path.parent / "a" / "b.hdf5"), str(tmp_path / "home" / "c"))
    assert (one.data.path, one.data.demonstrations) == places
    assert (one.data.root, one.llm) == (str(tmp_path / "data"), str(tmp_path / "model"))
    monkeypatch.chdir("/")
    assert one.resolved() == one
    names = ("minari:metaworld/reach-v0", "d4rl:hopper-medium-v2")
    two = resolved("meta-llama/Meta-Llama-3-8B", path=names[0], demonstrations=names[1])
    assert (two.data.path, two.data.demonstrations) == names
    assert two.llm == "meta-llama/Meta-Llama-3-8B"
    assert resolved().data.path is None


@pytest.mark.parametrize(
    ("options", "text", "trajectory"),
    [
        (["--method.network.context.no-text"], False, True),
        (["--method.network.context.no-trajectory"], True, False),
        (["--method.network.context.no-text", "--method.network.context.no-trajectory"], False, False),
        (["--method.eta", 0, "--method.clone", "executed", "--method.prompts-per-batch", 1], True, True),
        (["--method.acting.samples", 3, "--method.no-critic-sees-prompts"], True, True),
    ],
)
def test_ablations_run_from_end_to_end(
    options: list[object],
    text: bool,
    trajectory: bool,
    tmp_path: Path,
    train: Callable[..., int],
    tiny_options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert train("--run-dir", run, *tiny_options, *SHORT, "--training.select-every", 0, *options) == 0, (
        capsys.readouterr().err
    )
    records = read_results(run / "results.json")
    assert len(records) == 3
    for record in records:
        assert bool(record.prompts.text) == text
        assert bool(record.prompts.trajectory) == trajectory
        cloned = "executed" if "executed" in options else "expert"
        assert f"clones the {cloned} actions" in record.training_data
    assert json.loads((run / "meta.json").read_text())["training"] == {"cuda_graph": "not used"}
    policy = Policy.load(run)
    acting = json.loads((run / "meta.json").read_text())["acting"]
    parts = [policy.network] + ([policy.critic] if policy.critic and policy.acting.samples > 1 else [])
    assert acting["parameters"] == sum(tensor.numel() for part in parts for tensor in part.parameters())
    assert 0 < acting["milliseconds_an_action"] < 1000
    assert (policy.critic is None) == ("--method.eta" in options)
    assert bool(policy.texts) == text
    assert ("llm" in policy.metadata) == text
    assert policy.network.reads.text == text


def test_stages_run_in_order_and_a_stop_is_heeded_between_them(tmp_path: Path, monkeypatch: Patch) -> None:
    done: list[str] = []

    class Stop(StopSignals):
        def check(self) -> None:
            if len(done) == 4:
                raise StopRequestedError(2)

    noted = [lambda run, name=stage.__name__: done.append(name) for stage in STAGES]
    monkeypatch.setattr("llmdpd.runs.pipeline.STAGES", noted)
    with pytest.raises(StopRequestedError):
        execute(PRESETS["smoke"], RunFolder(tmp_path), Stop())
    expected = ["set_up", "find_start", "embed", "prepare_data"]
    assert done == expected, "a missing policy or text model is reported before anything is collected"
