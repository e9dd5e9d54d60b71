"""results.json: what a run reached on every evaluated task, as typed records that are checked on the way in and out.

One record is one task evaluated with one checkpoint under one setting. What can be computed from a record (success
rate, interval) is written too, for readers in other languages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from llmdpd.errors import InputError, located
from llmdpd.evaluation.intervals import wilson_interval
from llmdpd.tasks.specs import known_behaviours
from llmdpd.utils.bounds import MOST, Bounds, Count, WholeNumber, check_config
from llmdpd.utils.files import atomic_write_json, read_json
from llmdpd.utils.plain import from_plain, to_plain

SCHEMA = 2
SPLITS = ("seen", "unseen")
_DERIVED = ("success_rate", "ci95")
Finite = Annotated[float, Bounds(-MOST)]
Checkpoint = Literal["last", "best"]
CHECKPOINTS: tuple[Checkpoint, ...] = ("last", "best")
OptionalFinite = Annotated[float | None, Bounds(-MOST)]
_OFFLINE = {"action_error", "action_errors", "diffusion_loss"}
_OPTIONAL = {"successes", "success_rate", "ci95", "returns_mean", "returns_std", "normalised_score", *_OFFLINE}
_LEFT_OUT = {"started_from", *_OPTIONAL}
"""Fields that are not written where they say nothing."""
_MEASURED = {"episodes", "iterations", "wall_seconds", *_OPTIONAL}
# How earlier versions called a field of `acting`, and what they had beside it.
_RENAMED, _VIEWS = {"replan": "action_horizon"}, "views"
_SWAPPED = re.compile(r"swapped \([^)]*'s\): ")
_OTHER_TEXT = re.compile(r"other text \([^)]*'s\): ")


@dataclass(frozen=True)
class PromptUse:
    """Which prompts the policy was given: False = none, True = the task's own, or a text saying where it came from."""

    text: bool | str
    trajectory: bool | str

    def check(self) -> None:
        for name, value in vars(self).items():
            if value == "":
                raise InputError(
                    "a result has an impossible value", field=name, found="''", expected="where it is from"
                )

    @property
    def kind(self) -> str:
        """What is special about the prompts, in the words that `llmdpd.evaluate` records of where they come from.

        "own" where nothing is, else what applies of "swapped", "other text", "text alone", "demonstration alone",
        "no prompts" and the demonstrator's behaviour, joined by ", ".
        """
        words = [word if isinstance(word, str) else "" for word in (self.text, self.trajectory)]
        found = ["swapped"] if any(_SWAPPED.match(word) for word in words) else []
        if _OTHER_TEXT.match(words[0]):
            found.append("other text")
        if not (self.text and self.trajectory):
            alone = "text alone" if self.text else "demonstration alone"
            found.append(alone if self.text or self.trajectory else "no prompts")
        behaviour = _SWAPPED.sub("", words[1]).partition(": ")[0]
        if behaviour in known_behaviours():
            found.append(behaviour)
        return ", ".join(found) or "own"


