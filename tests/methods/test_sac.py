"""SAC in the environment: network and iterations are stable-baselines3's, episodes go round, it learns, it resumes."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdpd.cli.train import configuration
from llmdpd.config.schema import TrainConfig, TrainingConfig
from llmdpd.data.replay_log import ReplayLog
from llmdpd.errors import InputError, TrainingDivergedError
from llmdpd.evaluation.results import read_results
from llmdpd.methods.acting import ActingConfig
from llmdpd.methods.networks import make_network
from llmdpd.methods.registry import make_agent
from llmdpd.methods.sac import SAC, SACConfig, SACSteps
from llmdpd.nn.actor import SACActor
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.policy_network import PolicyConfig
from llmdpd.policy.policy import Policy
from llmdpd.tasks import COLLECTION_SEED_END
from llmdpd.tasks.specs import TaskSpec
from llmdpd.training.loop import Hooks, TrainingLoop
from llmdpd.training.metrics import read_metrics
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.checkpoint import latest_checkpoint, save_checkpoint

pytest.importorskip("stable_baselines3")

S, A, STEPS = 4, 2, 8
POLICY = PolicyConfig(hidden_dim=32, context=ContextConfig(text=False, trajectory=False, features="raw"))


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
    """Makes agents in worlds of points; `resets` are the episodes that began, (task, seed)."""

    world: type[Any]
    resets: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def agent(self, tasks: tuple[str, ...] = ("a",), steps: int = 200, seed: int = 0, **settings: Any) -> SAC:
        specs = [TaskSpec(task, S, A, STEPS, "Meta-World") for task in tasks]
        network = make_network("sac", S, A, 0, POLICY)
        assert isinstance(network, SACActor)
        config = SACConfig(**({"learning_starts": 20} | settings))
        return SAC(
            network,
            config,
            specs,
            steps=steps,
            batch_size=32,
            seed=seed,
            make=lambda task, visible, render: Points(self.world, task, self.resets),
        )


@pytest.fixture
def lab(world: Any) -> Lab:
    return Lab(type(world))


def advance(agent: SAC, steps: SACSteps, count: int) -> list[dict[str, float]]:
    """So many iterations, as the loop does them; their metrics."""
    found = []
    for iteration in range(count):
        metrics = agent.update(steps.next(), iteration)
        found.append({name: float(value) for name, value in metrics.items()})
    return found


def tensors(agent: SAC) -> dict[str, torch.Tensor]:
    """Everything that it has learned, and the steps that it has taken."""
    found = {
        f"{name}/{key}": t.clone() for name, module in agent.modules.items() for key, t in module.state_dict().items()
    }
    return found | {name: torch.from_numpy(array) for name, array in agent.trainer.transitions().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_exported_network_is_the_actor(lab: Lab, tmp_path: Path, rng: np.random.Generator) -> None:
    agent = lab.agent(steps=60, seed=int(rng.integers(1000)))
    advance(agent, SACSteps(agent, tmp_path), 60)
    # Further than ±10, where normalised features are cut off.
    states = rng.normal(0, 8, (50, S)).astype(np.float32)
    policy = Policy(agent.ema_policy, None, ActingConfig(samples=1, noise_scale=0.0))
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy").prompt()
    expected, _ = agent.trainer._model.predict(states, deterministic=True)
    np.testing.assert_allclose(loaded.act(states), expected, atol=1e-5)
    condition = loaded.network.condition(
        torch.from_numpy(states), loaded.encode_prompts([None], [None]), None, torch.zeros(50, dtype=torch.long)
    )
    with torch.no_grad():
        mean, log_std = loaded.network.statistics(condition)
        actor: Any = agent.trainer.actor
        own_mean, own_log_std, _ = actor.get_action_dist_params(torch.from_numpy(states))
    torch.testing.assert_close(mean, own_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_std, own_log_std, rtol=1e-4, atol=1e-5)
    # Draws: before the tanh normal, with that mean and deviation.
    moderate = (0.1 * states[:1]).repeat(4000, 0)
    drawn = loaded.with_acting(noise_scale=1.0).prompt().act(moderate)
    with torch.no_grad():
        centre, spread, _ = actor.get_action_dist_params(torch.from_numpy(moderate[:1]))
    z = (np.arctanh(np.clip(drawn, -1 + 1e-6, 1 - 1e-6)) - centre.numpy()) / spread.exp().numpy()
    assert np.abs(np.median(z, 0)).max() < 0.1
    assert np.abs(np.quantile(z, 0.8413, 0) - 1).max() < 0.15


def test_asked_for_the_network_has_the_present_weights(lab: Lab, tmp_path: Path) -> None:
    agent = lab.agent()
    steps = SACSteps(agent, tmp_path)
    advance(agent, steps, 30)
    before = agent.ema_policy.net[0].weight.clone()
    advance(agent, steps, 5)
    assert not torch.equal(agent.ema_policy.net[0].weight, before), "asked for again, it has the present weights"


def test_an_iteration_is_stable_baselines3s_own(lab: Lab, tmp_path: Path, rng: np.random.Generator) -> None:
    """Step and gradient step, one after the other, are its `learn`, bit for bit."""
    seed = int(rng.integers(1000))
    one, other = lab.agent(seed=seed), lab.agent(seed=seed)
    told = advance(one, SACSteps(one, tmp_path), 60)
    with other.trainer.own_random():
        other.trainer._model.learn(60)
    assert_same(tensors(one), tensors(other))
    assert [bool(metrics.keys() & {"loss/critic"}) for metrics in told] == [False] * 20 + [True] * 40


def test_episodes_go_round_the_tasks(lab: Lab, tmp_path: Path, rng: np.random.Generator) -> None:
    agent = lab.agent(("a", "b", "c"), max_steps=5)
    told = advance(agent, SACSteps(agent, tmp_path), 37)
    assert [task for task, _ in lab.resets] == ["a", "b", "c", "a", "b", "c", "a", "b"]
    seeds = [seed for _, seed in lab.resets]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < COLLECTION_SEED_END
    assert agent.trainer.seeds.tolist() == seeds
    assert [n for n, metrics in enumerate(told, 1) if "rollout/return" in metrics] == [5, 10, 15, 20, 25, 30, 35]
    rewards = agent.trainer.transitions()["rewards"]
    assert told[9]["rollout/return"] == pytest.approx(rewards[5:10].sum(), rel=1e-5)
    assert told[9]["rollout/success"] == float((rewards[5:10] > -0.3).any())
    # Alone, a task's episodes are those of a collection of it.
    alone, before = lab.agent(("a",), max_steps=5), len(lab.resets)
    advance(alone, SACSteps(alone, tmp_path / "alone"), 7)
    assert lab.resets[before:] == [("a", seeds[0]), ("a", int(alone.trainer.seeds[1]))]


def loop_of(agent: SAC, run: Path, kept: list[tuple[str, int]]) -> TrainingLoop:
    config = TrainingConfig(iterations=60, log_every=7, checkpoint_every=11, select_every=0)
    run.mkdir(exist_ok=True)
    hooks = Hooks(lambda: ({}, 0.0), lambda which, iteration: kept.append((which, iteration)))
    return TrainingLoop(run, agent, SACSteps(agent, run / "replay"), config, hooks, {})


@pytest.mark.parametrize("where", ["in an iteration", "between steps and checkpoint", "before any checkpoint"])
def test_killed_anywhere_and_resumed_it_is_the_same(
    where: str, lab: Lab, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, seed = ("a", "b", "c"), int(rng.integers(1000))
    straight = lab.agent(tasks, 60, seed, max_steps=5)
    loop_of(straight, tmp_path / "straight", []).execute(StopSignals())
    run, update = tmp_path / "run", SAC.update
    for attempt in range(3):
        with monkeypatch.context() as patch:
            at = int(rng.integers(1, 10)) if where.startswith("before") else 13 + 14 * attempt + int(rng.integers(0, 9))
            agent = lab.agent(tasks, 60, seed, max_steps=5)

            def killed(self: SAC, batch: Any, iteration: int, at: int = at) -> Any:
                if iteration == at:
                    raise Kill
                return update(self, batch, iteration)

            def unsaved(folder: Path, agent: SAC, iteration: int, *rest: Any, at: int = at) -> Any:
                if iteration >= at or where.startswith("before"):
                    raise Kill
                return save_checkpoint(folder, agent, iteration, *rest)

            if where == "in an iteration":
                patch.setattr(SAC, "update", killed)
            else:
                patch.setattr("llmdpd.training.loop.save_checkpoint", unsaved)
            with pytest.raises(Kill):
                loop_of(agent, run, []).execute(StopSignals())
            assert list((run / "replay").glob("steps-*.npz")), "something was written that nobody counts on"
            if where == "before any checkpoint":
                assert latest_checkpoint(run / "checkpoint") is None
                (run / "replay" / "steps-000000000-000000004.npz").write_bytes(b"another's")
    agent = lab.agent(tasks, 60, seed, max_steps=5)
    loop_of(agent, run, []).execute(StopSignals())
    assert_same(tensors(agent), tensors(straight))
    # And what is on disk serves for going on.
    for folder in (run, tmp_path / "straight"):
        again = lab.agent(tasks, 60, seed, max_steps=5)
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
            loop_of(lab.agent(steps=60), run, []).execute(StopSignals())
    assert "step-00000022 is whole" in str(caught.value.hint)
    agent = lab.agent(steps=60)
    loop_of(agent, run, []).execute(StopSignals())
    assert agent.trainer.steps == 60


def test_it_learns(lab: Lab, world: Any, tmp_path: Path, fresh_seed: int, rng: np.random.Generator) -> None:
    """In 500 steps it goes more than half of the way from random actions to the best ones."""
    agent = lab.agent(("a", "b"), 500, fresh_seed % 1000, learning_starts=100, lr=2e-3, gamma=0.9, tau=0.02)
    told = advance(agent, SACSteps(agent, tmp_path), 500)
    policy = Policy(agent.ema_policy, None, ActingConfig(samples=1, noise_scale=0.0))
    prompts = policy.encode_prompts([None], [None])

    def act(state: np.ndarray, step: int) -> np.ndarray:
        return policy.act_many(state, prompts, None, np.full(len(state), step), np.arange(len(state)))

    learned, _ = world.episodes(act, 300)
    random, _ = world.episodes(lambda state, _: rng.uniform(-1, 1, (len(state), A)), 300)
    best, _ = world.episodes(lambda state, _: world.right(state), 300)
    print("random, learned, best:", random, learned, best)
    assert learned > random + 0.5 * (best - random), (random, learned, best)
    assert told[-1]["temperature"] < told[101]["temperature"]


def test_a_loss_that_diverges_is_told(lab: Lab, tmp_path: Path) -> None:
    agent = lab.agent(lr=1e30)
    with pytest.raises(TrainingDivergedError, match=r"sac\.lr|NaN|nan|inf"):
        loop_of(agent, tmp_path / "run", []).execute(StopSignals())


def test_it_is_not_made_from_batches() -> None:
    config = configuration(["--agent", "sac"])
    with pytest.raises(ValueError, match="make_online_agent"):
        make_agent(config, make_network("sac", S, A, 0, POLICY))


@pytest.mark.parametrize(
    ("words", "field", "expected"),
    [
        (("--data", "x.hdf5"), "--data", "--sac.lr"),
        (("--data.episodes", "3"), "--data.episodes", "--sac.lr"),
        (("--training.prompts-per-batch", "2"), "--training.prompts-per-batch", "--sac.lr"),
        (("--training.cuda-graph", "on"), "--training.cuda-graph", "--sac.lr"),
        (("--policy.context.text",), "--policy.context.text", "--sac.lr"),
        (("--cql.lr", "1"), "--cql.lr", "--sac.lr"),
        (("--acting.samples", "2"), "--acting.samples", "--sac.lr"),
        (("--policy.action-bound", "2"), "policy.action_bound", "1"),
        (("--sac.max-steps", "501"), "sac.max_steps", "1 to 500"),
        (("--sac.gamma", "1.5"), "sac.gamma", "0 to 1"),
        (("--sac.learning-starts", "100", "--training.iterations", "100"), "sac.learning_starts", "below 100"),
    ],
)
def test_options_that_it_has_no_use_for(words: tuple[str, ...], field: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        configuration(["--agent", "sac", *words])
    assert caught.value.field == field
    assert expected in str(caught.value.expected)


def test_what_it_starts_from() -> None:
    config = configuration(["--agent", "sac", "--protocol", "paper", "--sac.max-steps", "50"])
    assert (config.training.batch_size, config.training.prompts_per_batch, config.policy.hidden_dim) == (256, 1, 256)
    assert (config.policy.context.kind, config.policy.context.features) == ("pooled", "raw")
    assert config.sac == SACConfig(max_steps=50)
    assert TrainConfig().sac == SACConfig()


TINY = {
    **{"training.iterations": 30, "training.batch-size": 8, "training.log-every": 10, "training.select-every": 0},
    **{"training.checkpoint-every": 10, "sac.learning-starts": 12, "sac.max-steps": 4, "policy.hidden-dim": 8},
    **{"evaluation.max-steps": 3, "evaluation.episodes": 1, "data.workers": 1, "threads": 1},
}
WORDS = ["--agent", "sac", "--tasks.seen", "reach", "push", "--tasks.unseen", "door-lock", "--evaluation.no-videos"]
WORDS += [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., int]) -> Path:
    """A tiny run that was never disturbed."""
    run = tmp_path_factory.mktemp("sac") / "run"
    assert train("--run-dir", run, *WORDS) == 0
    return run


def test_a_run_says_that_it_was_online(whole: Path) -> None:
    records = read_results(whole / "results.json")
    assert {(record.task, record.split) for record in records} == {
        ("reach-v3", "seen"), ("push-v3", "seen"), ("door-lock-v3", "unseen")
    }  # fmt: skip
    told = "online: no data set; 30 steps in the environments of the tasks that it is trained on, episodes cut at 4"
    assert all(record.training_data.startswith(told) for record in records)
    assert told in (whole / "report.html").read_text()
    assert not (whole / "prompt_data").exists()
    assert "stable-baselines3" in json.loads((whole / "meta.json").read_text())["versions"]
    assert sorted(path.name for path in (whole / "replay").iterdir()) == [
        f"steps-{start:09d}-{start + 10:09d}.npz" for start in (0, 10, 20)
    ]
    metrics = read_metrics(whole / "metrics.jsonl")
    assert [record["iteration"] for record in metrics] == [10, 20, 30]
    assert "loss/critic" not in metrics[0], "the warm-up has no loss"
    assert "rollout/return" in metrics[0]
    assert "loss/critic" in metrics[1]


def test_the_policy_needs_no_stable_baselines3(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    policy = Policy.load(whole).prompt()
    assert policy.act(np.zeros(39, np.float32)).shape == (4,)


def test_without_the_package_it_says_how_to_get_it(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    assert train("--run-dir", tmp_path / "run", *WORDS) == 2
    told = capsys.readouterr().err
    assert "pip install 'stable-baselines3" in told
    assert "method" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_replay_is_told(
    damage: str, whole: Path, tmp_path: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    piece = run / "replay" / "steps-000000010-000000020.npz"
    if damage == "cut":
        piece.write_bytes(piece.read_bytes()[:200])
    else:
        piece.unlink()
    capsys.readouterr()
    assert train("--resume", run) == 2
    told = "".join(capsys.readouterr().err.split())
    assert ("apieceoftherecordedstepsisdamaged" if damage == "cut" else "apieceoftherecordedstepsismissing") in told
    assert "replay" in told
