"""Runs of several seeds in turns: each ends in the bits of its run alone, whatever happens to it or the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmdpd.data import TrajectoryDataset
from llmdpd.errors import StopRequestedError
from llmdpd.methods.batch import PromptedBatch
from llmdpd.training.batches import BatchSampler
from llmdpd.training.config import TrainingConfig
from llmdpd.training.loop import Hooks, TrainingLoop
from llmdpd.training.metrics import read_metrics
from llmdpd.training.stopping import StopSignals
from llmdpd.training.together import Generators, Member, Together
from llmdpd.utils.checkpoint import latest_checkpoint

CONFIG = TrainingConfig(iterations=24, log_every=4, checkpoint_every=9, select_every=10)
CPU = torch.device("cpu")
SEEDS = (3, 0, 7)


class Toy:
    """Regresses actions on observations, with noise of torch's global generator."""

    def __init__(self) -> None:
        self.net = nn.Linear(39, 4)
        self.modules = {"net": self.net}
        self.optimizers = {"adam": torch.optim.Adam(self.net.parameters(), 1e-2)}
        self.breaks_at = -1

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        target = batch.actions + 0.1 * torch.randn_like(batch.actions)
        loss = (self.net(batch.observations) - target).square().mean()
        self.optimizers["adam"].zero_grad()
        loss.backward()
        self.optimizers["adam"].step()
        return {"loss/toy": loss.detach() * (float("nan") if iteration == self.breaks_at else 1.0)}


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


@pytest.fixture
def member(metaworld_data: Callable[..., TrajectoryDataset]) -> Callable[..., Member]:
    batches = BatchSampler(metaworld_data(), None, None, 4, 2, 0, CPU)

    def make(run: Path, seed: int, stop: Stop | None = None, breaks_at: int = -1) -> Member:
        run.mkdir(parents=True, exist_ok=True)
        generators = Generators(CPU)
        with generators.active():
            torch.manual_seed(seed)
            toy = Toy()
        toy.breaks_at = breaks_at

        def select() -> tuple[dict[str, float], float]:
            (stop or Stop()).check()
            return {"eval/seen_success": 0.5}, float(torch.rand(()))

        def keep(which: str, iteration: int) -> None:
            (run / f"{which}.txt").write_text(f"{iteration} {toy.net.weight.sum().item()!r}")

        loop = TrainingLoop(run, toy, batches.with_seed(seed), CONFIG, Hooks(select, keep), {}, f"seed {seed}")
        return Member(loop, generators)

    return make


@pytest.fixture
def alone(member: Callable[..., Member], tmp_path: Path) -> Callable[[int], dict[str, Any]]:
    """What a seed's run alone, by the loop itself, ends in."""

    def run(seed: int) -> dict[str, Any]:
        one = member(tmp_path / f"alone-{seed}", seed)
        with one.generators.active():
            one.loop.execute(Stop())
        return ends(one.loop.run)

    return run


def ends(run: Path) -> dict[str, Any]:
    checkpoint = latest_checkpoint(run / "checkpoint")
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())
    files = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    texts = {file.name: file.read_text() for file in run.glob("*.txt")}
    selections = [r["iteration"] for r in read_metrics(run / "metrics.jsonl") if "eval/seen_success" in r]
    return {"state": {**state, "elapsed": 0, "sha256_of_this": 0}, **files, **texts, "selections": selections}


def test_each_ends_as_alone(member: Any, alone: Any, tmp_path: Path) -> None:
    members = [member(tmp_path / f"{seed}", seed) for seed in SEEDS]
    Together(members).execute(Stop())
    found = [ends(one.loop.run) for one in members]
    assert found == [alone(seed) for seed in SEEDS]
    assert found[0]["networks.safetensors"] != found[1]["networks.safetensors"]
    records = [read_metrics(one.loop.run / "metrics.jsonl") for one in members]
    assert [[r["iteration"] for r in found] for found in records] == [
        [r["iteration"] for r in read_metrics(tmp_path / "alone-3" / "metrics.jsonl")]
    ] * 3


def test_stopped_at_every_check_all_go_on_as_if_they_had_not_been(member: Any, alone: Any, tmp_path: Path) -> None:
    straight = [alone(seed) for seed in SEEDS]
    checks = len(SEEDS) * (CONFIG.iterations + 3)
    for at in range(1, checks + 1, 11):
        stop = Stop(at)
        members = [member(tmp_path / f"{at}-{seed}", seed, stop) for seed in SEEDS]
        with pytest.raises(StopRequestedError):
            Together(members).execute(stop)
        for one in members:  # one that had not begun has nothing to save
            assert one.loop.iteration == 0 or latest_checkpoint(one.loop.run / "checkpoint") is not None
        again = [member(tmp_path / f"{at}-{seed}", seed) for seed in SEEDS]
        Together(again).execute(Stop())
        assert [ends(one.loop.run) for one in again] == straight, f"stopped at check {at}"


def test_one_that_is_behind_catches_up(member: Any, alone: Any, tmp_path: Path) -> None:
    ahead = member(tmp_path / "3", 3)
    with ahead.generators.active(), pytest.raises(StopRequestedError):
        ahead.loop.execute(Stop(15))
    members = [member(tmp_path / f"{seed}", seed) for seed in SEEDS]
    Together(members).execute(Stop())
    assert [ends(one.loop.run) for one in members] == [alone(seed) for seed in SEEDS]


def test_one_that_diverges_is_left_out(
    member: Any, alone: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [member(tmp_path / f"{seed}", seed, breaks_at=13 if seed == 0 else -1) for seed in SEEDS]
    Together(members).execute(Stop())
    assert "loss/toy became nan at iteration 14" in str(members[1].failed)
    assert "seed 0: loss/toy became nan" in capsys.readouterr().out
    assert [ends(members[n].loop.run) for n in (0, 2)] == [alone(3), alone(7)]
    assert ends(members[1].loop.run)["state"]["iteration"] == 9
