"""What every method has in common: it trains, stops and resumes bit for bit, is saved, acts and is evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmdpd.cli.evaluate import main as evaluate
from llmdpd.cli.options import METHOD_FIELDS, has_field, split_options
from llmdpd.cli.train import configuration
from llmdpd.config.baselines import with_method
from llmdpd.config.schema import TrainConfig
from llmdpd.data import Trajectory, load_dataset
from llmdpd.errors import InputError
from llmdpd.evaluation.results import read_results
from llmdpd.methods.networks import METHODS, ONLINE, Method, make_network
from llmdpd.methods.registry import make_agent
from llmdpd.methods.sac import SAC
from llmdpd.nn.history_policy import HistoryPolicy
from llmdpd.policy.policy import Policy
from llmdpd.training.metrics import read_metrics

Train = Callable[..., int]
Contents = Callable[[Path], dict[str, Any]]
BASELINES = tuple(name for name in METHODS if name not in ("llmdpd", "trajectory-diffusion"))
SIZES = {
    **{"training.iterations": 40, "training.select-every": 20, "training.checkpoint-every": 10},
    **{"evaluation.max-steps": 5, "evaluation.episodes": 1, "acting.samples": 2},
    **{"policy.sequence.context": 4, "policy.sequence.layers": 1, "policy.sequence.width": 16, "dt.lr": 1e-2},
    **{"policy.plan.horizon": 4, "policy.plan.layers": 1, "policy.plan.width": 16, "policy.plan.inner": 16},
    **{"acting.steps": 2, "mtdiff.lr": 1e-2},
    # Episodes of 4 steps: at every mark of the metrics some have ended.
    **{"sac.learning-starts": 5, "sac.max-steps": 4},
    **{"td3-bc.critic-hidden": 16, "cql.critic-hidden": 16, "cql.draws": 2, "bc.lr": 1e-2},
    **{"lamo.lr": 1e-2, "lamo.lm-lr": 1e-2, "lamo.lr-warmup": 1, "lamo.language-block": 8},
}
LEFT_OUT = {"diffusion-bc": ("agent.eta", "acting.samples", "acting.steps"), "diffusion-ql": ("acting.steps",)}
"""What the other methods of policy diffusion are given, and this one refuses."""

SAMPLERS = {"diffusion-ql": "ddpm", "diffusion-bc": "ddpm", "mtdiff": "ddim"}
"""The reverse chain that those which walk one begin with."""

NEEDS = {"sac": "stable_baselines3"}
"""The package of an extra that a method cannot do without."""

READERS = ("prompt-dt", "mtdiff")
"""The baselines that read an example."""


@pytest.fixture(scope="module")
def options_of(tiny_options: list[str], tiny_gpt2: tuple[Path, Path]) -> Callable[[Method], list[str]]:
    def make(method: Method) -> list[str]:
        language = dict(zip(("lamo.model", "lamo.corpus"), tiny_gpt2, strict=True))
        sizes = [word for name, value in (SIZES | language).items() for word in (f"--{name}", str(value))]
        given = split_options([*tiny_options, *sizes])
        own = [o for o in given if has_field(method, o.field) and o.field not in LEFT_OUT.get(method, ())]
        return ["--agent", method, *(word for option in own for word in option.words)]

    return make


@pytest.fixture(scope="module", params=BASELINES)
def baseline(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    train: Train,
    options_of: Callable[[Method], list[str]],
) -> tuple[Method, Path]:
    """A baseline and its tiny run, which was never disturbed."""
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    folder = tmp_path_factory.mktemp("runs") / request.param
    assert train("--run-dir", folder, *options_of(request.param)) == 0
    return request.param, folder


def test_the_run_is_whole(baseline: tuple[Method, Path]) -> None:
    method, run = baseline
    assert json.loads((run / "policy" / "policy.json").read_text())["method"] == method
    assert json.loads((run / "config.json").read_text())["method"] == method
    records = read_results(run / "results.json")
    assert {record.method for record in records} == {method}
    assert {record.prompts.text for record in records} == {False}
    assert {bool(record.prompts.trajectory) for record in records} == {method in READERS}
    assert len(records) == 6
    assert {record.acting.sampler for record in records} == {SAMPLERS.get(method, "none")}
    assert method in (run / "report.html").read_text()
    logged = [record for record in read_metrics(run / "metrics.jsonl") if any(n.startswith("loss/") for n in record)]
    assert len(logged) == 4
    assert all(record.keys() == logged[0].keys() for record in logged), "every mark has every loss"


def test_what_is_asked_for_is_the_datas(
    baseline: tuple[Method, Path], data_folder: Path, rng: np.random.Generator
) -> None:
    method, run = baseline
    policy = Policy.load(run)
    if not isinstance(policy.network, HistoryPolicy):
        assert "target_returns" not in policy.facts
        return
    dataset = load_dataset(data_folder / "train")
    assert policy.facts["target_returns"] == dataset.target_returns()
    assert float(policy.network.return_scale) == pytest.approx(np.abs(dataset.returns_to_go()).max())
    facts = policy.facts | {"target_returns": {"reach-v3": "much"}}
    Policy(policy.network, None, policy.acting, facts=facts).save(run.parent / f"wrong-{method}")
    with pytest.raises(InputError, match=r"facts\.target_returns"):
        Policy.load(run.parent / f"wrong-{method}")


def agent_kind(config: TrainConfig) -> type[Any]:
    """The class of the method's agent."""
    network = make_network(config.method, 39, 4, 0, config.policy)
    return SAC if config.method in ONLINE else type(make_agent(config, network))


