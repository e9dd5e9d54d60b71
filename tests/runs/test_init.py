"""Fine-tuning: a run starts from a trained policy, which must fit; and a run goes on beyond its end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llmdpd
from llmdpd.config.parse import parse_train
from llmdpd.config.presets import PRESETS
from llmdpd.data import EpisodeRecord, TrajectoryDataset, save_minari
from llmdpd.errors import InputError
from llmdpd.evaluation.results import read_results
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.methods.optimisation import rate_factor
from llmdpd.policy.policy import Policy
from llmdpd.runs import origin, pipeline
from llmdpd.training.loop import TrainingLoop
from llmdpd.utils.checkpoint import latest_checkpoint
from llmdpd.utils.tensors import read_tensors

Train = Callable[..., int]
Contents = Callable[[Path], dict[str, Any]]
Refused = Callable[..., str]
NEW = ["--tasks.seen", "door-lock", "--tasks.unseen"]
SHORT = ["--iterations", "4", "--training.select-every", "0", "--evaluation.episodes", "1"]


@pytest.fixture
def options(tiny_options: list[str], tmp_path: Path, metaworld_data: Callable[..., Any]) -> list[str]:
    """A tiny run on the task that `straight_run` holds out."""
    save_minari(metaworld_data(("door-lock-v3",), seed=5, first_seed=200), tmp_path / "new")
    return [*tiny_options, "--data.path", str(tmp_path / "new"), *NEW, *SHORT]


def weights(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "policy" / "model.safetensors")


def test_a_run_starts_from_the_policys_weights_and_says_so(
    straight_run: Path, options: list[str], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At rates of 0 nothing but the start is left: networks, critics, and statistics of other data."""
    still = ["--lr", "0", "--method.critic-lr", "0", "--iterations", "1"]
    assert train("--init", straight_run, "--run-dir", tmp_path / "run", *options, *still) == 0
    before, after = weights(straight_run), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    critics = [read_tensors(run / "policy" / "critic.safetensors") for run in (straight_run, tmp_path / "run")]
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in critics[0])

    sha256 = json.loads((straight_run / "policy" / "policy.json").read_text())["sha256"]["model.safetensors"]
    said = capsys.readouterr().out
    notes = json.loads((tmp_path / "run" / "meta.json").read_text())["init"]
    assert notes["from"] == f"{straight_run} (SHA-256 {sha256})"
    assert (notes["learned"], notes["anew"]) == ("all weights", "nothing")
    assert (notes["statistics"], notes["range of actions"]) == ("kept", "kept")
    assert all(f"init, {name}: {words}" in said for name, words in notes.items())
    (record,) = (each for each in read_results(tmp_path / "run" / "results.json") if each.checkpoint == "last")
    assert record.started_from == notes["from"]
    assert record.trained_on == ("door-lock-v3", "reach-v3", "push-v3")
    assert sha256 in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"]["source"] == str(straight_run)
    metadata = Policy.load(tmp_path / "run").metadata["init"]
    assert (metadata["sha256"], metadata["iterations"]) == (sha256, 200)


