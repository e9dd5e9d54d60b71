"""SAC's medium-replays: what is in them, and that a stopped or killed collection ends as one that never stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from llmdpd.cli.collect import main
from llmdpd.data import TrajectoryDataset, load_dataset
from llmdpd.data.collecting.medium_replay import MediumReplayConfig, collect_sac, replay_path
from llmdpd.data.collecting.sac_trainer import SacTrainer
from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.tasks import COLLECTION_SEED_END
from llmdpd.tasks.locomotion import LocomotionTask, normalised_score
from llmdpd.tasks.metaworld.environment import make_task
from llmdpd.utils.checkpoint import latest_checkpoint

pytest.importorskip("stable_baselines3")

PATIENCE = 120.0
HOPPER = {"steps": 300, "evaluate_every": 150, "evaluation_episodes": 2}
WORDS = ["--policy", "sac", "--tasks", "hopper", "--steps", "300", "--evaluate-every", "150"]
WORDS += ["--evaluation-episodes", "2"]


class StopNowError(Exception):
    pass


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a collection that was never disturbed."""
    out = tmp_path_factory.mktemp("sac")
    collect_sac(MediumReplayConfig(out=out, **HOPPER))
    return replay_path(out, "hopper")


def same(a: Path, b: Path) -> bool:
    with h5py.File(a) as one, h5py.File(b) as two:
        attributes = dict(one.attrs) == dict(two.attrs)
        return attributes and set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)


def test_the_file_is_the_whole_replay_in_d4rls_layout(straight: Path) -> None:
    with h5py.File(straight) as file:
        assert {name: file[name].shape for name in file} == {
            "observations": (300, 11),
            "next_observations": (300, 11),
            "actions": (300, 3),
            "rewards": (300,),
            "terminals": (300,),
            "timeouts": (300,),
        }
        about = dict(file.attrs)
        assert file["timeouts"][-1] or file["terminals"][-1], "the last episode is closed"
    assert about["environment"] == "Hopper-v4"
    assert about["collector"] == "stable-baselines3 SAC replay, 300 steps, below medium"
    summary = json.loads(straight.with_name(f"{straight.name}.json").read_text())
    assert summary["level"] == normalised_score("hopper", about["final_eval_return"])
    assert summary["reached"] is False
    assert sorted(path.name for path in straight.parent.iterdir()) == [straight.name, f"{straight.name}.json"]


def test_the_transitions_are_the_environments(straight: Path) -> None:
    """A recorded episode's actions, driven again from its seed, give its observations, rewards and end."""
    from llmdpd.data.collecting.sac_trainer import episode_seed

    data = load_dataset(straight)
    environment = LocomotionTask("Hopper-v4")
    for number in (0, 3):
        episode = data.episode(number)
        observation = environment.reset(episode_seed(0, "Hopper-v4", number))
        for step, action in enumerate(episode.actions):
            np.testing.assert_allclose(observation, episode.observations[step], atol=1e-4)
            observation, reward, _, over = environment.step(action)
            assert reward == pytest.approx(episode.rewards[step], abs=1e-3)
        assert over, "the episode ends where the environment ends it"
        assert environment.terminated == data.terminals[data.offsets[number + 1] - 1]


def test_stopped_at_any_slice_it_ends_in_the_same_bits(straight: Path, tmp_path: Path) -> None:
    for stop_at in (0, 100, 150, 250):
        calls: list[int] = []

        def stop(task: str, done: int, total: int, words: str, at: int = stop_at, calls: list[int] = calls) -> None:
            calls.append(done)
            if done >= at:
                raise StopNowError

        with pytest.raises(StopNowError):
            collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER), stop)
        assert not replay_path(tmp_path, "hopper").exists()
    seen: list[int] = []
    (collected,) = collect_sac(
        MediumReplayConfig(out=tmp_path, **HOPPER), lambda task, done, total, words: seen.append(done)
    )
    assert seen[0] == 250, "it goes on where it was"
    assert same(collected.path, straight)
    assert len(list(tmp_path.iterdir())) == 2, "nothing is left over"


