"""The loop on a toy agent, stopped and killed at every kind of moment."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmdpd.data import TrajectoryDataset
from llmdpd.errors import InputError, StopRequestedError, TrainingDivergedError
from llmdpd.methods.batch import PromptedBatch
from llmdpd.training.batches import BatchSampler
from llmdpd.training.config import TrainingConfig
from llmdpd.training.loop import Hooks, TrainingLoop, _selection_words
from llmdpd.training.metrics import read_metrics
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.checkpoint import latest_checkpoint, load_checkpoint

CONFIG = TrainingConfig(iterations=40, log_every=4, checkpoint_every=9, select_every=10)


class Kill(BaseException):
    """SIGKILL: nothing of the loop's own runs after it."""


class Toy:
    """Regresses actions on observations, with noise of torch's global generator."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.net = nn.Linear(39, 4)
        self.modules = {"net": self.net}
        self.optimizers = {"adam": torch.optim.Adam(self.net.parameters(), 1e-2)}
        self.before: Callable[[int], None] = lambda iteration: None

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        self.before(iteration)
        target = batch.actions + 0.1 * torch.randn_like(batch.actions)
        loss = (self.net(batch.observations) - target).square().mean()
        self.optimizers["adam"].zero_grad()
        loss.backward()
        self.optimizers["adam"].step()
        return {"loss/diffusion": loss.detach(), "loss/other": loss.detach() * 2}


class Stop(StopSignals):
    """Asks to stop at the n-th check."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.left = at

    def check(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise StopRequestedError(15)


@dataclass
class Trial:
    """One loop over a run folder, and what its hooks saw."""

    run: Path
    dataset: TrajectoryDataset
    config: TrainingConfig = CONFIG
    scores: dict[int, float] = field(default_factory=dict)
    selected: list[int] = field(default_factory=list)
    kept: list[tuple[str, int]] = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)

    def __post_init__(self) -> None:
        self.agent = Toy()
        sampler = BatchSampler(self.dataset, None, None, 4, 2, 0, torch.device("cpu"))
        hooks = Hooks(self.select, self.keep)
        self.loop = TrainingLoop(self.run, self.agent, sampler, self.config, hooks, {"fact": "kept"})

    def select(self) -> tuple[dict[str, float], float]:
        for _ in range(3):
            self.stop.check()
        self.selected.append(self.loop.iteration)
        score = self.scores.get(self.loop.iteration, 0.5)
        return {"eval/seen_success": score}, score

    def keep(self, which: str, iteration: int) -> None:
        self.kept.append((which, iteration))
        (self.run / f"{which}.txt").write_text(f"{iteration} {self.agent.net.weight.sum().item()!r}")

    def execute(self) -> Trial:
        self.loop.execute(self.stop)
        return self


@pytest.fixture
def trial(metaworld_data: Callable[..., TrajectoryDataset], tmp_path: Path) -> Callable[..., Trial]:
    dataset = metaworld_data()

    def make(name: str, **changes: Any) -> Trial:
        (tmp_path / name).mkdir(exist_ok=True)
        return Trial(tmp_path / name, dataset, **changes)

    return make


def ends(run: Path) -> dict[str, Any]:
    """What a run comes to."""
    checkpoint = latest_checkpoint(run / "checkpoint")
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())
    files = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    texts = {file.name: file.read_text() for file in run.glob("*.txt")}
    return {"state": {**state, "elapsed": None, "sha256_of_this": None}, **files, **texts}


def records(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k != "wall_seconds"} for r in read_metrics(run / "metrics.jsonl")]


def test_killed_before_the_older_checkpoint_was_removed(trial: Callable[..., Trial]) -> None:
    """The resumed run removes it, even where nothing is left to train."""
    one = trial("run").execute()
    whole = latest_checkpoint(one.run / "checkpoint")
    assert whole is not None
    shutil.copytree(whole, whole.with_name("step-00000001"))
    trial("run").execute()
    assert list((one.run / "checkpoint").iterdir()) == [whole]


