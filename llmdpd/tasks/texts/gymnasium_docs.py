"""A text prompt for any Gymnasium environment, made by program from the environment's own documentation."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from llmdpd.errors import InputError, nearest_names
from llmdpd.tasks.texts.markdown import condense, first_words, sections, sentences
from llmdpd.tasks.texts.text_prompt import TextPrompt
from llmdpd.utils.extras import extra

with extra("data"):
    import gymnasium
    from gymnasium.envs.registration import EnvSpec, load_env_creator

# Headings of Gymnasium's documentation, in lower case without a colon → the prompt's field and its room in words.
# The rooms are such that the prompts of Gymnasium's own environments fit MiniLM's 512 positions (a test checks it).
_FIELDS = {
    "action space": ("actions", 50),
    "observation space": ("observations", 30),
    "reward": ("rewards", 30),
    "rewards": ("rewards", 30),
    "starting state": ("start", 15),
    "episode end": ("end", 35),
    "episode termination": ("end", 35),
    "episode truncation": ("end", 35),
}
_DESCRIPTION_WORDS = 45
_GOAL = re.compile(r"\b(goal|objective|task|aim) (is|of|here)\b", re.IGNORECASE)
# The origin of an environment says nothing about the task.
_ASIDE = re.compile(
    r"\b(based on|introduced|described|proposed|presented) (the work of|by|in)\b|\bsee \[|\baims to increase\b",
    re.IGNORECASE,
)


def environment_prompt(env_id: str) -> TextPrompt:
    """The text prompt of a registered Gymnasium environment: goal, actions, observations, rewards, start and end.

    The text is the class's docstring, condensed: sections become the prompt's fields, tables become lists, code and
    citations are dropped and every field is cut at whole sentences. The environment is not built for that. One
    without documentation is built, without rendering: where another version has documentation and the same spaces
    (Gymnasium documents only MuJoCo's -v5), that is taken; otherwise the prompt states the spaces. Its notes say so.

    Raises `InputError` for an unknown id, with the nearest ones, and for one that can't be imported or built.
    """
    spec = _spec(env_id)
    origin, text = spec.id, _documentation(spec)
    if text is None:
        origin, text = _sibling_documentation(spec)
    notes = ""
    if text is None:
        actions, observations = _spaces(spec)
        fields = {"actions": f"{actions}.", "observations": f"{observations}."}
        notes = "This environment has no documentation; the prompt is made from its spaces."
    else:
        fields = _documentation_fields(text)
        if origin != spec.id:
            notes = f"Described by the documentation of {origin}, whose spaces are the same."
    if spec.max_episode_steps is not None:
        end = [f"{fields['end'].rstrip('.')}."] if "end" in fields else []
        fields["end"] = " ".join([*end, f"An episode has at most {spec.max_episode_steps} steps."])
    return TextPrompt(task=f"Gymnasium {spec.id}.", notes=notes, **fields)


def _spec(env_id: str) -> EnvSpec:
    # As for gymnasium.make: an id of the form module:Name-v0 names the module that registers it.
    module, colon, name = env_id.rpartition(":")
    try:
        if colon:
            importlib.import_module(module)
        spec = gymnasium.spec(name)
    except (ImportError, ValueError) as error:  # ValueError: an empty module name
        raise InputError("the environment's module can't be imported", found=env_id, hint=str(error)) from None
    except gymnasium.error.Error:
        expected = f"a registered id, such as {nearest_names(name, gymnasium.registry)}"
        raise InputError("unknown Gymnasium environment", found=env_id, expected=expected) from None
    assert isinstance(spec, EnvSpec)
    return spec


def _documentation(spec: EnvSpec) -> str | None:
    creator = _creator(spec)
    # A function that makes the environment has, at best, documentation of the making.
    owner = creator if isinstance(creator, type) else type(_make(spec).unwrapped)
    # Not inspect.getdoc: that would take a base class's text, which says nothing of this environment.
    text = owner.__dict__.get("__doc__")
    return text if text and text.strip() else None


def _sibling_documentation(spec: EnvSpec) -> tuple[str, str | None]:
    """Id and documentation of the newest other version that has any and whose spaces are the same."""
    for other in sorted(gymnasium.registry.values(), key=lambda other: other.version or 0, reverse=True):
        if (other.namespace, other.name) == (spec.namespace, spec.name) and other.id != spec.id:
            with suppress(InputError):  # another version that can't be built here does not matter
                text = _documentation(other)
                if text is not None and _spaces(other) == _spaces(spec):
                    return other.id, text
    return "", None


@contextmanager
def _failures(problem: str, spec: EnvSpec) -> Iterator[None]:
    """Importing or building an environment can fail in any way: an absent extra, a missing library."""
    try:
        yield
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(problem, found=spec.id, hint=f"{type(error).__name__}: {first}") from None


def _creator(spec: EnvSpec) -> Callable[..., object]:
    if spec.entry_point is None:
        raise InputError("the environment has no entry point", found=spec.id)
    if not isinstance(spec.entry_point, str):
        return spec.entry_point
    with _failures("the environment can't be imported", spec):
        return load_env_creator(spec.entry_point)


def _make(spec: EnvSpec) -> gymnasium.Env:
    with _failures("the environment can't be built", spec), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "out of date", for every version but the newest
        return gymnasium.make(spec, disable_env_checker=True)


def _spaces(spec: EnvSpec) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    environment = _make(spec)
    try:
        return environment.action_space, environment.observation_space
    finally:
        environment.close()


def _documentation_fields(documentation: str) -> dict[str, str]:
    parts = sections(documentation)
    description = parts.pop("description", "") or parts.pop("", "")
    fields = _describe(condense(description))
    for heading, text in parts.items():
        name, room = _FIELDS.get(heading, ("", 0))
        if name and (condensed := condense(text, room)):
            fields[name] = f"{fields[name]} {condensed}" if name in fields else condensed
    return fields


def _describe(description: str) -> dict[str, str]:
    """Split a description into the goal and the rest; asides are dropped."""
    plain = [sentence for sentence in sentences(description) if not _ASIDE.search(sentence)]
    goals = [sentence for sentence in plain if _GOAL.search(sentence)][:2]
    rest = [sentence for sentence in plain if sentence not in goals]
    fields = {
        "objective": first_words(" ".join(goals), _DESCRIPTION_WORDS),
        "objects": first_words(" ".join(rest), _DESCRIPTION_WORDS),
    }
    return {name: text for name, text in fields.items() if text}
