"""results.json: what a run reached on every evaluated task, as typed records that are checked on the way in and out.

One record is one task evaluated with one checkpoint under one setting. What can be computed from a record (success
rate, interval) is written for readers in other languages, and compared with the counts when a file is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

from llmdpd.errors import InputError, located
from llmdpd.tasks.metaworld.behaviours import BEHAVIOURS
from llmdpd.utils.files import atomic_write_json, read_json
from llmdpd.utils.plain import from_plain, to_plain

SCHEMA = 2
SPLITS = ("seen", "unseen")
CHECKPOINTS = ("last", "best")
_DERIVED = ("success_rate", "ci95")
_SWAPPED = re.compile(r"swapped \([^)]*'s\): ")


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a success probability (E. B. Wilson, 1927), without continuity correction.

    Returns (low, high) as fractions within [0, 1]. Unlike mean ± 1.96 standard errors it stays inside [0, 1] and is
    not empty at 0 or all successes. Raises `InputError` unless 0 <= successes <= episodes, episodes >= 1 and
    0 < confidence < 1.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise InputError(
            "no such count of successes", found=f"{successes} of {episodes}", expected="0 <= k <= n, n >= 1"
        )
    if not 0.0 < confidence < 1.0:
        raise InputError("no such confidence", found=confidence, expected="between 0 and 1")
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    rate = successes / episodes
    centre = (rate + z2 / (2 * episodes)) / (1 + z2 / episodes)
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * episodes)) / episodes) / (1 + z2 / episodes)
    # At the ends the bound is exact in real numbers; rounding would put it a hair beside 0 or 1.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == episodes else centre + half
    return low, high


@dataclass(frozen=True)
class PromptUse:
    """Which prompts the policy was given: False = none, True = the task's own, or a text saying where it came from."""

    text: bool | str
    trajectory: bool | str

    def __post_init__(self) -> None:
        for name in ("text", "trajectory"):
            _check_type(f"prompts.{name}", getattr(self, name), (bool, str), "true, false or a text")
            if getattr(self, name) == "":
                raise InputError(
                    "a prompt from nowhere", field=f"prompts.{name}", found="''", expected="where it is from"
                )

    @property
    def kind(self) -> str:
        """What is special about the prompts, as `llmdpd.evaluate` words where they are from.

        "own" where nothing is, else what applies of "swapped", "text alone", "example alone", "no prompts" and an
        example's behaviour, joined by ", ".
        """
        words = [word if isinstance(word, str) else "" for word in (self.text, self.trajectory)]
        found = ["swapped"] if any(_SWAPPED.match(word) for word in words) else []
        if not (self.text and self.trajectory):
            alone = "text alone" if self.text else "example alone"
            found.append(alone if self.text or self.trajectory else "no prompts")
        behaviour = _SWAPPED.sub("", words[1]).partition(": ")[0]
        if behaviour in BEHAVIOURS:
            found.append(behaviour)
        return ", ".join(found) or "own"


