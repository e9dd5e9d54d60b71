"""What every method has in common: it trains, stops and resumes bit for bit, is saved, acts and is evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from llmdpd.cli.evaluate import main as evaluate
from llmdpd.config.parse import has_field, parse_train, split_options
from llmdpd.config.presets import PRESETS, with_method
from llmdpd.config.schema import TrainConfig
from llmdpd.data import Trajectory, load_dataset
from llmdpd.errors import InputError
from llmdpd.evaluation.results import read_results
from llmdpd.methods import METHODS
from llmdpd.nn.history_policy import HistoryPolicy
from llmdpd.policy.policy import Policy
from llmdpd.training.metrics import read_metrics

Trained = tuple[str, Path]
Train = Callable[..., int]
Contents = Callable[[Path], dict[str, Any]]
NAMES = tuple(METHODS)
PROMPTED = ("llmdpd", "trajectory-diffusion")
BASELINES = tuple(name for name in NAMES if name not in PROMPTED)
SIZES = {
    **{"training.iterations": 40, "training.select-every": 20, "training.checkpoint-every": 10},
    **{"evaluation.max-steps": 5, "evaluation.episodes": 1, "method.lr": 1e-2, "method.ema-start": 10},
    **{"method.network.sequence.context": 4, "method.network.sequence.layers": 1, "method.network.sequence.width": 16},
    **{f"method.network.trajectory.{name}": n for name, n in (("horizon", 4), ("layers", 1))},
    **{f"method.network.trajectory.{name}": 16 for name in ("width", "inner")},
    # Episodes of 4 steps: at every mark of the metrics some have ended.
    **{"method.learning-starts": 5, "method.max-steps": 4, "method.samples": 2, "method.copies": 2},
    **{"method.lm-lr": 1e-2, "method.language-block": 8},
    **{f"method.network.world.{name}": n for name, n in (("horizon", 4), ("layers", 1), ("width", 16))},
    **{"method.members": 2, "method.model-hidden": 16, "method.model-layers": 1, "method.behaviour-hidden": 16},
}
OWN: dict[str, dict[str, Any]] = {
    "llmdpd": {"method.network.chunk": 4, "method.acting.action-horizon": 3, "method.eta": 0},
    "diffusion-ql": {"method.acting.samples": 2},
    "diffusion-bc": {"method.eta": 0},
    "lamo": {"method.lr-warmup": 1},
    **{name: {"method.acting.steps": 2} for name in ("trajectory-diffusion", "mtdiff")},
}
SAMPLERS = {name: "ddpm" for name in ("llmdpd", "diffusion-ql", "diffusion-bc")}
SAMPLERS |= {name: "ddim" for name in ("trajectory-diffusion", "mtdiff")}
"""The reverse chain of those methods that walk one."""

NEEDS = {"sac": "stable_baselines3"}
"""The package of an extra that a method cannot do without."""

READERS = (*PROMPTED, "prompt-dt", "mtdiff")
"""The methods that read a demonstration."""

ANEW = {
    **{name: "critic, target_critic" for name in ("td3-bc", "rad", "s4rl", "rd")},
    "cql": "critic, target_critic, temperature",
    "ads": "critic, target_critic, temperature, behaviour",
    **{name: "critic, target_critic, temperature, model" for name in ("pnf", "otto")},
}
"""What a method learns beside its policy, and its policy's folder has not."""

WITH_HEADS = ("llmdpd", "trajectory-diffusion", "dt", "prompt-dt", "mtdiff")
"""The methods whose policies have encoders that can be frozen."""

ACTING = {
    **{
        name: ("--noise-scale",)
        for name in ("ads", "bc", "cql", "mtdiff", "otto", "pnf", "sac", "trajectory-diffusion")
    },
    **{name: ("--samples", "--noise-scale", "--action-horizon") for name in ("llmdpd", "diffusion-ql", "diffusion-bc")},
}
"""The options of the evaluation that change how a method's policy acts."""


@pytest.fixture(scope="module")
def options_of(tiny_options: list[str], tiny_gpt2: tuple[Path, Path]) -> Callable[[str], list[str]]:
    def make(method: str) -> list[str]:
        language = dict(zip(("method.model", "method.corpus"), tiny_gpt2, strict=True))
        sizes = SIZES | language | OWN.get(method, {})
        given = split_options([*tiny_options, *(word for name, n in sizes.items() for word in (f"--{name}", str(n)))])
        start = with_method(PRESETS["metaworld"], method)
        return ["--method", method, *(word for o in given if has_field(start, o.field) for word in o.words)]

    return make