def test_marks_of_a_straight_run(trial: Callable[..., Trial]) -> None:
    one = trial("run", scores={10: 0.2, 20: 0.7, 30: 0.6, 40: 0.7}).execute()
    assert one.selected == [10, 20, 30, 40]
    assert one.kept == [
        *[("last", 9), ("best", 10), ("last", 18), ("best", 20), ("last", 27), ("last", 36), ("best", 40)],
        ("last", 40),
    ]
    state = ends(one.run)["state"]
    assert (state["iteration"], state["best_score"], state["fact"]) == (40, 0.7, "kept")
    found = records(one.run)
    assert [r["eval/seen_success"] for r in found if "eval/seen_success" in r] == [0.2, 0.7, 0.6, 0.7]
    losses = [r["iteration"] for r in found if "loss/diffusion" in r]
    assert losses == sorted({*range(4, 41, 4), 9, 18, 27, 36, 10, 20, 30, 40})


def test_a_record_is_the_mean_since_the_last(trial: Callable[..., Trial]) -> None:
    one = trial("run")
    losses: list[float] = []
    update = one.agent.update

    def noted(batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        metrics = update(batch, iteration)
        losses.append(metrics["loss/diffusion"].item())
        return metrics

    one.agent.update = noted  # type: ignore[method-assign]
    one.execute()
    start = 0
    for record in (r for r in records(one.run) if "loss/diffusion" in r):
        end = int(record["iteration"])
        assert record["loss/diffusion"] == pytest.approx(np.mean(losses[start:end]), rel=1e-6)
        start = end
    assert start == 40


def test_without_selection_there_is_no_best(trial: Callable[..., Trial]) -> None:
    config = TrainingConfig(iterations=10, log_every=5, select_every=0)
    one = trial("run", config=config).execute()
    assert one.selected == []
    assert one.kept == [("last", 10)]


def test_stopped_at_every_check_it_ends_as_the_straight_run(trial: Callable[..., Trial]) -> None:
    straight = trial("straight").execute()
    checks = 40 + 4 * 3
    for at in range(1, checks + 1, 5):
        with pytest.raises(StopRequestedError):
            trial(f"stop{at}", stop=Stop(at)).execute()
        again = trial(f"stop{at}").execute()
        assert ends(again.run) == ends(straight.run), f"stopped at check {at}"
        selections = [r["iteration"] for r in records(again.run) if "eval/seen_success" in r]
        assert selections == [10, 20, 30, 40]


def test_killed_at_any_moment_it_ends_as_the_straight_run(
    trial: Callable[..., Trial], rng: np.random.Generator
) -> None:
    straight = trial("straight").execute()
    for number in range(8):
        at, where = int(rng.integers(1, 31)), ("update", "select", "best", "last")[number % 4]
        first = trial(f"kill{number}")
        kill_at(first, at, where)
        with pytest.raises(Kill):
            first.execute()
        again = trial(f"kill{number}").execute()
        assert ends(again.run) == ends(straight.run), f"killed at {at}, {where}"
        assert records(again.run) == records(straight.run)


def kill_at(one: Trial, at: int, where: str) -> None:
    """Raise Kill at the first moment of this kind from iteration `at` on."""

    def kill(iteration: int) -> None:
        if iteration >= at:
            raise Kill

    if where == "update":
        one.agent.before = kill
    elif where == "select":
        select = one.loop.hooks.select
        one.loop.hooks.select = lambda: (kill(one.loop.iteration), select())[1]  # type: ignore[func-returns-value]
    else:
        keep = one.loop.hooks.keep

        def keep_and_kill(which: str, iteration: int) -> None:
            keep(which, iteration)
            if which == where:
                kill(iteration)  # the policy is written, its checkpoint is not

        one.loop.hooks.keep = keep_and_kill


def test_a_kill_between_the_last_policy_and_its_checkpoint_leaves_no_old_policy(trial: Callable[..., Trial]) -> None:
    first = trial("run")
    kill_at(first, 37, "last")
    with pytest.raises(Kill):
        first.execute()
    again = trial("run").execute()
    assert (again.run / "last.txt").read_text().startswith("40 ")
    assert ends(again.run) == ends(trial("straight").execute().run)


def test_a_finished_run_does_nothing_more(trial: Callable[..., Trial]) -> None:
    before = ends(trial("run").execute().run)
    again = trial("run").execute()
    assert again.kept == []
    assert again.selected == []
    assert ends(again.run) == before


def test_seconds_add_up_over_a_resume(trial: Callable[..., Trial]) -> None:
    with pytest.raises(StopRequestedError):
        trial("run", stop=Stop(20)).execute()
    checkpoint = latest_checkpoint(trial("run").run / "checkpoint")
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"], state["sha256_of_this"]  # as of an earlier version
    (checkpoint / "state.json").write_text(json.dumps({**state, "elapsed": 1000.0}))
    assert trial("run").loop.execute(Stop()) > 1000


@pytest.mark.parametrize(("at", "kept"), [(5, None), (30, 27)])
def test_nan_is_named_and_nothing_bad_is_kept(trial: Callable[..., Trial], at: int, kept: int | None) -> None:
    one = trial("run")
    update = one.agent.update

    def broken(batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        metrics = update(batch, iteration)
        return {**metrics, "loss/other": torch.tensor(float("inf"))} if iteration == at else metrics

    one.agent.update = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingDivergedError) as error:
        one.execute()
    assert f"loss/other became inf at iteration {at + 1}" in str(error.value)
    assert ("There was no checkpoint yet" if kept is None else f"step-{kept:08d}") in str(error.value)
    assert all(iteration <= at for _, iteration in one.kept)
    assert all(r["iteration"] <= at for r in records(one.run))


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_disk_that_refuses_the_policy(trial: Callable[..., Trial], which: str) -> None:
    one = trial("run")

    def keep(name: str, iteration: int) -> None:
        if iteration >= 20 and name == which:
            raise OSError(errno.ENOSPC, "No space left on device")
        one.keep(name, iteration)

    one.loop.hooks.keep = keep
    with pytest.raises(InputError) as error:
        one.execute()
    assert f"the {which} policy could not be written" in str(error.value)
    assert "step-00000018 is whole" in str(error.value)
    assert ends(trial("run").execute().run) == ends(trial("straight").execute().run)


def test_a_selection_of_many_tasks_tells_the_lowest() -> None:
    few = {"eval/seen_success": 0.5, "eval/a-v3": 0.0, "eval/b-v3": 1.0}
    assert _selection_words(few) == "seen_success 50%, a-v3 0%, b-v3 100%"
    many = {"eval/seen_success": 0.95} | {f"eval/t{n}-v3": 0.25 if n == 17 else 1.0 for n in range(45)}
    words = _selection_words(many)
    assert words.startswith("seen_success 95% over 45 tasks; lowest: t17-v3 25%, ")
    assert words.count("%") == 8


@pytest.mark.parametrize("part", ["a weight", "an optimiser's state"])
@pytest.mark.parametrize("at", [9, 29, 39])  # before a selection, a checkpoint, the end
def test_nan_that_no_loss_has_seen_is_not_kept(trial: Callable[..., Trial], part: str, at: int) -> None:
    one = trial("run")
    update = one.agent.update

    def broken(batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        metrics = update(batch, iteration)
        if iteration == at:
            state = next(iter(one.agent.optimizers["adam"].state.values()))["exp_avg"]
            (one.agent.net.weight.data if part == "a weight" else state)[0, 0] = float("nan")
        return metrics

    one.agent.update = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingDivergedError, match="NaN or Inf in the"):
        one.execute()
    assert all(iteration <= at for _, iteration in one.kept)
    kept = latest_checkpoint(one.run / "checkpoint")
    if kept is not None:
        other = Toy()
        load_checkpoint(kept, other)
        assert all(bool(torch.isfinite(p).all()) for p in other.net.parameters())