def test_a_policy_without_its_run_and_one_of_the_hub(
    straight_run: Path, options: list[str], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network is taken from it: no option repeats the sizes."""
    import huggingface_hub

    commit = "0123456789" * 4
    folder = shutil.copytree(straight_run / "policy", tmp_path / commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    sizes = [index for index, word in enumerate(options) if word.startswith("--method.network.")]
    few = [word for index, word in enumerate(options) if index not in sizes and index - 1 not in sizes]
    assert train("--init", folder, "--run-dir", tmp_path / "folder", *few) == 0
    assert train("--init", "hub:someone/policy", "--run-dir", tmp_path / "hub", *few) == 0
    one, other = weights(tmp_path / "folder"), weights(tmp_path / "hub")
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["init"]["source"] == "hub:someone/policy"
    started = json.loads((tmp_path / "hub" / "meta.json").read_text())["init"]["from"]
    assert started.startswith(f"hub:someone/policy@{commit} (SHA-256 ")
    assert config["method"]["network"]["hidden_dim"] == 16


def test_it_learns_more_carefully_than_from_random_weights(straight_run: Path) -> None:
    start, fresh = (parse_train(["--init", str(straight_run)][:words]) for words in (2, 0))
    assert (start.training.iterations, fresh.training.iterations) == (1500, 9000)
    assert isinstance(start.method, LLMDPD.Config)
    assert isinstance(fresh.method, LLMDPD.Config)
    assert start.method.lr == fresh.method.lr / 2
    assert parse_train(["--init", str(straight_run), "--iterations", "20", "--lr", "1"]).training.iterations == 20


def test_the_mean_of_first_and_learned_weights_acts(
    straight_run: Path, options: list[str], train: Train, tmp_path: Path
) -> None:
    learned = {}
    for share in ("0", "0.25"):
        run = tmp_path / share
        assert train("--init", straight_run, "--run-dir", run, *options, "--lr", "1e-2", "--init.average", share) == 0
        learned[share] = weights(run)
    for name, first in weights(straight_run).items():
        torch.testing.assert_close(learned["0.25"][name], torch.lerp(learned["0"][name], first, 0.25))
    assert any(not torch.equal(learned["0.25"][name], learned["0"][name]) for name in learned["0"])


def test_the_heads_alone_are_learned(straight_run: Path, options: list[str], train: Train, tmp_path: Path) -> None:
    words = [*options, "--init.parts", "heads", "--method.ema-start", "1"]
    assert train("--init", straight_run, "--run-dir", tmp_path / "run", *words) == 0
    before, after = weights(straight_run), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.split(".")[0] for name in changed} == {"net"}
    learned = json.loads((tmp_path / "run" / "meta.json").read_text())["init"]["learned"]
    heads = sum(tensor.numel() for name, tensor in before.items() if name.startswith("net."))
    assert learned.startswith(f"net alone, {heads} weights; the other ")


def test_a_fine_tuned_run_resumes_bit_for_bit_without_what_it_started_from(
    straight_run: Path,
    options: list[str],
    train: Train,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    stopped_and_resumed: Callable[..., None],
) -> None:
    """With replay and frozen parts. The policy may be gone then: the checkpoint has all of it."""
    source = shutil.copytree(straight_run, tmp_path / "source")
    words = ["--init", str(source), *options, "--init.replay", "0.5", "--init.parts", "heads"]
    words += ["--training.select-every", "3"]
    assert train("--run-dir", tmp_path / "straight", *words) == 0

    take_over = pipeline.take_over

    def last_use(*arguments: Any) -> list[str]:
        anew = take_over(*arguments)
        shutil.rmtree(source)
        return anew

    monkeypatch.setattr(pipeline, "take_over", last_use)
    stopped_and_resumed(tmp_path / "resumed", words, LLMDPD, 2)
    assert not source.exists()
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")


def test_killed_before_its_first_checkpoint_it_starts_from_the_same_policy_or_not_at_all(
    straight_run: Path,
    options: list[str],
    train: Train,
    tmp_path: Path,
    refused: Refused,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = shutil.copytree(straight_run, tmp_path / "source")
    words = ["--init", str(source), *options, "--training.select-every", "3"]

    class KilledError(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "execute", killed)
        with pytest.raises(KilledError):
            train("--run-dir", tmp_path / "run", *words)
    assert latest_checkpoint(tmp_path / "run" / "checkpoint") is None
    other = shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert train("--resume", tmp_path / "run") == 0
    assert train("--run-dir", tmp_path / "straight", *words) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "straight")
    policy = Policy.load(source)
    with torch.no_grad():
        next(policy.network.parameters()).add_(1)
    policy.save(source / "policy")
    error = refused("--resume", other)
    assert "the policy that the run starts from was changed since the run was begun" in error


def test_replay_learns_the_old_tasks_beside(
    straight_run: Path, options: list[str], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    update = LLMDPD.update

    def seen(self: Any, batch: Any, iteration: int) -> Any:
        texts.append(batch.text.clone())
        return update(self, batch, iteration)

    monkeypatch.setattr(LLMDPD, "update", seen)
    words = [*options, "--method.prompts-per-batch", "4", "--init.replay", "0.5"]
    assert train("--init", straight_run, "--run-dir", tmp_path / "run", *words) == 0
    for batch in texts:
        assert len(batch.unique(dim=0)) == 3, "two prompts of the new task, one of each old one"
        assert torch.equal(batch[0], batch[1])
    (record,) = read_results(tmp_path / "run" / "results.json")[:1]
    assert "50 % of the prompts replay 6 episodes of 2 tasks that were learned before" in record.training_data


Wrong = tuple[list[str], str]
WRONG: dict[str, Wrong] = {
    "method": (["--method", "bc"], "the policy is another method's"),
    "network": (["--method.network.hidden-dim", "32"], "method.network.hidden_dim: 16 → 32"),
    "text model": (["--llm", "bag-of-words"], "the policy reads another text model's embeddings"),
    "goal": (["--tasks.no-goal-visible"], "other goal_visible"),
    "sizes": (["--tasks.seen", "hopper", "--evaluation", "none"], "another size of observations than the tasks"),
    "replayed": (["--tasks.seen", "reach", "push", "--init.replay", "0.5"], "nothing to replay"),
    "replay alone": (["--init.replay", "1"], "nothing new would be learned"),
    "first weights alone": (["--init.average", "1"], "nothing new would be learned"),
    "parts": (["--init.parts", "some"], "init.parts"),
    "online": (["--method", "sac"], "the policy is another method's"),
}


@pytest.mark.parametrize("which", WRONG)
def test_what_does_not_fit_the_policy_is_named(
    which: str, straight_run: Path, options: list[str], refused: Refused, tmp_path: Path
) -> None:
    words, said = WRONG[which]
    if which == "sizes":  # locomotion has no layout
        words = [*words, *(f"--method.augmentation.{name}=0" for name in ("offset", "rotate", "mirror"))]
        words.append("--method.acting.track-after=0")
    error = refused("--init", straight_run, "--run-dir", tmp_path / "run", *options, *words)
    assert said in error
    assert not (tmp_path / "run" / "policy").exists()


def test_a_start_needs_a_policy(
    straight_run: Path, options: list[str], refused: Refused, tmp_path: Path, train: Train
) -> None:
    run = ["--run-dir", str(tmp_path / "run"), *options]
    assert "no such policy" in refused("--init", tmp_path / "nowhere", *run)
    assert "--init with a run" in refused("--init.parts", "heads", *run)
    assert "two policies" in refused("--init", straight_run, "--init.source", straight_run, *run)
    policy = shutil.copytree(straight_run / "policy", tmp_path / "alone")
    assert "a policy without its run" in refused("--init", policy, "--init.replay", "0.5", *run)
    damaged = shutil.copytree(straight_run / "policy", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-3])
    assert "altered" in refused("--init", damaged, *run)
    assert not list(tmp_path.glob("run/*"))


def test_another_revision_of_the_text_model_is_refused(
    straight_run: Path, options: list[str], refused: Refused, tmp_path: Path
) -> None:
    policy = Policy.load(straight_run)
    policy.metadata["llm"] = policy.metadata["llm"] | {"revision": "another"}
    policy.save(tmp_path / "other")
    error = refused("--init", tmp_path / "other", "--run-dir", tmp_path / "run", *options)
    assert "trained with another text model" in error
    assert "revision another" in error
    assert not (tmp_path / "run").exists(), "nothing is left of a run that never began"


def test_a_run_goes_on_beyond_its_end(
    run_copy: Path, train: Train, refused: Refused, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(run_copy)
    rates = []
    schedule = LLMDPD.schedule

    def noted(self: LLMDPD, iteration: int) -> None:
        schedule(self, iteration)
        rates.append((iteration, float(self.optimizers["policy_optimizer"].param_groups[0]["lr"])))

    monkeypatch.setattr(LLMDPD, "schedule", noted)
    assert train("--resume", run_copy, "--iterations", 204) == 0
    assert "the run's end moves from 200 to 204 iterations" in capsys.readouterr().out
    assert [iteration for iteration, _ in rates] == [200, 201, 202, 203]
    config = parse_train([]).method
    assert isinstance(config, LLMDPD.Config)
    assert rates[0][1] == pytest.approx(config.lr * rate_factor(config, 200, 204))
    assert {record.iterations for record in read_results(run_copy / "results.json") if record.checkpoint == "last"} == {
        204
    }
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(run_copy).items())
    assert json.loads((run_copy / "config.json").read_text())["training"]["iterations"] == 204
    assert train("--resume", run_copy) == 0, "the new end is the run's own"
    assert "end moves" not in capsys.readouterr().out
    told = refused("--resume", run_copy, "--iterations", 200)
    assert "training.iterations: 204 → 200" in told
    assert "not brought forward" in told
    assert "leave these options out" in refused("--resume", run_copy, "--iterations", 200, "--method.lr", 1)


S, A = 6, 2


def log(rng: np.random.Generator, task: str, offset: float, reach: float) -> EpisodeRecord:
    """Actions that say on which side of `offset` the first number is."""
    observations = offset + rng.normal(size=(13, S))
    observations[:, 0] = offset + rng.choice([-1, 1], 13)
    actions = reach * (observations[:12, :1] - offset) * np.ones((12, A))
    return EpisodeRecord(observations, actions, np.zeros(12), task)


SIZES = {
    "training.iterations": 200,
    "training.select-every": 0,
    "method.batch-size": 64,
    "method.prompts-per-batch": 4,
    "method.lr": 3e-3,
    "method.lr-warmup": 0,
    "method.network.context.encoder.width": 16,
    "method.network.context.encoder.inner": 32,
    "threads": 1,
}


def test_data_beyond_the_statistics_are_seen_and_actions_beyond_are_done(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """By default; with the old statistics alone the numbers would be clipped, and the actions cut."""

    def data(offset: float, reach: float) -> TrajectoryDataset:
        records = [log(rng, "turn", offset, reach) for _ in range(12)]
        return TrajectoryDataset.from_episodes(records, texts={"turn": "Turn to the side."})

    words = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    llmdpd.fit(data(0, 1), options=[*words, "--iterations", "20"], run_dir=tmp_path / "first")
    new = data(100, 5)
    shown = new.episode(0)

    def actions(statistics: str) -> np.ndarray:
        policy = llmdpd.fit(
            new,
            init=tmp_path / "first",
            options=[*words[2:], "--iterations", "200", "--init.statistics", statistics],
            run_dir=tmp_path / statistics,
        )
        policy.prompt("Turn to the side.", shown)
        return policy.act(new.observations[:50])

    right = new.observations[:50, :1] - 100
    for statistics in ("auto", "refit"):
        found = actions(statistics)
        assert np.mean(found * right > 2.5) > 0.8, statistics
    assert np.abs(actions("keep")).max() <= 1.01
    notes = json.loads((tmp_path / "auto" / "meta.json").read_text())["init"]
    assert notes["statistics"].startswith("kept, except observation[0], observation[1]")
    assert notes["range of actions"].startswith("another range: action[0] -1 to 1 → -5 to 5")
    assert notes["average"] == 0, "weights mean something else than they did"


def test_a_configuration_given_in_python_must_have_the_policys_network(
    straight_run: Path, rng: np.random.Generator
) -> None:
    data = TrajectoryDataset.from_episodes([log(rng, "turn", 0, 1) for _ in range(3)], texts={"turn": "Turn."})
    config = parse_train(["--preset", "smoke", "--evaluation", "none"])
    config = replace(config, method=PRESETS["tasks-plain"].method)
    with pytest.raises(InputError, match="another one than the configuration's") as refused:
        llmdpd.fit(data, config=config, init=straight_run)
    assert "method.network.hidden_dim: 16 → 256" in str(refused.value)


def test_observations_of_another_layout_are_refused(straight_run: Path) -> None:
    """Names of points decide nothing."""
    spaces = Policy.load(straight_run).network.spaces
    known, layout = origin.Origin("x", "x", "0", 1, (), spaces), spaces.layout
    assert layout is not None
    assert layout.velocities is not None
    renamed = replace(
        layout,
        points=tuple(replace(point, name=f"my {point.name}") for point in layout.points),
        pairs=tuple((f"my {one}", f"my {other}") for one, other in layout.pairs),
        goal=f"my {layout.goal}",
        velocities=tuple(f"my {name}" for name in layout.velocities),
    )
    for same in (layout, renamed):
        origin.check_spaces(known, replace(spaces, layout=same))
    for other in (replace(layout, unit=2.0), replace(renamed, pairs=renamed.pairs[1:]), None):
        with pytest.raises(InputError, match="another layout") as refused:
            origin.check_spaces(known, replace(spaces, layout=other))
        assert refused.value.field == "spaces.layout"
    with pytest.raises(InputError, match="another layout") as refused:
        origin.check_spaces(known, replace(spaces, embedding_dim=50))
    assert refused.value.field == "spaces.embedding_dim"
