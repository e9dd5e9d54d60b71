"""`llmdpd train --seeds`: each seed's run folder is that of its run alone; one report, one resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdpd.errors import InputError
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.methods.llmdpd.stack import Stack
from llmdpd.policy.policy import Policy
from llmdpd.runs.seeds import SeedsFolder, parse_seeds
from llmdpd.training.metrics import read_metrics
from llmdpd.utils.checkpoint import latest_checkpoint

Contents = Callable[[Path], dict[str, Any]]
SHORT = ("--training.iterations", 20, "--training.checkpoint-every", 10, "--training.select-every", 20)
UNJUDGED = (*SHORT, "--evaluation", "none", "--method.network.context.no-text")


@pytest.fixture(scope="module")
def together(train: Any, tiny_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of seeds 0 and 5 in one process; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("together") / "group"
    assert train("--seeds", "0,5", "--run-dir", folder, *tiny_options, *SHORT) == 0
    return folder


def test_each_seed_is_its_run_alone(
    train: Any, tiny_options: list[str], together: Path, contents: Contents, tmp_path: Path
) -> None:
    run, alone = together / "seed-5", tmp_path / "alone"
    assert train("--run-dir", alone, *tiny_options, *SHORT, "--seed", 5) == 0
    assert contents(run) == contents(alone)
    files = ({str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} for folder in (run, alone))
    ours, theirs = ({name for name in found if "tfevents" not in name} for found in files)
    assert ours == theirs
    assert Policy.load(run).metadata["iterations"] == 20
    assert json.loads((run / "meta.json").read_text())["training"]["seeds in one process"] == [0, 5]
    assert contents(together / "seed-0")["results"] != contents(run)["results"]


def test_one_report_is_over_all_seeds(together: Path) -> None:
    page = (together / "report.html").read_text()
    assert "Comparison of 2 runs" in page
    assert "0, 5" in page  # the seeds of the one arm
    assert json.loads((together / "seeds.json").read_text()) == {"format": 1, "seeds": [0, 5]}
    assert not (together / ".lock").exists()


def test_a_stop_saves_all_and_the_resumed_run_is_the_straight_one(
    train: Any,
    tiny_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*tiny_options, *UNJUDGED]
    straight, group = tmp_path / "straight", tmp_path / "group"
    assert train("--seed", 5, "--run-dir", straight, *options) == 0
    update, seen = LLMDPD.update, [0]

    def stopped(self: Any, batch: Any, iteration: int) -> Any:
        seen[0] += iteration == 12
        if seen[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(LLMDPD, "update", stopped)
        assert train("--seeds", "0,5", "--run-dir", group, *options) == 143
    assert f"--resume {group}" in capsys.readouterr().out
    checkpoints = [latest_checkpoint(group / name / "checkpoint") for name in ("seed-0", "seed-5")]
    assert [checkpoint and checkpoint.name for checkpoint in checkpoints] == ["step-00000013"] * 2
    one = shutil.copytree(group / "seed-5", tmp_path / "one")
    # As if a kill had come before the second seed's first checkpoint.
    shutil.rmtree(group / "seed-5" / "checkpoint")
    assert train("--resume", group) == 0
    # Each can be gone on with alone.
    assert train("--resume", one) == 0
    assert checkpoint_of(group / "seed-5") == checkpoint_of(one) == checkpoint_of(straight)
    assert checkpoint_of(group / "seed-0") != checkpoint_of(straight)


def checkpoint_of(run: Path) -> dict[str, bytes]:
    folder = latest_checkpoint(run / "checkpoint")
    assert folder is not None
    assert folder.name == "step-00000020"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_a_seed_that_diverges_does_not_end_the_others(
    train: Any, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    update, first = LLMDPD.update, list[Any]()

    def broken(self: Any, batch: Any, iteration: int) -> Any:
        first.append(self)
        metrics = update(self, batch, iteration)
        return {name: value * float("nan") for name, value in metrics.items()} if self is first[0] else metrics

    monkeypatch.setattr(LLMDPD, "update", broken)
    assert train("--seeds", "0-1", "--run-dir", tmp_path / "group", *tiny_options, *UNJUDGED) == 1
    assert "seed 0: loss/critic became nan" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "group" / "seed-0" / "results.json").exists()
    assert (tmp_path / "group" / "seed-1" / "results.json").is_file()


def test_online_methods_take_turns(train: Any, tiny_options: list[str], tmp_path: Path, contents: Contents) -> None:
    options = [
        "--method",
        "sac",
        "--tasks.seen",
        "reach",
        "--tasks.unseen",
        "--iterations",
        40,
        "--method.learning-starts",
        30,
    ]
    options += ["--training.select-every", 0, "--evaluation", "none", "--threads", 1]
    assert train("--seeds", "0,3", "--run-dir", tmp_path / "group", *options) == 0
    assert train("--seed", 3, "--run-dir", tmp_path / "alone", *options) == 0
    names = ("networks.safetensors", "optimizers.safetensors", "random.safetensors")
    ours, theirs = (
        [(run / "checkpoint" / "step-00000040" / name).read_bytes() for name in names]
        for run in (tmp_path / "group" / "seed-3", tmp_path / "alone")
    )
    assert ours == theirs


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_seeds("0-3,8") == (0, 1, 2, 3, 8)
    assert parse_seeds("7") == (7,)
    for text, problem in (
        ("", "no seeds"),
        ("a", "no seeds"),
        ("-3", "no seeds"),
        ("1-", "no seeds"),
        ("9" * 5000, "no seeds"),
        ("0-" + "9" * 5000, "no seeds"),
        ("٣", "no seeds"),
        ("1,,2", "no seeds"),
        ("3-1", "ends before it begins"),
        ("0-3,2", "a seed twice"),
        ("0-300", "too many"),
        ("1,99999999999999999999", "out of range"),
    ):
        with pytest.raises(InputError, match=problem):
            parse_seeds(text)


def test_what_does_not_fit_is_refused(
    refused: Callable[..., str], together: Path, tiny_options: list[str], tmp_path: Path
) -> None:
    assert "one seed, and several" in refused("--seeds", "0-1", "--seed", 3, *tiny_options)
    assert "a policy is pushed of one seed" in refused("--seeds", "0-1", "--push", "./there", *tiny_options)
    error = refused("--seeds", "0-1", "--run-dir", together, *tiny_options)
    assert "not empty" in error
    assert f"--resume {together}" in error
    assert "own seeds" in refused("--resume", together, "--seeds", "0-1")
    assert "own seeds" in refused("--resume", together, "--method", "bc")
    assert "another configuration" in refused("--resume", together, "--seed", 3)
    assert "no such option" in refused("--seeds", "0-1", "--run-dir", tmp_path / "new", "--nonsense", 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "format version"),
        ('{"format": 2, "seeds": [0]}', "format version"),
        ('{"format": 1, "seeds": []}', "damaged"),
        ('{"format": 1, "seeds": [1, 1]}', "damaged"),
        ('{"format": 1, "seeds": ["a"]}', "damaged"),
        ('{"format": 1', "JSON"),
    ],
)
def test_a_damaged_list_of_seeds_is_named(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text(content)
    assert SeedsFolder.is_one(tmp_path)
    with pytest.raises(InputError, match=problem) as error:
        SeedsFolder.open(tmp_path)
    assert "seeds.json" in str(error.value)


def test_a_folder_without_any_run_is_begun_anew(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text('{"format": 1, "seeds": [0, 1]}')
    assert "no seed's run was begun" in refused("--resume", tmp_path)


def test_seeds_that_train_at_once_are_their_runs_alone(
    train: Any, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = [*tiny_options, *UNJUDGED, "--method.network.context.no-trajectory", "--method.self-prompted", 0]
    options += [f"--method.augmentation.{name}=0" for name in ("offset", "rotate", "mirror")]
    options += ["--method.network.context.kind", "pooled", "--method.network.context.features", "normalised"]
    group, alone = tmp_path / "group", tmp_path / "alone"
    update = Stack.update

    def stopped(self: Any, batches: Any, iteration: int, generators: Any) -> Any:
        if iteration == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batches, iteration, generators)

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "update", stopped)
        assert train("--seeds", "0,5,2", "--run-dir", group, *options) == 143
    assert "they train at once" in capsys.readouterr().out
    kept = [latest_checkpoint(group / f"seed-{seed}" / "checkpoint") for seed in (0, 5, 2)]
    assert [folder and folder.name for folder in kept] == ["step-00000013"] * 3
    shutil.rmtree(group / "seed-2" / "checkpoint")  # it catches up by itself
    assert train("--resume", group) == 0
    assert train("--run-dir", alone, "--seed", 5, *options) == 0
    assert checkpoint_of(group / "seed-5") == checkpoint_of(alone)
    records = [read_metrics(run / "metrics.jsonl") for run in (group / "seed-5", alone)]
    ours, theirs = ([{**r, "wall_seconds": 0} for r in found if r["iteration"] <= 10] for found in records)
    assert ours == theirs
    assert len(ours) == 1
