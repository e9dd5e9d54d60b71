"""Options as words: the fields that they set, and that those of another method are refused where they were given."""

from __future__ import annotations

from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from llmdpd.cli.options import ALIASES, METHOD_FIELDS, _leaves, has_field, split_options
from llmdpd.cli.train import configuration
from llmdpd.config.schema import DataConfig, TrainConfig, TrainingConfig
from llmdpd.errors import InputError
from llmdpd.methods.networks import Method
from llmdpd.utils.plain import to_plain

PLANS = ("--preset", "metaworld-trajectory-diffusion")


def test_words_are_split_into_options_with_their_fields() -> None:
    words = ["--tasks.seen", "reach", "push", "--agent.lr=-1", "--agent.no_critic-sees-prompts", "--agent", "llmdpd"]
    found = [(option.name, option.field, len(option.words)) for option in split_options(words)]
    assert found == [
        ("--tasks.seen", "tasks.seen", 3),
        ("--agent.lr", "agent.lr", 1),
        ("--agent.no_critic-sees-prompts", "agent.critic_sees_prompts", 1),
        ("--agent", "method", 2),
    ]
    assert [word for option in split_options(words) for word in option.words] == words
    assert [(option.name, option.words) for option in split_options(["-1", "--seed", "-1"])] == [
        ("", ("-1",)),
        ("--seed", ("--seed", "-1")),
    ]


def test_second_names_are_those_that_the_configuration_declares() -> None:
    found = {}
    for part, kind in (("", TrainConfig), ("data.", DataConfig), ("training.", TrainingConfig)):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for extra in hint.__metadata__ if get_origin(hint) is Annotated else ():
                for alias in getattr(extra, "aliases", None) or ():
                    found[alias.removeprefix("--").replace("-", "_")] = part + name
    assert found == ALIASES


def test_every_method_says_what_it_reads() -> None:
    assert METHOD_FIELDS.keys() == set(get_args(Method))
    assert has_field("llmdpd", "agent.lr")
    assert not has_field("llmdpd", "policy.plan.width")
    for method in METHOD_FIELDS:
        fields = list(_leaves(to_plain(TrainConfig())))
        for own in METHOD_FIELDS[method]:
            assert any(field == own or field.startswith(f"{own}.") for field in fields), f"{own} is no field"
        for shared in ("seed", "policy.action_bound", "evaluation.episodes", "agents", "no.such.field"):
            assert has_field(method, shared)


@pytest.mark.parametrize(
    ("words", "field", "found", "expected", "hint"),
    [
        (
            (*PLANS, "--agent.eta", "1"),
            "--agent.eta",
            "trajectory-diffusion",
            "--planner.first-action-weight",
            "--method",
        ),
        ((*PLANS, "--agent.lr=1"), "--agent.lr", "--agent.lr=1", "--planner.lr,", "--planner.lr"),
        (
            (*PLANS, "--agent.no-critic-sees-prompts"),
            "--agent.no-critic-sees-prompts",
            "trajectory",
            "--policy.plan",
            "choose another --method",
        ),
        ((*PLANS, "--policy.hidden_dim", "64"), "--policy.hidden_dim", "64", "--policy.plan.width", "leave it out"),
        (
            (*PLANS, "--policy.chunk", "2"),
            "--policy.chunk",
            "trajectory-diffusion",
            "--policy.plan.horizon",
            "leave it",
        ),
        ((*PLANS, "--acting.precision", "bf16"), "--acting.precision", "bf16", "--planner.lr", "--method"),
        ((*PLANS, "--acting.temperature", "2"), "--acting.temperature", "2", "--planner.clone", "leave it out"),
        (("--agent.eta", "0", "--method", "trajectory-diffusion"), "--agent.eta", "trajectory", "--planner.lr", ""),
        (("--planner.lr", "1e-4"), "--planner.lr", "--method llmdpd", "--agent.lr,", "--agent.lr"),
        (("--policy.plan.width", "64"), "--policy.plan.width", "--method llmdpd", "--policy.hidden-dim", ""),
        ((*PLANS, "--agent", "llmdpd", "--planner.lr", "1"), "--planner.lr", "--method llmdpd", "--agent.eta", ""),
    ],
)
def test_an_option_of_another_method_is_refused(
    words: tuple[str, ...], field: str, found: str, expected: str, hint: str
) -> None:
    with pytest.raises(InputError, match="the method has no such option") as caught:
        configuration(words)
    assert caught.value.field == field
    assert found in str(caught.value.found)
    assert expected in str(caught.value.expected)
    assert hint in str(caught.value.hint)


def test_what_a_preset_or_a_default_says_is_no_matter() -> None:
    config = configuration([*PLANS, "--planner.lr", "1e-4", "--policy.plan.width", "64", "--acting.steps", "4"])
    assert config.agent.eta == 0
    assert config.agent.lr == 6e-4, "the preset's"
    assert (config.planner.lr, config.policy.plan.width) == (1e-4, 64)
    assert configuration(["--agent.eta", "0.1", "--policy.hidden-dim", "64"]).planner.lr == 6e-4