def test_interrupted_within_a_slice_it_ends_in_the_same_bits(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step has half done is not saved: the collection goes on from its last checkpoint, here of step 150."""
    learn, seen = SacTrainer.learn, list[int]()

    def interrupted(self: SacTrainer) -> dict[str, float]:
        if self.steps == 230:
            raise KeyboardInterrupt
        return learn(self)

    with monkeypatch.context() as patch:
        patch.setattr(SacTrainer, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER))
    (collected,) = collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER), lambda task, done, *_: seen.append(done))
    assert seen[0] == 150
    assert same(collected.path, straight)


def test_what_is_there_is_taken_and_another_collection_is_refused(straight: Path, tmp_path: Path) -> None:
    (again,) = collect_sac(MediumReplayConfig(out=straight.parent, **HOPPER))
    assert again.reused
    assert again.dataset.num_transitions == 300
    with pytest.raises(InputError, match="not the requested collection") as caught:
        collect_sac(MediumReplayConfig(out=straight.parent, **(HOPPER | {"seed": 1})))
    assert "seed: 0 → 1" in str(caught.value.found)
    foreign = replay_path(tmp_path, "hopper")
    foreign.write_bytes(b"mine")
    with pytest.raises(InputError, match="not the requested collection"):
        collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER))
    assert foreign.read_bytes() == b"mine"


def test_an_interrupted_collection_with_other_settings_or_damage_is_refused(tmp_path: Path) -> None:
    def stop(task: str, done: int, total: int, words: str) -> None:
        if done:
            raise StopNowError

    with pytest.raises(StopNowError):
        collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER), stop)
    with pytest.raises(InputError, match="other settings"):
        collect_sac(MediumReplayConfig(out=tmp_path, **(HOPPER | {"steps": 301})))
    (piece,) = (tmp_path / ".hopper-medium-replay.hdf5.partial").glob("steps-*.npz")
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER))


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(task: str, done: int, total: int, words: str) -> None:
        if done >= 200:
            raise StopNowError

    with pytest.raises(StopNowError):
        collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER), stop)
    folder = tmp_path / ".hopper-medium-replay.hdf5.partial" / "checkpoint"
    kept = latest_checkpoint(folder)
    real = SacTrainer.advance

    def advance(trainer: SacTrainer, count: int) -> None:
        real(trainer, count)
        next(trainer.modules["policy"].critic.parameters()).data[0, 0] = torch.nan  # which no action needs

    monkeypatch.setattr(SacTrainer, "advance", advance)
    with pytest.raises(TrainingDivergedError, match="NaN or Inf in the weights policy/critic"):
        collect_sac(MediumReplayConfig(out=tmp_path, **HOPPER))
    assert latest_checkpoint(folder) == kept
    assert not replay_path(tmp_path, "hopper").exists()


def test_it_stops_at_the_level(tmp_path: Path) -> None:
    (collected,) = collect_sac(MediumReplayConfig(out=tmp_path, level=0.01, **(HOPPER | {"evaluate_every": 120})))
    assert collected.dataset.num_transitions in (120, 240, 300)
    assert collected.reached == (collected.level >= 0.01)
    with h5py.File(collected.path) as file:
        collector = file.attrs["collector"]
    assert collector.endswith("stopped at level 0.01" if collected.reached else "300 steps, below level 0.01")


def metaworld(tmp_path: Path) -> TrajectoryDataset:
    config = MediumReplayConfig(("reach",), level=100, out=tmp_path, max_steps=25, **(HOPPER | {"steps": 160}))
    return collect_sac(config)[0].dataset


def test_metaworld_becomes_minari_with_seeds_and_successes(tmp_path: Path) -> None:
    data = metaworld(tmp_path)
    assert data.tasks == ("reach-v3",)
    assert data.goal_visible is True
    assert data.lengths.tolist() == [25] * 6 + [10]
    assert not data.terminals.any()
    assert set(data.successes.tolist()) <= {0, 1}
    assert len(set(data.seeds.tolist())) == 7
    assert (data.seeds >= 0).all()
    assert (data.seeds < COLLECTION_SEED_END).all()
    environment = make_task("reach")
    observation, success = environment.reset(int(data.seeds[2])), False
    episode = data.episode(2)
    for step, action in enumerate(episode.actions):
        np.testing.assert_allclose(observation, episode.observations[step], atol=1e-4)
        observation, _, flag, _ = environment.step(action)
        success = success or flag
    assert success == bool(episode.success)
    assert load_dataset(tmp_path, tasks=["reach"]).num_episodes == 7


def test_the_process_keeps_its_own_random_numbers(tmp_path: Path) -> None:
    import random

    import torch

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    metaworld(tmp_path)
    assert draw() == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("hoper",)}, "task"),
        ({"steps": 0}, "steps"),
        ({"level": 0.0}, "level"),
        ({"level": float("nan")}, "level"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"max_steps": 0}, "max_steps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        collect_sac(MediumReplayConfig(out=tmp_path, **change))
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_policy_and_a_missing_package_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(InputError, match=r"(?s)not installed.*pip install"):
        collect_sac(MediumReplayConfig(out=tmp_path))
    assert main(["--policy", "ppo"]) == 2
    assert "scripted or sac" in capsys.readouterr().err


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_command_goes_on_and_ends_in_the_same_bits(straight: Path, tmp_path: Path, end: int) -> None:
    command = [sys.executable, "-m", "llmdpd.collect", *WORDS, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    partial = tmp_path / ".hopper-medium-replay.hdf5.partial"
    deadline = time.monotonic() + PATIENCE
    while latest_checkpoint(partial / "checkpoint") is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(end)
    output, _ = process.communicate(timeout=PATIENCE)
    if end == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    elif process.returncode:  # else it was done before the signal came
        assert process.returncode == 143
        assert "run the same command again" in output
        assert not list(partial.rglob(".*tmp*"))
    assert main([*WORDS, "--out", str(tmp_path)]) == 0
    assert same(tmp_path / straight.name, straight)
