"""SAC in the environment: network and iterations are stable-baselines3's, episodes go round, it learns, it resumes."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.config.parse import parse_train
from llmdpd.data.replay_log import ReplayLog
from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.evaluation.results import read_results
from llmdpd.methods.sac import SAC, SACConfig, SACNetworkConfig, SACSteps
from llmdpd.nn.acting import NoisyActing
from llmdpd.nn.spaces import Spaces
from llmdpd.policy.policy import Policy
from llmdpd.tasks import COLLECTION_SEED_END
from llmdpd.tasks.specs import TaskSpec
from llmdpd.training.config import TrainingConfig
from llmdpd.training.loop import Hooks, TrainingLoop
from llmdpd.training.metrics import read_metrics
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.checkpoint import latest_checkpoint, save_checkpoint

pytest.importorskip("stable_baselines3")

S, A, STEPS = 4, 2, 8
NETWORK = SACNetworkConfig(hidden_dim=32)


class Kill(BaseException):
    """SIGKILL: nothing of the program's own runs after it."""


class Points:
    """The world of points as an environment of a task; notes what was asked of it."""

    def __init__(self, world: type[Any], task: str, log: list[tuple[str, int]]) -> None:
        self.world, self.task, self.log, self.terminated = world, task, log, False

    def reset(self, seed: int) -> np.ndarray:
        self.log.append((self.task, seed))
        self.here, self.taken = self.world(np.random.default_rng(seed)), 0
        self.state = self.here.start(1)
        return self.state[0]

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool]:
        self.state, reward = self.here.step(self.state, np.asarray(action, np.float32)[None])
        self.taken += 1
        return self.state[0], float(reward[0]), bool(reward[0] > -0.3), self.taken == STEPS

    def render(self) -> Any:
        raise NotImplementedError


@dataclasses.dataclass
class Lab:
    """Makes learners in worlds of points; `resets` are the episodes that began, (task, seed)."""

    world: type[Any]
    resets: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def method(self, tasks: tuple[str, ...] = ("a",), steps: int = 200, seed: int = 0, **settings: Any) -> SAC:
        specs = [TaskSpec(task, S, A, STEPS, "Meta-World") for task in tasks]
        config = SACConfig(network=NETWORK, **({"learning_starts": 20, "batch_size": 32} | settings))
        return SAC(
            SAC.build_network(Spaces(S, A, 0), NETWORK),
            config,
            specs,
            steps=steps,
            seed=seed,
            make=lambda task, visible, render: Points(self.world, task, self.resets),
        )


@pytest.fixture
def lab(world: Any) -> Lab:
    return Lab(type(world))


def advance(method: SAC, steps: SACSteps, count: int) -> list[dict[str, float]]:
    """So many iterations, as the loop does them; their metrics."""
    found = []
    for iteration in range(count):
        metrics = method.update(steps.next(), iteration)
        found.append({name: float(value) for name, value in metrics.items()})
    return found


