"""From words to a configuration: short and old spellings, options of other methods, nearest names, help."""

from __future__ import annotations

from typing import Any

import pytest

from llmdpd.config.parse import ALIASES, parse_train, split_options
from llmdpd.config.presets import PRESETS
from llmdpd.errors import InputError
from llmdpd.methods import METHODS


def value_of(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


SHORT = {
    "--data": (["minari:x"], "data.path", "minari:x"),
    "--iterations": (["7"], "training.iterations", 7),
    "--tasks": (["reach", "push-v2"], "tasks.seen", ("reach-v3", "push-v3")),
    "--lr": (["1e-3"], "method.lr", 1e-3),
    "--batch-size": (["24"], "method.batch_size", 24),
    "--logger": (["wandb", "trackio"], "training.logger", ("wandb", "trackio")),
    "--cuda-graph": (["off"], "training.cuda_graph", "off"),
    "--evaluation": (["none"], "evaluation.mode", "none"),
}


def test_short_spellings() -> None:
    assert {*SHORT, "--tasks-file", "--init"} == ALIASES.keys(), "tests of their own: test_own_tasks.py, test_init.py"
    for option, (values, field, expected) in SHORT.items():
        assert value_of(parse_train([option, *values]), field) == expected, option
        if len(values) == 1:
            assert parse_train([f"{option}={values[0]}"]) == parse_train([option, *values])
    assert parse_train(["--batch_size", "24"]).method.batch_size == 24


def test_gpu_is_short_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert parse_train(["--gpu"]).device == "cuda"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="absent"):
        parse_train(["--gpu"])


def test_preset_protocol_and_method() -> None:
    assert parse_train([]) == PRESETS["metaworld"].resolved()
    config = parse_train(["--protocol", "paper", "--preset=smoke", "--method", "td3-bc", "--seed", "3"])
    assert (config.preset, config.tasks.protocol, config.method.name, config.seed) == ("smoke", "paper", "td3-bc", 3)
    for words, field in ((["--protocol", "ml46"], "--protocol"), (["--preset"], "--preset")):
        with pytest.raises(InputError) as error:
            parse_train(words)
        assert error.value.field == field


RETRIEVAL = "method.network.context.retrieval"
OLD: list[tuple[str, list[str], str, Any, str]] = [
    ("llmdpd", ["--agent.eta", "0.1"], "method.eta", 0.1, "--method.eta"),
    ("llmdpd", ["--agent.no_critic-sees-prompts"], "method.critic_sees_prompts", False, "no-critic-sees-prompts"),
    ("llmdpd", ["--policy.hidden-dim", "32"], "method.network.hidden_dim", 32, "--method.network.hidden-dim"),
    ("llmdpd", ["--policy.context.no-text"], "method.network.context.text", False, "--method.network.context.no-text"),
    ("llmdpd", ["--acting.replan", "1"], "method.acting.action_horizon", 1, "--method.acting.action-horizon"),
    ("llmdpd", ["--training.batch-size=36"], "method.batch_size", 36, "--method.batch-size"),
    ("llmdpd", ["--training.augmentation.turn", "0.2"], "method.augmentation.rotate", 0.2, "--method.augmentation.rot"),
    ("llmdpd", ["--data.tail", "3"], "data.post_success_steps", 3, "--data.post-success-steps"),
    ("llmdpd", ["--evaluation.no-films"], "evaluation.videos", False, "--evaluation.no-videos"),
    ("trajectory-diffusion", ["--planner.lr", "1e-3"], "method.lr", 1e-3, "--method.lr"),
    ("td3-bc", ["--td3_bc.alpha", "2"], "method.alpha", 2.0, "--method.alpha"),
    ("rad", ["--rad.sigma", "0.1"], "method.states.sigma", 0.1, "--method.states.sigma"),
    ("mtdiff", ["--policy.context.encoder.steps", "6"], "method.network.demonstration.steps", 6, "demonstration.steps"),
    (
        "mtdiff",
        ["--policy.plan.history", "3"],
        "method.network.trajectory.history",
        3,
        "--method.network.trajectory.hi",
    ),
    ("cql", ["--cql.draws", "3"], "method.samples", 3, "--method.samples"),
    ("cql", ["--method.draws=3"], "method.samples", 3, "--method.samples"),
    ("mtdiff", ["--method.network.plan.heads", "4"], "method.network.trajectory.heads", 4, "network.trajectory.heads"),
    ("llmdpd", ["--policy.context.retrieval.no-clock"], f"{RETRIEVAL}.timestep_embedding", False, "no-timestep-embed"),
    (
        "llmdpd",
        ["--method.network.context.retrieval.no-likeness"],
        f"{RETRIEVAL}.geometric_similarity",
        False,
        "--method.network.context.retrieval.no-geometric-similarity",
    ),
    ("dt", ["--policy.sequence.context", "6"], "method.network.sequence.context", 6, "--method.network.sequence.con"),
]


