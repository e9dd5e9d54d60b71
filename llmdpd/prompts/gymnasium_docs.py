"""A text prompt for any Gymnasium environment, made by program from the environment's own documentation."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

from llmdpd.errors import InputError, nearest_names
from llmdpd.prompts.markdown import condense, first_words, sections, sentences
from llmdpd.prompts.text import TextPrompt

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


class _Documented(NamedTuple):
    """An environment's documentation, `origin` being the id whose documentation it is."""

    text: str
    origin: str


def environment_prompt(env_id: str) -> TextPrompt:
    """The text prompt of a registered Gymnasium environment: goal, actions, observations, rewards, start and end.

    The text is the class's docstring, condensed: sections become the prompt's fields, tables become lists, code and
    citations are dropped and every field is cut at whole sentences. The environment is not built for that. One
    without documentation is built, without rendering: where another version has documentation and the same spaces
    (Gymnasium documents only MuJoCo's -v5), that is taken; otherwise the prompt states the spaces. Its notes say so.

    Raises `InputError` for an unknown id, with the nearest ones, and for one that can't be imported or built.
    """
    spec = _spec(env_id)
    documented = _documentation(spec) or _sibling_documentation(spec)
    fields = _space_fields(spec) if documented is None else _documentation_fields(documented.text)
    notes = []
    if documented is None:
        notes.append("This environment has no documentation; the prompt is made from its spaces.")
    elif documented.origin != spec.id:
        notes.append(f"Described by the documentation of {documented.origin}, whose spaces are the same.")
    if spec.max_episode_steps is not None:
        end = [f"{fields['end'].rstrip('.')}."] if "end" in fields else []
        fields["end"] = " ".join([*end, f"An episode has at most {spec.max_episode_steps} steps."])
    return TextPrompt(task=f"Gymnasium {spec.id}.", notes=" ".join(notes), **fields)


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
        known = list(gymnasium.registry)
        raise InputError(
            "unknown Gymnasium environment",
            found=env_id,
            expected=f"a registered id, such as {nearest_names(name, known)}",
        ) from None
    assert isinstance(spec, EnvSpec)
    return spec


def _documentation(spec: EnvSpec) -> _Documented | None:
    creator = _creator(spec)
    # A function that makes the environment has, at best, documentation of the making.
    owner = creator if isinstance(creator, type) else type(_make(spec).unwrapped)
    # Not inspect.getdoc: that would take a base class's text, which says nothing of this environment.
    text = owner.__dict__.get("__doc__")
    return _Documented(text, spec.id) if text and text.strip() else None


def _sibling_documentation(spec: EnvSpec) -> _Documented | None:
    """The documentation of the newest other version that has any and whose spaces are the same."""
    versions = [
        other
        for other in gymnasium.registry.values()
        if (other.namespace, other.name) == (spec.namespace, spec.name) and other.id != spec.id
    ]
    for other in sorted(versions, key=lambda other: other.version or 0, reverse=True):
        try:
            documented = _documentation(other)
            if documented is None or _spaces(other) != _spaces(spec):
                continue
        except InputError:  # another version that can't be built here does not matter
            continue
        return documented
    return None


def _creator(spec: EnvSpec) -> Callable[..., object]:
    if spec.entry_point is None:
        raise InputError("the environment has no entry point", found=spec.id)
    if not isinstance(spec.entry_point, str):
        return spec.entry_point
    try:
        return load_env_creator(spec.entry_point)
    except Exception as error:  # importing it can fail in any way: an absent extra, a missing library
        raise InputError("the environment can't be imported", found=spec.id, hint=_first_line(error)) from None


def _make(spec: EnvSpec) -> gymnasium.Env:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "out of date", for every version but the newest
            return gymnasium.make(spec, disable_env_checker=True)
    except Exception as error:  # as above
        raise InputError("the environment can't be built", found=spec.id, hint=_first_line(error)) from None


def _spaces(spec: EnvSpec) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    environment = _make(spec)
    try:
        return environment.action_space, environment.observation_space
    finally:
        environment.close()


def _space_fields(spec: EnvSpec) -> dict[str, str]:
    actions, observations = _spaces(spec)
    return {"actions": f"{actions}.", "observations": f"{observations}."}


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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