@dataclass(frozen=True, kw_only=True)
class ActingUse:
    """How actions were sampled and chosen: fields of `llmdpd.nn.acting.ActingConfig`, defaults made plain."""

    samples: Count
    selection: str
    temperature: Finite
    noise_scale: Finite
    sampler: str
    steps: Count
    precision: str = "fp32"  # of records from before it could be chosen
    action_horizon: Count = 1  # of records from before there were chunks
    contradicted_text: str = "keep"  # of records from before it could be dropped
    track_after: Finite = 0.0  # of records from before there was a tracker to hand over to

    def __str__(self) -> str:
        chosen = f"{self.selection} choice (temperature {self.temperature:g}) of {self.samples}"
        sampled = "1 sample" if self.samples == 1 else chosen if self.selection == "soft" else f"best of {self.samples}"
        precision = "" if self.precision == "fp32" else f", {self.precision}"
        horizon = "" if self.action_horizon == 1 else f", action horizon {self.action_horizon}"
        dropped = "" if self.contradicted_text == "keep" else ", contradicted texts dropped"
        tracked = ", handing over to the tracker where it stands still or"
        tracked = f"{tracked} after {self.track_after:g} demonstrations" if self.track_after else ""
        walk = f"{self.sampler} in {self.steps} steps, noise scale {self.noise_scale:g}"
        return f"{sampled}, {walk}{precision}{horizon}{dropped}{tracked}"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One evaluated task: a success count, and of whole episodes, or where there is no success, returns with a
    normalised score where the suite has one; or, where nothing was rolled out, how near actions came to recorded ones.

    task          the environment's name, as in "sweep-into-v3"
    split         "seen" if the task's data was trained on, else "unseen"
    protocol      "paper", "ml45", "d4rl" or another name for what was trained on what
    episodes      evaluated episodes, >= 1; recorded ones, held out of training, where nothing was rolled out
    seed          the run's seed (training); the evaluation's seeds are fixed and apart from it
    max_steps     steps after which an episode ended without success; of recorded episodes, those of the longest
    prompts       which prompts the policy was given
    acting        how actions were sampled and chosen
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
    normalised_score            100 (R - R_min) / (R_max - R_min), by D4RL's or JAT's returns
    tracked, tracked_successes  episodes that the policy had handed over to the tracker, and those that then succeeded
    started_from  the trained policy whose weights its training started from, and their SHA-256; "": from random ones
    action_error, action_errors, diffusion_loss   see `llmdpd.evaluation.offline.OfflineScore`

    Raises `InputError` naming the field, what was found and what was expected.
    """

    task: str
    split: Literal["seen", "unseen"]
    protocol: str
    episodes: Count
    max_steps: Count
    seed: int
    prompts: PromptUse
    acting: ActingUse
    trained_on: tuple[str, ...]
    training_data: str
    goal_visible: bool | None
    checkpoint: Checkpoint
    context: str
    iterations: WholeNumber
    wall_seconds: Finite
    method: str = "llmdpd"
    successes: Annotated[int | None, Bounds(0)] = None
    returns_mean: OptionalFinite = None
    returns_std: OptionalFinite = None
    normalised_score: OptionalFinite = None
    action_error: Annotated[float | None, Bounds(0)] = None
    action_errors: tuple[float, ...] = ()
    diffusion_loss: Annotated[float | None, Bounds(0)] = None
    started_from: str = ""
    tracked: WholeNumber = 0
    tracked_successes: WholeNumber = 0

    def __post_init__(self) -> None:
        check_config(self)

    def check(self) -> None:
        if not self.task:
            raise InputError("a result has an impossible value", field="task", found="''", expected="a task's name")
        measured = [n for n in ("successes", "returns_mean", "action_error") if getattr(self, n) is not None]
        if len(measured) != 1 and measured != ["successes", "returns_mean"]:
            raise InputError(
                "a result holds successes, returns or both, or the error of actions",
                field="successes",
                found=" and ".join(measured) or "none of them",
                expected="successes, returns_mean or both, or action_error",
            )
        if self.successes is not None and self.successes > self.episodes:
            expected = f"at most episodes = {self.episodes}"
            raise InputError("more successes than episodes", field="successes", found=self.successes, expected=expected)

    @property
    def rolled_out(self) -> bool:
        """Whether it comes from episodes in an environment, not from recorded ones."""
        return self.action_error is None

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
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in _MEASURED)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field that is set, the success rate and its interval."""
        value: dict[str, Any] = to_plain(self)
        value["success_rate"] = self.success_rate
        value["ci95"] = None if self.ci95 is None else list(self.ci95)
        return {name: entry for name, entry in value.items() if entry not in (None, [], "") or name not in _LEFT_OUT}

    @classmethod
    def from_json(cls, value: object) -> TaskResult:
        """The record of a JSON object, of this or an earlier version.

        Raises:
            InputError: names a field that is missing, unknown or wrong, or that says another rate than the counts.
        """
        derived: dict[str, Any] = {}
        if isinstance(value, Mapping):
            derived = {name: value.get(name) for name in _DERIVED}
            value = {name: entry for name, entry in value.items() if name not in _DERIVED}
            if isinstance(context := value.get("context"), str):
                value["context"] = re.sub("^control-", "non-learned-", context)
            if isinstance(acting := value.get("acting"), Mapping):
                value["acting"] = {_RENAMED.get(name, name): entry for name, entry in acting.items() if name != _VIEWS}
                if acting.get(_VIEWS, 1) != 1:  # such a record is not one of a policy that acts without
                    value["context"] = f"{value.get('context')}, {acting[_VIEWS]} {_VIEWS}"
        record = from_plain(cls, value, "")
        for name, found in derived.items():
            expected = getattr(record, name)
            if not _agree(found, expected):
                raise InputError(
                    "the figure does not follow from the counts", field=name, found=found, expected=expected
                )
        return record


def write_results(path: str | Path, records: Sequence[TaskResult]) -> None:
    """Write results.json whole or not at all. Raises `InputError` if two records have the same `identity`."""
    _check_unique(records, path)
    atomic_write_json(path, {"schema": SCHEMA, "records": [record.to_json() for record in records]})


def read_results(path: str | Path) -> list[TaskResult]:
    """Read a results.json. A missing, broken or altered one raises `InputError` naming the file and the field."""
    value = read_json(path, finite=False)
    if not isinstance(value, dict) or not isinstance(value.get("records"), list):
        raise InputError("not a results file", path=path, field="records", expected="an object with a list `records`")
    if value.get("schema") != SCHEMA:
        found = repr(value.get("schema"))
        hint = "evaluate the run again (python -m llmdpd.evaluate RUN), or read it with the llmdpd that wrote it"
        raise InputError(
            "results of another version", path=path, field="schema", found=found, expected=SCHEMA, hint=hint
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


def _agree(found: Any, computed: float | tuple[float, float] | None) -> bool:
    if isinstance(computed, tuple):
        return isinstance(found, list) and len(found) == 2 and all(map(_agree, found, computed))
    if computed is None or isinstance(found, bool) or not isinstance(found, (int, float)):
        return found is computed
    return math.isclose(found, computed, abs_tol=1e-6)  # other writers may round to six decimals
