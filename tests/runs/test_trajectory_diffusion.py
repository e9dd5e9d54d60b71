"""Runs of trajectory diffusion: the same commands, folders and checks as Algorithm 1's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmdpd.cli.options import has_field, split_options
from llmdpd.errors import InputError
from llmdpd.methods.networks import Method
from llmdpd.methods.trajectory_diffusion import TrajectoryDiffusion, TrajectoryPolicy
from llmdpd.policy.folder import DESCRIPTION
from llmdpd.policy.policy import Policy
from llmdpd.training.metrics import read_metrics

Train = Callable[..., int]
Contents = Callable[[Path], dict[str, Any]]
METHOD: Method = "trajectory-diffusion"
SIZES = {
    **{"policy.plan.horizon": 4, "policy.plan.layers": 1, "policy.plan.width": 16, "policy.plan.inner": 16},
    **{
        "planner.ema-start": 10,
        "planner.lr": 3e-2,
        "training.iterations": 40,
        "training.select-every": 20,
        "training.checkpoint-every": 10,
    },
    **{"acting.steps": 2, "evaluation.max-steps": 5, "evaluation.episodes": 1},
}


@pytest.fixture(scope="module")
def options(tiny_options: list[str]) -> list[str]:
    tiny = [word for option in split_options(tiny_options) if has_field(METHOD, option.field) for word in option.words]
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    return ["--preset", "metaworld-trajectory-diffusion", *tiny, *sizes]


@pytest.fixture(scope="module")
def plan_run(tmp_path_factory: pytest.TempPathFactory, train: Train, options: list[str]) -> Path:
    """A tiny run that was never disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "plan"
    assert train("--run-dir", folder, *options) == 0
    return folder


def observations(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(count, 39)).astype(np.float32)


def test_the_run_is_whole(plan_run: Path) -> None:
    description = json.loads((plan_run / "policy" / DESCRIPTION).read_text())
    assert description["method"] == "trajectory-diffusion"
    assert "critic.safetensors" not in description["sha256"]
    assert json.loads((plan_run / "config.json").read_text())["method"] == "trajectory-diffusion"
    records = json.loads((plan_run / "results.json").read_text())["records"]
    assert len(records) == 6
    assert {(r["acting"]["sampler"], r["acting"]["steps"], r["acting"]["samples"]) for r in records} == {("ddim", 2, 1)}
    assert "trajectory-diffusion" in (plan_run / "report.html").read_text()
    losses = [r["loss/diffusion"] for r in read_metrics(plan_run / "metrics.jsonl") if "loss/diffusion" in r]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("at", [7, 33])
def test_stopped_and_resumed_it_is_the_straight_run_bit_for_bit(
    at: int,
    plan_run: Path,
    tmp_path: Path,
    options: list[str],
    contents: Contents,
    stopped_and_resumed: Callable[..., None],
) -> None:
    run = tmp_path / "run"
    stopped_and_resumed(run, options, TrajectoryDiffusion, at)
    assert contents(run) == contents(plan_run)