@dataclass(frozen=True, kw_only=True)
class ActingUse:
    """How actions were drawn and chosen: the fields of `llmdpd.methods.acting.ActingConfig`, defaults made plain."""

    samples: int
    selection: str
    temperature: float
    noise_scale: float
    sampler: str
    steps: int
    precision: str = "fp32"  # of records from before it could be chosen
    replan: int = 1  # of records from before there were chunks
    views: int = 1  # of records from before there were views

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "replan", "views"):
            _check_count(f"acting.{name}", getattr(self, name), 1)
        for name in ("selection", "sampler", "precision"):
            _check_type(f"acting.{name}", getattr(self, name), (str,), "a text")
        for name in ("temperature", "noise_scale"):
            _check_number(f"acting.{name}", getattr(self, name))

    def __str__(self) -> str:
        chosen = f"{self.selection} choice (temperature {self.temperature:g}) of {self.samples}"
        drawn = "1 sample" if self.samples == 1 else chosen if self.selection == "soft" else f"best of {self.samples}"
        precision = "" if self.precision == "fp32" else f", {self.precision}"
        played = "" if self.replan == 1 else f", {self.replan} actions played a draw"
        views = "" if self.views == 1 else f", mean of {self.views} views"
        chain = f"{self.sampler} in {self.steps} steps, noise scale {self.noise_scale:g}"
        return f"{drawn}, {chain}{precision}{played}{views}"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One evaluated task: a success count (Meta-World), or returns and a normalised score (locomotion), never both.

    task          the environment's name, as in "sweep-into-v3"
    split         "seen" if the task's data was trained on, else "unseen"
    protocol      "paper", "ml45", "d4rl" or another name for what was trained on what
    episodes      evaluated episodes, >= 1
    seed          the run's seed (training); the evaluation's seeds are fixed and apart from it
    max_steps     steps after which an episode ended without success
    prompts       which prompts the policy was given
    acting        how actions were drawn and chosen
    trained_on    names of the tasks whose data it was trained on
    training_data what that data is, in words
    goal_visible  whether the observation shows the goal; None where the question has no meaning
    checkpoint    "last", or "best" (chosen by evaluation on other seeds than those reported)
    context       the module that joins state and prompts ("pooled", "retrieval"...)
    iterations    training iterations of the evaluated checkpoint
    wall_seconds  seconds that this task's evaluation took
    method        what learned it ("llmdpd" in records from before there were others)
    successes     episodes in which success was reached at any step
    returns_mean, returns_std   mean and standard deviation over episodes of the undiscounted return
    normalised_score            100 (R - R_min) / (R_max - R_min), D4RL's

    Raises `InputError` naming the field, what was found and what was expected.
    """

    task: str
    split: str
    protocol: str
    episodes: int
    max_steps: int
    seed: int
    prompts: PromptUse
    acting: ActingUse
    trained_on: tuple[str, ...]
    training_data: str
    goal_visible: bool | None
    checkpoint: str
    context: str
    iterations: int
    wall_seconds: float
    method: str = "llmdpd"
    successes: int | None = None
    returns_mean: float | None = None
    returns_std: float | None = None
    normalised_score: float | None = None

    def __post_init__(self) -> None:
        for name in ("task", "protocol", "training_data", "context", "method"):
            _check_type(name, getattr(self, name), (str,), "a text")
        if not self.task:
            raise InputError("a result without a task name", field="task", found="''")
        _check_choice("split", self.split, SPLITS)
        _check_choice("checkpoint", self.checkpoint, CHECKPOINTS)
        _check_count("episodes", self.episodes, 1)
        _check_count("max_steps", self.max_steps, 1)
        _check_count("iterations", self.iterations, 0)
        _check_type("seed", self.seed, (int,), "an integer")
        _check_type("prompts", self.prompts, (PromptUse,), "text and trajectory")
        _check_type("acting", self.acting, (ActingUse,), "how actions were chosen")
        _check_names("trained_on", self.trained_on)
        object.__setattr__(self, "trained_on", tuple(self.trained_on))
        _check_type("goal_visible", self.goal_visible, (bool, type(None)), "true, false or null")
        _check_number("wall_seconds", self.wall_seconds)
        self._check_outcome()

    def _check_outcome(self) -> None:
        for name in ("returns_mean", "returns_std", "normalised_score"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        if (self.successes is None) == (self.returns_mean is None):
            both = self.successes is not None
            raise InputError(
                "a result holds either successes or returns",
                field="successes",
                found="successes and returns_mean" if both else "neither",
                expected="one of successes, returns_mean",
            )
        if self.successes is not None:
            _check_count("successes", self.successes, 0)
            if self.successes > self.episodes:
                raise InputError(
                    "more successes than episodes",
                    field="successes",
                    found=self.successes,
                    expected=f"at most episodes = {self.episodes}",
                )

    @property
    def success_rate(self) -> float | None:
        """Successes / episodes, in 0…1; None for a result that holds returns."""
        return None if self.successes is None else self.successes / self.episodes

    @property
    def ci95(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the success rate, in 0…1; None for a result that holds returns."""
        return None if self.successes is None else wilson_interval(self.successes, self.episodes)

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells two records apart: everything that was set, nothing that was measured."""
        setting = (self.protocol, self.prompts, self.trained_on, self.training_data, self.goal_visible, self.context)
        return (self.task, self.split, self.checkpoint, self.seed, self.max_steps, self.acting, self.method, *setting)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field that is set, the success rate and its interval."""
        value: dict[str, Any] = to_plain(self)
        value["success_rate"] = self.success_rate
        value["ci95"] = None if self.ci95 is None else list(self.ci95)
        optional = {"successes", "success_rate", "ci95", "returns_mean", "returns_std", "normalised_score"}
        return {name: entry for name, entry in value.items() if entry is not None or name not in optional}

    @classmethod
    def from_json(cls, value: object) -> TaskResult:
        """The record of a JSON object; `InputError` names a field that is missing, unknown, wrong or contradicts."""
        if not isinstance(value, Mapping):
            raise InputError("a result is not an object", found=_brief(value), expected="a JSON object")
        names = {field.name for field in fields(cls)}
        optional = {"successes", "returns_mean", "returns_std", "normalised_score"}
        for name in sorted(names - optional - {"method"} - set(value)):
            raise InputError("a result lacks a field", field=name, found=", ".join(sorted(map(str, value))))
        for name in sorted(set(value) - names - set(_DERIVED)):
            raise InputError("a result has an unknown field", field=name, expected=", ".join(sorted(names)))
        arguments = {name: value[name] for name in names & set(value)}
        arguments["prompts"] = _prompts_from_json(value["prompts"])
        arguments["acting"] = from_plain(ActingUse, value["acting"], "", "acting.")
        result = cls(**arguments)
        result._check_derived(value)
        return result

    def _check_derived(self, value: Mapping[str, Any]) -> None:
        for name in _DERIVED:
            computed, found = getattr(self, name), value.get(name)
            if found is None and computed is None:
                continue
            if not _close(found, computed):
                raise InputError(
                    "a result contradicts itself",
                    field=name,
                    found=_brief(found),
                    expected=f"{computed}, from {self.successes} successes of {self.episodes} episodes",
                )