@pytest.mark.parametrize(("method", "words", "field", "value", "spelling"), OLD)
def test_spellings_of_version_0_1_keep_working_with_a_line_that_says_so(
    method: str, words: list[str], field: str, value: Any, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert value_of(parse_train(["--method", method, *words]), field) == value
    said = capsys.readouterr().err
    assert said.startswith(f"{words[0].split('=')[0]} is now ")
    assert spelling in said
    assert "the next version" in said
    assert said.count("\n") == 1


def test_agent_was_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_train(["--agent", "bc"]) == parse_train(["--method", "bc"])
    assert capsys.readouterr().err.startswith("--agent is now --method;")
    with pytest.raises(InputError, match="two methods"):
        parse_train(["--agent", "bc", "--method", "cql"])


EMPTY = [[f"--{name}", ""] for name in ("preset", "protocol", "method", "init", "init.source", "tasks-file")] + [
    ["--init="]
]
"""As of a shell's variable that is not set; without the value the run would be another one."""


@pytest.mark.parametrize(
    ("words", "message", "told"),
    [
        (["--method", "bc", "--method.gamma", "0.9"], "the method has no such option", "llmdpd, diffusion-ql"),
        (["--td3-bc.alpha", "2"], "the method has no such option", "one of td3-bc, rad, s4rl"),
        (["--planner.lr=1"], "the method has no such option", "one of trajectory-diffusion"),
        (["--acting.views", "4"], "this option is gone", "version 0.1"),
        (["--training.augmentation.gripper", "0.3"], "this option is gone", "version 0.1"),
        (["--itertions", "9"], "no such option", "perhaps --iterations or --training.iterations"),
        (["--method.gama", "0.9"], "no such option", "perhaps --method.gamma"),
        (["--methd", "bc"], "no such option", "--method"),
        (["--iterations", "x"], "invalid literal for int", "--help"),
        (["--iterations"], "Missing value", "--help"),
        (["reach"], "Unrecognized", "reach"),
        *((words, "an option without its value", words[0].partition("=")[0]) for words in EMPTY),
    ],
)
def test_words_that_are_refused(words: list[str], message: str, told: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_train(words)
    assert told in str(error.value)
    assert max(map(len, str(error.value).splitlines())) < 200, "no list of all tasks"


def test_words_are_split_into_options_with_their_fields() -> None:
    words = ["--tasks", "reach", "push", "--method.lr=-1", "--method.no_critic-sees-prompts", "--seed", "-1"]
    found = split_options(words)
    assert [(option.name, option.field, len(option.words)) for option in found] == [
        ("--tasks", "tasks.seen", 3),
        ("--method.lr", "method.lr", 1),
        ("--method.no_critic-sees-prompts", "method.critic_sees_prompts", 1),
        ("--seed", "seed", 2),
    ]
    assert [word for option in found for word in option.words] == words


@pytest.mark.parametrize("method", METHODS)
def test_help_is_short_and_of_one_method(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train(["--method", method, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 110
    shown = "\n".join(lines)
    assert "--method.network.action-bound 1.0 " in shown
    assert ("--method.eta" in shown) == (method in ("llmdpd", "diffusion-ql", "diffusion-bc"))


def test_help_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train(["--help-all"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--method.network.context.retrieval.lookahead" in shown
    assert "Polyak rate" in shown


def test_the_cpu_that_is_asked_for_starts_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> tuple[str, str]:
        raise AssertionError("CUDA was asked")

    monkeypatch.setattr("llmdpd.utils.device.automatic_device", ask)
    assert parse_train(["--device", "cpu"]).device == "cpu"