def tensors(method: SAC) -> dict[str, torch.Tensor]:
    """Everything that it has learned, and the steps that it has taken."""
    found = {
        f"{name}/{key}": t.clone() for name, module in method.modules.items() for key, t in module.state_dict().items()
    }
    return found | {name: torch.from_numpy(array) for name, array in method.trainer.transitions().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_exported_network_is_the_actor(lab: Lab, tmp_path: Path, rng: np.random.Generator) -> None:
    method = lab.method(steps=60, seed=int(rng.integers(1000)))
    steps = SACSteps(method, tmp_path)
    advance(method, steps, 40)
    before = method.acting_network.net[0].weight.clone()
    advance(method, steps, 20)
    assert not torch.equal(method.acting_network.net[0].weight, before), "it has the present weights"
    # Further than ±10, where normalised features are cut off.
    states = rng.normal(0, 8, (50, S)).astype(np.float32)
    policy = Policy("sac", method.acting_network, None, NoisyActing())
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy").prompt()
    expected, _ = method.trainer._model.predict(states, deterministic=True)
    np.testing.assert_allclose(loaded.act(states), expected, atol=1e-5)
    condition = loaded.network.condition(
        torch.from_numpy(states), loaded.encode_prompts([None], [None]), None, torch.zeros(50, dtype=torch.long)
    )
    with torch.no_grad():
        mean, log_std = loaded.network.statistics(condition)
        actor: Any = method.trainer.actor
        own_mean, own_log_std, _ = actor.get_action_dist_params(torch.from_numpy(states))
    torch.testing.assert_close(mean, own_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_std, own_log_std, rtol=1e-4, atol=1e-5)
    # Samples: before the tanh normal, with that mean and deviation.
    moderate = (0.1 * states[:1]).repeat(4000, 0)
    sampled = loaded.with_acting(noise_scale=1.0).prompt().act(moderate)
    with torch.no_grad():
        centre, spread, _ = actor.get_action_dist_params(torch.from_numpy(moderate[:1]))
    z = (np.arctanh(np.clip(sampled, -1 + 1e-6, 1 - 1e-6)) - centre.numpy()) / spread.exp().numpy()
    assert np.abs(np.median(z, 0)).max() < 0.1
    assert np.abs(np.quantile(z, 0.8413, 0) - 1).max() < 0.15


def test_an_iteration_is_stable_baselines3s_own(lab: Lab, tmp_path: Path, rng: np.random.Generator) -> None:
    """Step and gradient step, one after the other, are its `learn`, bit for bit."""
    seed = int(rng.integers(1000))
    one, other = lab.method(seed=seed), lab.method(seed=seed)
    found = advance(one, SACSteps(one, tmp_path), 60)
    with other.trainer.own_random():
        other.trainer._model.learn(60)
    assert_same(tensors(one), tensors(other))
    assert [bool(metrics.keys() & {"loss/critic"}) for metrics in found] == [False] * 20 + [True] * 40


def test_episodes_go_round_the_tasks(lab: Lab, tmp_path: Path, rng: np.random.Generator) -> None:
    method = lab.method(("a", "b", "c"), max_steps=5)
    found = advance(method, SACSteps(method, tmp_path), 37)
    assert [task for task, _ in lab.resets] == ["a", "b", "c", "a", "b", "c", "a", "b"]
    seeds = [seed for _, seed in lab.resets]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < COLLECTION_SEED_END
    assert method.trainer.seeds.tolist() == seeds
    assert [n for n, metrics in enumerate(found, 1) if "rollout/return" in metrics] == [5, 10, 15, 20, 25, 30, 35]
    rewards = method.trainer.transitions()["rewards"]
    assert found[9]["rollout/return"] == pytest.approx(rewards[5:10].sum(), rel=1e-5)
    assert found[9]["rollout/success"] == float((rewards[5:10] > -0.3).any())
    # Alone, a task's episodes are those of a collection of it.
    alone, before = lab.method(("a",), max_steps=5), len(lab.resets)
    advance(alone, SACSteps(alone, tmp_path / "alone"), 7)
    assert lab.resets[before:] == [("a", seeds[0]), ("a", int(alone.trainer.seeds[1]))]


def loop_of(method: SAC, run: Path, kept: list[tuple[str, int]]) -> TrainingLoop:
    config = TrainingConfig(iterations=60, log_every=7, checkpoint_every=11, select_every=0)
    run.mkdir(exist_ok=True)
    hooks = Hooks(lambda: ({}, 0.0), lambda which, iteration: kept.append((which, iteration)))
    return TrainingLoop(run, method, SACSteps(method, run / "replay"), config, hooks, {})


@pytest.mark.parametrize("where", ["in an iteration", "between steps and checkpoint", "before any checkpoint"])
def test_killed_anywhere_and_resumed_it_is_the_same(
    where: str, lab: Lab, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, seed = ("a", "b", "c"), int(rng.integers(1000))
    straight = lab.method(tasks, 60, seed, max_steps=5)
    loop_of(straight, tmp_path / "straight", []).execute(StopSignals())
    run, update = tmp_path / "run", SAC.update
    for attempt in range(3):
        with monkeypatch.context() as patch:
            at = int(rng.integers(1, 10)) if where.startswith("before") else 13 + 14 * attempt + int(rng.integers(0, 9))
            method = lab.method(tasks, 60, seed, max_steps=5)

            def killed(self: SAC, batch: Any, iteration: int, at: int = at) -> Any:
                if iteration == at:
                    raise Kill
                return update(self, batch, iteration)

            def unsaved(folder: Path, method: SAC, iteration: int, *rest: Any, at: int = at) -> Any:
                if iteration >= at or where.startswith("before"):
                    raise Kill
                return save_checkpoint(folder, method, iteration, *rest)

            if where == "in an iteration":
                patch.setattr(SAC, "update", killed)
            else:
                patch.setattr("llmdpd.utils.checkpoint.save_checkpoint", unsaved)
            with pytest.raises(Kill):
                loop_of(method, run, []).execute(StopSignals())
            assert list((run / "replay").glob("steps-*.npz")), "something was written that nobody counts on"
            if where == "before any checkpoint":
                assert latest_checkpoint(run / "checkpoint") is None
                (run / "replay" / "steps-000000000-000000004.npz").write_bytes(b"another's")
    method = lab.method(tasks, 60, seed, max_steps=5)
    loop_of(method, run, []).execute(StopSignals())
    assert_same(tensors(method), tensors(straight))
    # And what is on disk serves for going on.
    for folder in (run, tmp_path / "straight"):
        again = lab.method(tasks, 60, seed, max_steps=5)
        loop_of(again, folder, []).execute(StopSignals())
        assert_same(tensors(again), tensors(straight))


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = ReplayLog.append

    def full(self: ReplayLog, arrays: Any, end: int) -> None:
        if end > 22:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, arrays, end)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ReplayLog, "append", full)
        with pytest.raises(InputError, match="room on the disk") as caught:
            loop_of(lab.method(steps=60), run, []).execute(StopSignals())
    assert "step-00000022 is whole" in str(caught.value.hint)
    method = lab.method(steps=60)
    loop_of(method, run, []).execute(StopSignals())
    assert method.trainer.steps == 60