def test_stopped_and_resumed_it_is_the_straight_run_bit_for_bit(
    baseline: tuple[Method, Path],
    tmp_path: Path,
    options_of: Callable[[Method], list[str]],
    contents: Contents,
    stopped_and_resumed: Callable[..., None],
    rng: np.random.Generator,
) -> None:
    method, straight = baseline
    run = tmp_path / "run"
    stopped_and_resumed(
        run, options_of(method), agent_kind(configuration(options_of(method))), int(rng.integers(1, 39))
    )
    assert contents(run) == contents(straight)


def test_lamo_goes_on_with_the_same_text_alone(
    baseline: tuple[Method, Path], tiny_gpt2: tuple[Path, Path], train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    method, run = baseline
    facts = Policy.load(run).facts.get("language_model")
    if method != "lamo":
        assert facts is None
        return
    text = tiny_gpt2[1].read_text()
    assert facts["revision"].startswith("sha256:")
    tiny_gpt2[1].write_text(f"{text}again\n")
    try:
        assert train("--resume", run) == 2
    finally:
        tiny_gpt2[1].write_text(text)
    assert "language model.corpus" in capsys.readouterr().err


def test_the_policy_comes_back_and_acts_the_same(
    baseline: tuple[Method, Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    method, run = baseline
    policy = Policy.load(run)
    policy.save(tmp_path / "copy")
    again = Policy.load(tmp_path / "copy")
    states = rng.normal(size=(11, 39)).astype(np.float32)
    example = Trajectory(states, rng.uniform(-1, 1, (11, 4)).astype(np.float32), states[:, 0], "reach-v3")
    for each in (policy, again):
        each.prompt(trajectory=example if method in READERS else None)
    actions = policy.act(states)
    assert actions.shape == (11, 4)
    assert (np.abs(actions) <= 1).all()
    assert np.array_equal(again.act(states), actions)
    with pytest.raises(InputError, match="without text"):
        policy.prompt(text="reach", trajectory=example if method in READERS else None)


def test_evaluation_refuses_what_the_method_does_not_do(
    baseline: tuple[Method, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    method, run = baseline
    options = {"--samples": 3, "--noise-scale": 0.5, "--action-horizon": 1}
    fields = {"--samples": "samples", "--noise-scale": "noise_scale", "--action-horizon": "replan"}
    refused = [name for name in options if not has_field(method, f"acting.{fields[name]}")]
    for name in refused:
        assert evaluate([str(run), name, str(options[name])]) == 2
        assert name in capsys.readouterr().err
    if method not in READERS:
        assert evaluate([str(run), "--prompts", "swapped"]) == 2
        assert "trained without such prompts" in capsys.readouterr().err
    by_draws = {name: ["--samples", "--action-horizon"] for name in ("bc", "cql", "mtdiff", "sac")}
    assert refused == by_draws.get(method, [] if method.startswith("diffusion") else list(options))


@pytest.mark.parametrize("method", BASELINES)
def test_a_method_starts_from_any_preset(method: str) -> None:
    for preset in ("metaworld", "metaworld-paper", "d4rl-hopper", "smoke"):
        config = configuration(["--preset", preset, f"--method={method}"])
        assert (config.preset, config.method) == (preset, method)
        assert not config.policy.context.text


def test_methods_that_do_not_exist_are_named() -> None:
    with pytest.raises(InputError, match="td3-bc"):
        with_method(TrainConfig(), "td3bc")
    assert METHODS.keys() == METHOD_FIELDS.keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--agent", "diffusion-bc", "--agent.eta", "1"), "diffusion-ql"),
        (("--agent", "bc", "--acting.samples", "3"), "acting.samples"),
        (("--agent", "bc", "--agent.lr", "1"), "--bc.lr"),
        (("--agent", "td3-bc", "--rad.sigma", "1"), "--rad.sigma"),
        (("--agent", "cql", "--policy.chunk", "2"), "chunk"),
        (("--agent", "s4rl", "--s4rl.copies", "0"), "s4rl.copies"),
        (("--agent", "rad", "--rad.scale-low", "2"), "rad.scale_low"),
        (("--agent", "bc", "--method", "llmdpd"), "two methods"),
        (("--agent", "dt", "--policy.sequence.width", "15", "--policy.sequence.heads", "2"), "sequence.heads"),
        (("--agent", "dt", "--policy.chunk", "2"), "chunk"),
        (("--agent", "dt", "--policy.context.text"), "--policy.context.text"),
        (("--agent", "prompt-dt", "--policy.context.kind", "retrieval"), "--policy.context.kind"),
        (("--agent", "dt", "--training.augmentation.offset", "0.1"), "--training.augmentation.offset"),
        (("--agent", "bc", "--policy.sequence.context", "2"), "--policy.sequence.context"),
        (("--agent", "mtdiff", "--policy.context.text"), "--policy.context.text"),
        (("--agent", "mtdiff", "--mtdiff.return-probability", "1.1"), "mtdiff.return_probability"),
        (("--agent", "trajectory-diffusion", "--policy.plan.guidance", "2"), "--policy.plan.guidance"),
        (("--agent", "mtdiff", "--acting.samples", "2"), "--acting.samples"),
        (("--agent", "mtdiff", "--training.augmentation.clock-scale", "1"), "clock-scale"),
        (("--agent", "sac", "--data.fraction", "0.5"), "--data.fraction"),
        (("--agent", "bc", "--sac.lr", "1"), "--bc.lr"),
    ],
)
def test_options_that_a_method_does_not_have(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError) as error:
        configuration(words)
    assert told in str(error.value)
