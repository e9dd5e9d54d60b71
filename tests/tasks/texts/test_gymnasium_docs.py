from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

gymnasium = pytest.importorskip("gymnasium")

from llmdpd.errors import InputError  # noqa: E402
from llmdpd.tasks.texts.gymnasium_docs import environment_prompt  # noqa: E402
from llmdpd.tasks.texts.text_prompt import TextPrompt  # noqa: E402


class Documented(gymnasium.Env):
    """
    ## Description
    Based on the work of A. Nobody in [a paper](http://example.org). A cart carries a cup. The goal is to spill nothing.

    ## Action Space
    Push it: `Box(-1, 1, (1,))`.

    ## Arguments
    Secret knobs.

    ## Rewards:
    One for every dry step.

    ## Episode End
    ### Termination
    The cup is empty
    """

    def __init__(self) -> None:
        raise AssertionError("was built although its class is documented")


class Undocumented(gymnasium.Env):
    action_space = gymnasium.spaces.Discrete(3)
    observation_space = gymnasium.spaces.Box(-1, 1, (7,))


class Other(Undocumented):
    observation_space = gymnasium.spaces.Box(-1, 1, (8,))


class Newer(Undocumented):
    """
    ## Description
    The goal is to wait.
    """


def make_documented() -> gymnasium.Env:
    """Documentation of the making, not of what is made."""
    return Newer()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    entries = {
        "LlmdpdDocumented-v0": Documented,
        "LlmdpdBare-v0": Undocumented,
        "LlmdpdSame-v0": Undocumented,
        "LlmdpdSame-v1": Newer,
        "LlmdpdDiffers-v0": Other,
        "LlmdpdDiffers-v1": Newer,
        "LlmdpdFunction-v0": make_documented,
        "LlmdpdMissing-v0": "no_such_module_at_all:Env",
    }
    for name, entry in entries.items():
        gymnasium.register(name, entry, max_episode_steps=42 if name == "LlmdpdDocumented-v0" else None)
    yield
    for name in entries:
        del gymnasium.registry[name]


def test_sections_become_fields_without_building_the_environment() -> None:
    assert environment_prompt("LlmdpdDocumented-v0") == TextPrompt(
        task="Gymnasium LlmdpdDocumented-v0.",
        objective="The goal is to spill nothing.",
        objects="A cart carries a cup.",
        actions="Push it: Box(-1, 1, (1,)).",
        rewards="One for every dry step.",
        end="Termination: The cup is empty. An episode has at most 42 steps.",
    )


def test_without_documentation_the_spaces_are_told_and_that_is_said() -> None:
    prompt = environment_prompt("LlmdpdBare-v0")
    assert prompt.actions == "Discrete(3)."
    assert prompt.observations == "Box(-1.0, 1.0, (7,), float32)."
    assert "has no documentation" in prompt.notes


def test_another_versions_documentation_is_taken_if_the_spaces_are_the_same() -> None:
    prompt = environment_prompt("LlmdpdSame-v0")
    assert prompt.objective == "The goal is to wait."
    assert "LlmdpdSame-v1" in prompt.notes
    differs = environment_prompt("LlmdpdDiffers-v0")
    assert differs.objective == ""
    assert "has no documentation" in differs.notes


def test_a_function_as_entry_point_tells_of_what_it_makes() -> None:
    assert environment_prompt("LlmdpdFunction-v0").objective == "The goal is to wait."


@pytest.mark.parametrize("name", ["Hopper", "HalfCheetah", "Walker2d"])
def test_locomotion(name: str) -> None:
    pytest.importorskip("mujoco")
    newest, older = environment_prompt(f"{name}-v5"), environment_prompt(f"{name}-v4")
    spec = gymnasium.spec(f"{name}-v5")
    environment = gymnasium.make(spec).unwrapped
    actions, observations = environment.action_space.shape[0], environment.observation_space.shape[0]
    environment.close()
    # All rows of both tables are told: the last one is the width of the space less one.
    assert f"0-{actions - 1} Torque applied on the " in newest.actions
    assert f"-{observations - 1} angular velocity of the " in newest.observations
    assert "more" not in newest.observations
    assert "forward" in newest.objective
    assert "forward_reward" in newest.rewards
    assert newest.end.endswith("An episode has at most 1000 steps.")
    assert older.observations == newest.observations
    assert f"{name}-v5" in older.notes


def test_cartpole() -> None:
    prompt = environment_prompt("CartPole-v1")
    assert "balance the pole" in prompt.objective
    assert "0: Push cart to the left; 1: Push cart to the right." in prompt.actions
    assert "0 Cart Position (-4.8 to 4.8); 1 Cart Velocity;" in prompt.observations
    assert "±12°" in prompt.end
    assert "Barto" not in prompt.render()


def test_no_mark_of_markdown_is_left_and_nothing_heavy_is_drawn() -> None:
    for name in ("Hopper-v5", "CartPole-v1", "Pendulum-v1", "Taxi-v4"):
        text = environment_prompt(name).render()
        for mark in ("**", "`", "](", "##", "|--", "<sup>", "\\frac", "import gym"):
            assert mark not in text, (name, mark)
        assert TextPrompt.parse(text) == environment_prompt(name)
    assert "pygame" not in sys.modules


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("Hoper-v5", "Hopper-v5"), ("CartPole-v9", "CartPole-v1"), ("", "-v"), ("no/CartPole-v1", "-v1")],
)
def test_unknown_ids_offer_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match="unknown Gymnasium environment") as caught:
        environment_prompt(name)
    assert nearest in str(caught.value.expected)


def test_what_cannot_be_imported_or_built_is_an_input_error() -> None:
    with pytest.raises(InputError, match="can't be imported") as caught:
        environment_prompt("LlmdpdMissing-v0")
    assert "no_such_module_at_all" in str(caught.value.hint)
    with pytest.raises(InputError, match="can't be imported"):
        environment_prompt("no_such_module_at_all:Env-v0")
    with pytest.raises(InputError, match="can't be built"):
        environment_prompt("Hopper-v2")  # registered, but moved out of Gymnasium