def test_it_learns(lab: Lab, world: Any, tmp_path: Path, fresh_seed: int) -> None:
    """In 500 steps it goes more than half of the way from random actions to the best ones."""
    method = lab.method(("a", "b"), 500, fresh_seed % 1000, learning_starts=100, lr=2e-3, gamma=0.9, tau=0.02)
    found = advance(method, SACSteps(method, tmp_path), 500)
    policy = Policy("sac", method.acting_network, None, NoisyActing())
    behaviour, _ = world.episodes(world.anyhow, 300)
    world.check(policy.prompt(), behaviour, 0.5)
    assert found[-1]["temperature"] < found[101]["temperature"]


def test_a_loss_that_diverges_ends_the_training(lab: Lab, tmp_path: Path) -> None:
    method = lab.method(lr=1e30)
    with pytest.raises(TrainingDivergedError, match=r"method\.lr|NaN|nan|inf"):
        loop_of(method, tmp_path / "run", []).execute(StopSignals())


@pytest.mark.parametrize(
    ("words", "field", "expected"),
    [
        (("--method.network.action-bound", "2"), "method.network.action_bound", "1"),
        (("--method.max-steps", "501"), "method.max_steps", "1 to 500"),
        (("--method.gamma", "1.5"), "method.gamma", "0 to 1"),
        (("--method.learning-starts", "100", "--iterations", "100"), "method.learning_starts", "below 100"),
    ],
)
def test_values_that_do_not_fit_are_named(words: tuple[str, ...], field: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_train(["--method", "sac", *words])
    assert caught.value.field == field
    assert expected in str(caught.value.expected)


def test_what_it_starts_from() -> None:
    config = parse_train(["--method", "sac", "--protocol", "paper", "--method.max-steps", "50"]).method
    assert config == SACConfig(max_steps=50)
    context = config.network.context_config()
    assert (context.kind, context.features, context.text, context.trajectory) == ("pooled", "raw", False, False)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_replay_is_named(damage: str, lab: Lab, tmp_path: Path) -> None:
    loop_of(lab.method(steps=60), tmp_path, []).execute(StopSignals())
    piece = tmp_path / "replay" / "steps-000000011-000000022.npz"
    if damage == "cut":
        piece.write_bytes(piece.read_bytes()[:200])
    else:
        piece.unlink()
    with pytest.raises(InputError, match="is damaged" if damage == "cut" else "is missing") as error:
        loop_of(lab.method(steps=60), tmp_path, []).execute(StopSignals())
    assert "replay" in str(error.value.path)


def test_without_the_package_a_policy_acts_and_training_says_how_to_get_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Policy("sac", lab.method().acting_network, None, NoisyActing()).save(tmp_path)
    SACConfig().require()
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    assert Policy.load(tmp_path).prompt().act(np.zeros(S, np.float32)).shape == (A,)
    for needs in (SACConfig().require, lab.method):
        with pytest.raises(InputError, match=r"pip install 'llmdpd\[sac\]'"):
            needs()


TINY = {
    **{"training.iterations": 30, "training.log-every": 10, "training.select-every": 0, "method.batch-size": 8},
    **{"training.checkpoint-every": 10, "method.learning-starts": 12, "method.max-steps": 4},
    **{"evaluation.max-steps": 3, "evaluation.episodes": 1, "data.workers": 1, "threads": 1},
}


def test_a_run_says_that_it_was_online(tmp_path: Path, train: Callable[..., int]) -> None:
    run, words = tmp_path / "run", [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    words += ["--method.network.hidden-dim", "8", "--evaluation.no-videos"]
    words += ["--tasks.seen", "reach", "push", "--tasks.unseen", "door-lock"]
    assert train("--run-dir", run, "--method", "sac", *words) == 0
    records = read_results(run / "results.json")
    assert {(record.task, record.split) for record in records} == {
        ("reach-v3", "seen"), ("push-v3", "seen"), ("door-lock-v3", "unseen")
    }  # fmt: skip
    data = "online: no data set; 30 steps in the environments of the tasks that it is trained on, episodes cut at 4"
    assert all(record.training_data.startswith(data) for record in records)
    assert data in (run / "report.html").read_text()
    assert not (run / "prompt_data").exists()
    assert "stable-baselines3" in json.loads((run / "meta.json").read_text())["versions"]
    assert sorted(path.name for path in (run / "replay").iterdir()) == [
        f"steps-{start:09d}-{start + 10:09d}.npz" for start in (0, 10, 20)
    ]
    metrics = read_metrics(run / "metrics.jsonl")
    assert [record["iteration"] for record in metrics] == [10, 20, 30]
    assert ["loss/critic" in record for record in metrics] == [False, True, True], "the warm-up has no loss"
    assert "rollout/return" in metrics[0]