@pytest.fixture(scope="module", params=NAMES)
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    train: Train,
    options_of: Callable[[str], list[str]],
) -> tuple[str, Path]:
    """A method and its tiny run, which was never disturbed."""
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    folder = tmp_path_factory.mktemp("runs") / request.param
    assert train("--run-dir", folder, *options_of(request.param)) == 0
    return request.param, folder


def prompts_of(method: str, run: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Prompts that the method's policy reads: a text that it knows, and a demonstration."""
    states = rng.normal(size=(9, 39)).astype(np.float32)
    demonstration = Trajectory(states, rng.uniform(-1, 1, (9, 4)).astype(np.float32), states[:, 0], "reach-v3")
    text = next(iter(json.loads((run / "prompts.json").read_text()).values()))["text"]
    return {"text": text if method in PROMPTED else None, "trajectory": demonstration if method in READERS else None}


def test_the_run_is_whole(trained: Trained) -> None:
    method, run = trained
    description = json.loads((run / "policy" / "policy.json").read_text())
    assert description["method"] == json.loads((run / "config.json").read_text())["method"]["name"] == method
    assert ("critic.safetensors" in description["sha256"]) == (method == "diffusion-ql")
    records = read_results(run / "results.json")
    assert len(records) == 6
    assert {record.method for record in records} == {method}
    assert {bool(record.prompts.text) for record in records} == {method in PROMPTED}
    assert {bool(record.prompts.trajectory) for record in records} == {method in READERS}
    assert {record.acting.sampler for record in records} == {SAMPLERS.get(method, "none")}
    assert {record.acting.action_horizon for record in records} == {3 if method == "llmdpd" else 1}
    assert method in (run / "report.html").read_text()
    logged = [record for record in read_metrics(run / "metrics.jsonl") if any(n.startswith("loss/") for n in record)]
    assert len(logged) == 4
    assert all(record.keys() == logged[0].keys() for record in logged), "every mark has every loss"
    if method in PROMPTED:
        assert logged[-1]["loss/diffusion"] < logged[0]["loss/diffusion"]


def test_target_returns_are_the_datas(trained: Trained, data_folder: Path) -> None:
    method, run = trained
    policy = Policy.load(run)
    if not isinstance(policy.network, HistoryPolicy):
        assert "target_returns" not in policy.metadata
        return
    dataset = load_dataset(data_folder / "train")
    assert policy.metadata["target_returns"] == dataset.target_returns()
    assert float(policy.network.return_scale) == pytest.approx(np.abs(dataset.returns_to_go()).max())
    metadata = policy.metadata | {"target_returns": {"reach-v3": "much"}}
    Policy(method, policy.network, None, policy.acting, metadata=metadata).save(run.parent / f"wrong-{method}")
    with pytest.raises(InputError, match=r"metadata\.target_returns"):
        Policy.load(run.parent / f"wrong-{method}")


def test_stopped_and_resumed_it_is_the_straight_run_bit_for_bit(
    trained: Trained,
    tmp_path: Path,
    options_of: Callable[[str], list[str]],
    contents: Contents,
    stopped_and_resumed: Callable[..., None],
    rng: np.random.Generator,
) -> None:
    method, straight = trained
    parts = ((1, 20), (20, 39)) if method in PROMPTED else ((1, 39),)  # before the first selection, and after it
    for first, last in parts:
        run = tmp_path / str(first)
        stopped_and_resumed(run, options_of(method), METHODS[method], int(rng.integers(first, last)))
        assert contents(run) == contents(straight)


def test_it_is_trained_on_from_what_it_has_learned(
    trained: Trained,
    tmp_path: Path,
    options_of: Callable[[str], list[str]],
    train: Train,
    refused: Callable[..., str],
) -> None:
    """At a rate of 0 the policy stays what it was; what its folder lacks is in the checkpoint, or starts anew."""
    method, run = trained
    short = ["--iterations", "2", "--training.select-every", "0", "--evaluation", "none", "--lr", "0"]
    words = [*options_of(method), *short, *(["--method.lm-lr", "0"] if method == "lamo" else [])]
    if METHODS[method].online:
        words[words.index("--iterations") + 1] = "40"
        assert "only methods that learn from a data set" in refused("--init", run, "--run-dir", tmp_path / "x", *words)
        return
    assert train("--init", run, "--run-dir", tmp_path / "run", *words) == 0
    before, after = (
        safetensors.torch.load_file(each / "policy" / "model.safetensors") for each in (run, tmp_path / "run")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    notes = json.loads((tmp_path / "run" / "meta.json").read_text())["init"]
    assert (notes["statistics"], notes["anew"]) == ("kept", "nothing")
    heads = ["--init", run, "--run-dir", tmp_path / "heads", *words, "--init.parts", "heads"]
    if method in WITH_HEADS:
        assert train(*heads) == 0
        assert "are frozen" in json.loads((tmp_path / "heads" / "meta.json").read_text())["init"]["learned"]
    else:
        assert "no heads that could learn alone" in refused(*heads)
    shutil.copytree(run / "policy", tmp_path / "alone")
    assert train("--init", tmp_path / "alone", "--run-dir", tmp_path / "other", *words) == 0
    anew = json.loads((tmp_path / "other" / "meta.json").read_text())["init"]["anew"]
    assert anew == ANEW.get(method, "nothing")


def test_lamo_resumes_with_the_same_text_alone(
    trained: Trained, tiny_gpt2: tuple[Path, Path], refused: Callable[..., str]
) -> None:
    method, run = trained
    metadata = Policy.load(run).metadata.get("language_model")
    if method != "lamo":
        assert metadata is None
        return
    text = tiny_gpt2[1].read_text()
    assert metadata["revision"].startswith("sha256:")
    tiny_gpt2[1].write_text(f"{text}again\n")
    try:
        assert "language_model.corpus" in refused("--resume", run)
    finally:
        tiny_gpt2[1].write_text(text)


def test_the_policy_comes_back_and_acts_the_same(trained: Trained, tmp_path: Path, rng: np.random.Generator) -> None:
    method, run = trained
    policy = Policy.load(run)
    policy.save(tmp_path / "copy")
    again = Policy.load(tmp_path / "copy")
    states, prompts = rng.normal(size=(11, 39)).astype(np.float32), prompts_of(method, run, rng)
    for each in (policy, again):
        each.prompt(**prompts)
    actions = policy.act(states)
    assert actions.shape == (11, 4)
    assert (np.abs(actions) <= 1).all()
    assert np.array_equal(again.act(states), actions)
    policy.seed(0)
    policy.reset()
    assert np.array_equal(policy.act(states), actions)
    policy.reset()
    assert np.array_equal(policy.act(states), actions) == (method not in SAMPLERS), "the noise of a chain goes on"
    policy.reset()
    assert policy.act(states[0]).shape == (4,)
    if method in READERS:
        again.prompt(**(prompts | {"trajectory": prompts_of(method, run, rng)["trajectory"]}))
        again.seed(0)
        assert not np.allclose(again.act(states), actions), "the prompt matters"
    if method not in PROMPTED:
        with pytest.raises(InputError, match="without text"):
            policy.prompt(**(prompts | {"text": "reach"}))


def test_an_action_depends_on_its_own_row_alone(trained: Trained, rng: np.random.Generator) -> None:
    method, run = trained
    policy = Policy.load(run)
    given = [prompts_of(method, run, rng) for _ in range(3)]
    prompts = policy.encode_prompts([each["text"] for each in given], [each["trajectory"] for each in given])
    states, seeds = rng.normal(size=(13, 39)).astype(np.float32), rng.integers(0, 2**62, 13)
    prompt_of, steps = rng.integers(0, 3, 13), rng.integers(0, 50, 13)

    def act(some: np.ndarray) -> np.ndarray:
        episodes = policy.episodes(prompts, prompt_of, np.float32(1.0))
        return episodes.act(some, steps[some], states[some], np.zeros(len(some), np.float32), lambda r: seeds[some][r])

    together, some = act(np.arange(13)), rng.permutation(13)[: int(rng.integers(1, 13))]
    # Not bit for bit: how torch rounds a product depends on its number of rows.
    np.testing.assert_allclose(act(some), together[some], rtol=0, atol=1e-4)


def test_evaluation_refuses_what_the_method_does_not_do(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    method, run = trained
    for name, value in (("--samples", 3), ("--noise-scale", 0.5), ("--action-horizon", 1)):
        if name not in ACTING.get(method, ()):
            assert evaluate([str(run), name, str(value)]) == 2
            assert name in capsys.readouterr().err
    fields = {name for name in vars(Policy.load(run).acting) if f"--{name.replace('_', '-')}" in ACTING["llmdpd"]}
    assert fields == {name.removeprefix("--").replace("-", "_") for name in ACTING.get(method, ())}
    if method not in READERS:
        assert evaluate([str(run), "--prompts", "swapped"]) == 2
        assert "trained without such prompts" in capsys.readouterr().err


def test_a_method_resumes_with_its_own_options_alone(trained: Trained, refused: Callable[..., str]) -> None:
    method, run = trained
    option = "--method.alpha" if "--samples" in ACTING.get(method, ()) else "--method.eta"
    assert f"{option} 1, with --method {method}" in refused("--resume", run, option, 1)


@pytest.mark.parametrize("method", BASELINES)
def test_a_method_starts_from_any_preset(method: str) -> None:
    for preset in ("metaworld", "metaworld-paper", "d4rl-hopper", "smoke"):
        config = parse_train(["--preset", preset, f"--method={method}"])
        assert (config.preset, config.method.name) == (preset, method)
        assert not config.method.network.context_config().text


def test_methods_that_do_not_exist_are_named() -> None:
    with pytest.raises(InputError, match="td3-bc"):
        with_method(TrainConfig(), "td3bc")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("bc --method.acting.samples 3", "acting.samples"),
        ("td3-bc --method.states.sigma 1", "one of rad, s4rl"),
        ("cql --method.network.chunk 2", "network.chunk"),
        ("dt --method.network.chunk 2", "network.chunk"),
        ("dt --method.network.context.text", "network.context.text"),
        ("prompt-dt --method.network.context.kind retrieval", "network.context.kind"),
        ("mtdiff --method.network.context.text", "network.context.text"),
        ("mtdiff --method.acting.samples 2", "acting.samples"),
        ("bc --method.network.sequence.context 2", "one of dt, prompt-dt"),
        ("trajectory-diffusion --method.network.trajectory.guidance 2", "one of mtdiff"),
        ("trajectory-diffusion --method.acting.samples 2", "acting.samples"),
        ("trajectory-diffusion --method.acting.precision bf16", "acting.precision"),
        ("trajectory-diffusion --method.augmentation.rotate 0.5", "augmentation.rotate"),
        ("s4rl --method.states.copies 0", "method.states.copies"),
        ("rad --method.states.scale-low 2", "method.states.scale_low"),
        ("dt --method.network.sequence.width 15 --method.network.sequence.heads 2", "sequence.heads"),
        ("dt --method.augmentation.offset 0.1", "method.augmentation"),
        ("dt --method.self-prompted 0.1", "method.self_prompted"),
        ("mtdiff --method.return-probability 1.1", "method.return_probability"),
        ("diffusion-bc --method.eta 1", "method.eta"),
        ("sac --data.fraction 0.5", "data.fraction"),
        ("bc --agent llmdpd", "two methods"),
        # Version 0.1's spellings.
        ("bc --agent.lr 1", "--agent.lr"),
        ("bc --sac.lr 1", "--sac.lr"),
        ("mtdiff --training.augmentation.clock-scale 1", "version 0.1 was the last"),
    ],
)
def test_options_that_a_method_does_not_have(words: str, named: str) -> None:
    with pytest.raises(InputError) as error:
        parse_train(["--method", *words.split()])
    assert named in str(error.value)


def test_the_last_versions_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--agent td3-bc --td3-bc.alpha 1 --training.batch-size 24 --policy.hidden-dim 8 --evaluation.no-films"
    new = "--method td3-bc --method.alpha 1 --batch-size 24 --method.network.hidden-dim 8 --evaluation.no-videos"
    assert parse_train(words.split()) == parse_train(new.split())
    said = capsys.readouterr().err
    assert said.count("the old spelling goes in the next version") == 5
    assert "--evaluation.no-films is now --evaluation.no-videos" in said
