"""Reading a run folder. results.json must be whole; of every other file the page says what is missing or damaged."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmdpd.errors import InputError
from llmdpd.evaluation.results import TaskResult, read_results
from llmdpd.evaluation.videos import Video, find_videos
from llmdpd.utils.files import each_record, read_json

# Metric name -> points (iteration, value) in order of iteration.
Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Prompt:
    """The prompts that a task was evaluated with: the text, and where it and the demonstration came from."""

    text: str
    text_source: str
    trajectory: str


@dataclass(frozen=True)
class Run:
    """What the report needs of one run folder. `problems` are sentences for the page."""

    folder: Path
    records: tuple[TaskResult, ...]
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    videos: tuple[Video, ...] = ()
    videos_note: str = ""
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name


def read_run(folder: Path, video_budget: int) -> Run:
    """Read a run folder, with at most `video_budget` bytes of videos.

    Raises `InputError` if the folder or its results.json is missing or cannot be used.
    """
    if not folder.is_dir():
        raise InputError("no such run folder", path=folder, expected="a folder written by python -m llmdpd.train")
    if not (folder / "results.json").is_file():
        raise InputError(
            "the run has no results yet", path=folder / "results.json", hint=f"python -m llmdpd.evaluate {folder}"
        )
    problems: list[str] = []
    prompts = _mapping(folder / "prompts.json", problems, "the prompts")
    # Earlier versions wrote them into `films`.
    place = next((folder / name for name in ("videos", "films") if (folder / name).is_dir()), folder / "videos")
    note = place / "README.txt"
    return Run(
        folder=folder.resolve(),
        records=tuple(read_results(folder / "results.json")),
        config=_mapping(folder / "config.json", problems, "the configuration"),
        meta=_mapping(folder / "meta.json", problems, "versions, machine and times"),
        curves=_read_curves(folder / "metrics.jsonl", problems),
        prompts={task: _prompt(value) for task, value in prompts.items()},
        videos=find_videos(place, video_budget, problems),
        videos_note=note.read_text(encoding="utf-8", errors="replace").strip() if note.is_file() else "",
        problems=tuple(problems),
    )


def _mapping(path: Path, problems: list[str], what: str) -> dict[str, Any]:
    """A JSON object, or {} and a sentence why there is none."""
    reason = "is missing"
    if path.is_file():
        try:
            value = read_json(path)
            if isinstance(value, dict):
                return value
            reason = "is not an object"
        except InputError as error:
            reason = f"could not be read ({error.found})"
    problems.append(f"{path.name} {reason}: the page cannot show {what}.")
    return {}


def _read_curves(path: Path, problems: list[str]) -> Curves:
    if not path.is_file():
        problems.append("metrics.jsonl is missing: the page cannot show learning curves.")
        return {}
    # A resumed run writes the iterations after its checkpoint again: the later line counts.
    points: dict[str, dict[int, float]] = {}
    broken: list[str] = []
    for entry in each_record(path, broken.append):
        for name, value in entry.items():
            if _is_finite(value) and name not in ("iteration", "wall_seconds"):
                points.setdefault(name, {})[int(entry["iteration"])] = float(value)
    if broken:
        problems.append(f"metrics.jsonl: {len(broken)} line(s) could not be read and are not in the curves.")
    return {name: sorted(values.items()) for name, values in points.items()}


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < sys.float_info.max  # an integer may be beyond what a float holds


def _prompt(value: object) -> Prompt:
    if not isinstance(value, Mapping):
        return Prompt(str(value), "", "")
    trajectory = value.get("trajectory")
    if isinstance(trajectory, Mapping):
        trajectory = ", ".join(f"{name} {entry}" for name, entry in trajectory.items() if entry is not None)
    return Prompt(str(value.get("text") or ""), str(value.get("text_source") or ""), str(trajectory or ""))