def test_the_policy_comes_back_and_acts_the_same(plan_run: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    policy = Policy.load(plan_run)
    assert isinstance(policy.network, TrajectoryPolicy)
    assert policy.critic is None
    policy.save(tmp_path / "copy")
    again = Policy.load(tmp_path / "copy")
    example = (observations(9, rng), rng.uniform(-1, 1, (9, 4)))
    text = next(iter(json.loads((plan_run / "prompts.json").read_text()).values()))["text"]
    for each in (policy, again):
        each.prompt(text=text, trajectory=example)
    states = observations(11, rng)
    actions = policy.act(states)
    assert actions.shape == (11, 4)
    assert (np.abs(actions) <= 1).all()
    assert np.array_equal(again.act(states), actions)
    policy.seed(0)
    policy.reset()
    assert np.array_equal(policy.act(states), actions)
    assert not np.array_equal(policy.act(states), actions), "the noise goes on"
    assert policy.act(states[0]).shape == (4,)
    again.prompt(text=text, trajectory=(observations(9, rng), rng.uniform(-1, 1, (9, 4))))
    again.seed(0)
    assert not np.allclose(again.act(states), actions), "the prompt matters"


def test_an_action_is_its_own_rows_alone(plan_run: Path, rng: np.random.Generator) -> None:
    policy = Policy.load(plan_run)
    known = json.loads((plan_run / "prompts.json").read_text())
    examples = [(observations(9, rng), rng.uniform(-1, 1, (9, 4))) for _ in known]
    prompts = policy.encode_prompts([prompt["text"] for prompt in known.values()], examples)
    states, seeds = observations(13, rng), rng.integers(0, 2**62, 13)
    index, steps = rng.integers(0, 3, 13), rng.integers(0, 50, 13)
    together = policy.act_many(states, prompts, index, steps, seeds)
    some = rng.permutation(13)[: int(rng.integers(1, 13))]
    apart = policy.act_many(states[some], prompts, index[some], steps[some], seeds[some])
    # Not bit for bit: how torch rounds a product depends on its number of rows.
    np.testing.assert_allclose(apart, together[some], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("field", "value"), [("samples", 2), ("precision", "bf16")])
def test_ways_of_acting_that_plans_do_not_have(
    field: str,
    value: Any,
    plan_run: Path,
    tmp_path: Path,
    train: Train,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    rng: np.random.Generator,
) -> None:
    policy = Policy.load(plan_run).with_acting(**{field: value})
    text = next(iter(json.loads((plan_run / "prompts.json").read_text()).values()))["text"]
    policy.prompt(text=text, trajectory=(observations(9, rng), rng.uniform(-1, 1, (9, 4))))
    with pytest.raises(InputError, match=rf"acting\.{field}"):
        policy.act(observations(1, rng))
    assert train("--run-dir", tmp_path / "run", *options, f"--acting.{field}", value) == 2
    assert f"acting.{field}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_policy_of_an_unknown_method_is_told(plan_run: Path, straight_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plan_run / "policy", tmp_path / "policy")
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**description, "method": "guesswork"}))
    with pytest.raises(InputError, match=r"unknown method(.|\n)*guesswork") as caught:
        Policy.load(folder)
    assert caught.value.path == str(folder / DESCRIPTION)
    # Policies from before there were several are LLMDPD's.
    folder = shutil.copytree(straight_run / "policy", tmp_path / "old")
    description = json.loads((folder / DESCRIPTION).read_text())
    assert description.pop("method") == "llmdpd"
    (folder / DESCRIPTION).write_text(json.dumps(description))
    assert not isinstance(Policy.load(folder).network, TrajectoryPolicy)


def test_data_without_labels_names_the_methods_own_field(
    tmp_path: Path,
    train: Train,
    options: list[str],
    metaworld_data: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llmdpd.data import save_minari

    save_minari(metaworld_data(expert=False), tmp_path / "bare")
    assert train("--run-dir", tmp_path / "run", *options, "--data.path", tmp_path / "bare") == 2
    assert "--planner.clone executed" in capsys.readouterr().err
    executed = ["--planner.clone", "executed", "--training.iterations", 2, "--training.select-every", 0]
    assert train("--run-dir", tmp_path / "run", *options, "--data.path", tmp_path / "bare", *executed) == 0
    assert "clones the executed actions" in (tmp_path / "run" / "results.json").read_text()


def test_the_method_is_also_called_agent(tmp_path: Path, train: Train, tiny_options: list[str]) -> None:
    short = ["--training.iterations", 2, "--training.select-every", 0, "--agent.lr", 0.5, "--agent.eta", 1]
    words = ["--preset", "metaworld-trajectory-diffusion", *tiny_options, *short, "--policy.diffusion-steps", 4]
    assert train("--run-dir", tmp_path / "run", *words, "--acting.steps", 2, "--agent", "llmdpd") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["method"], config["agent"]["lr"]) == ("llmdpd", 0.5)
    assert (tmp_path / "run" / "policy" / "critic.safetensors").is_file()


def test_a_resumed_run_refuses_the_other_methods_options(
    plan_run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume", plan_run, "--agent.eta", 1) == 2
    error = capsys.readouterr().err
    assert "--agent.eta 1, with --method trajectory-diffusion" in error
    assert "--planner.first-action-weight" in error
