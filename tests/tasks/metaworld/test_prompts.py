from __future__ import annotations

import pytest

from llmdpd.errors import InputError
from llmdpd.tasks.metaworld.prompts import SuccessCondition, all_task_metadata, metaworld_prompt, task_metadata
from llmdpd.tasks.texts.text_prompt import TextPrompt

NAMES = sorted(all_task_metadata())


def test_all_50_tasks_have_a_prompt_of_their_own() -> None:
    environments = pytest.importorskip("metaworld.env_dict").ALL_V3_ENVIRONMENTS
    assert {f"{name}-v3" for name in NAMES} == set(environments)
    prompts = [metaworld_prompt(name) for name in NAMES]
    assert len({prompt.objective for prompt in prompts}) == 50
    for prompt in prompts:
        assert TextPrompt.parse(prompt.render()) == prompt


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_is_complete(name: str) -> None:
    prompt, facts = metaworld_prompt(name), task_metadata(name)
    assert prompt.task == f"Meta-World {name.replace('-', ' ')}."
    for value in (prompt.objective, prompt.constraints, prompt.objects, prompt.success, prompt.observations):
        assert value.endswith(".")
        assert "{" not in value
        assert ".." not in value
        assert "  " not in value
    for index, condition in enumerate(facts.conditions):
        if condition.kind in ("near", "joint_above", "joint_near", "held"):
            assert f"{{{index}}}" in facts.success
            assert condition.limit_text in prompt.success
        for width in condition.box:
            assert not width or f"{100 * width:g} cm" in prompt.success
    assert prompt.constraints.startswith("Randomize ")


def test_the_sentence_on_what_is_drawn() -> None:
    assert metaworld_prompt("coffee-push").constraints.startswith(
        "Randomize mug (x 20 cm, y 10 cm) and goal with machine (x 10 cm, y 5 cm) positions. Mug"
    )
    assert metaworld_prompt("sweep-into").constraints.startswith(
        "Randomize cube (x 20 cm, y 10 cm) position; the goal is fixed. "
    )
    assert "; the goal moves along." in metaworld_prompt("disassemble").constraints
    assert "; the goal's y moves along." in metaworld_prompt("sweep").constraints


def test_limits_as_a_person_says_them() -> None:
    assert SuccessCondition(limit=0.07).limit_text == "7 cm"
    assert SuccessCondition(limit=0.024).limit_text == "2.4 cm"
    assert task_metadata("lever-pull").conditions[0].limit_text == "7.5 degrees"


def test_versions_name_the_same_task_and_other_names_none() -> None:
    with pytest.raises(InputError, match="sweep-into"):
        metaworld_prompt("sweep-in-to")
    assert metaworld_prompt("sweep-into-v3") == metaworld_prompt("sweep-into-v2") == metaworld_prompt("sweep-into")