def write_results(path: str | Path, records: Sequence[TaskResult]) -> None:
    """Write results.json whole or not at all. Raises `InputError` if two records have the same `identity`."""
    _check_unique(records, path)
    atomic_write_json(path, {"schema": SCHEMA, "records": [record.to_json() for record in records]})


def read_results(path: str | Path) -> list[TaskResult]:
    """Read a results.json. A missing, broken or altered one raises `InputError` naming the file and the field."""
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("records"), list):
        raise InputError("not a results file", path=path, field="records", expected="an object with a list `records`")
    if value.get("schema") != SCHEMA:
        raise InputError(
            "results of another version",
            path=path,
            field="schema",
            found=_brief(value.get("schema")),
            expected=SCHEMA,
            hint="evaluate the run again (python -m llmdpd.evaluate RUN), or read it with the llmdpd that wrote it",
        )
    records = []
    for index, entry in enumerate(value["records"]):
        with located(path, f"records[{index}]"):
            records.append(TaskResult.from_json(entry))
    _check_unique(records, path)
    return records


def _check_unique(records: Iterable[TaskResult], path: str | Path) -> None:
    seen: dict[tuple[object, ...], int] = {}
    for index, record in enumerate(records):
        first = seen.setdefault(record.identity, index)
        if first != index:
            raise InputError(
                "two results for the same task, checkpoint, seed and setting",
                path=path,
                field=f"records[{index}]",
                found=f"{record.task}, {record.checkpoint}, as records[{first}]",
            )


def _prompts_from_json(value: object) -> PromptUse:
    if not isinstance(value, Mapping) or set(value) != {"text", "trajectory"}:
        raise InputError(
            "prompts are not described", field="prompts", found=_brief(value), expected="an object {text, trajectory}"
        )
    return PromptUse(value["text"], value["trajectory"])


def _check_type(name: str, value: object, types: tuple[type, ...], expected: str) -> None:
    # A bool is an int in Python; a count of True episodes is a mistake.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise InputError("a result has a field of the wrong kind", field=name, found=_brief(value), expected=expected)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            "a result has an unknown value", field=name, found=_brief(value), expected=" or ".join(choices)
        )


def _check_count(name: str, value: object, least: int) -> None:
    _check_type(name, value, (int,), "an integer")
    if isinstance(value, int) and value < least:
        raise InputError("a result has an impossible count", field=name, found=value, expected=f"at least {least}")


def _check_number(name: str, value: object) -> None:
    _check_type(name, value, (int, float), "a number")
    # One comparison that NaN, both infinities and integers beyond a float fail alike.
    if isinstance(value, (int, float)) and not -1e300 < value < 1e300:
        raise InputError("a result is not finite", field=name, found=value, expected="a finite number")


def _check_names(name: str, value: object) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise InputError(
            "a result has a field of the wrong kind", field=name, found=_brief(value), expected="a list of task names"
        )


def _close(found: object, computed: object) -> bool:
    if isinstance(computed, tuple):
        return isinstance(found, list) and len(found) == 2 and all(map(_close, found, computed))
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not isinstance(computed, float):
        return False
    # Other writers may round to six decimals.
    return math.isclose(found, computed, abs_tol=1e-6)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
