"""From runs to HTML: texts and tables for the template, which holds the design."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from llmdpd.errors import InputError
from llmdpd.evaluation.results import TaskResult
from llmdpd.reporting.compare import Arm, differing_settings, flatten, goal_words, group_arms, on_off
from llmdpd.reporting.estimate import tasks_by_split
from llmdpd.reporting.figures import curve_figure, success_figure
from llmdpd.reporting.paper import TABLE_1, TABLE_2, PaperTable, find_row
from llmdpd.reporting.run import Run, read_run
from llmdpd.utils.extras import extra
from llmdpd.utils.files import atomic_write_text

with extra("report"):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

_FOLDER = Path(__file__).parent
# Videos are the one part of a page that can be large; as text they take a third more.
_VIDEO_BYTES = 6_000_000
_NO_VIDEOS = (
    "This run has no videos: none were asked for, or no off-screen renderer for MuJoCo works. On Linux without a "
    "display install libosmesa6, or libegl1 where a GPU driver brings EGL."
)
_VIDEO_COMMANDS = "Then run: python -m llmdpd.evaluate RUN --videos && python -m llmdpd.report RUN"
_SPLIT_WORDS = {"seen": "seen: trained on", "unseen": "unseen: never trained on"}


def build_report(runs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the page of these run folders and return its path.

    One run: `out`, or report.html in its folder. Several: `out`, or comparison.html in the nearest folder that holds
    them all. Runs that differ by nothing but the seed are averaged. What is missing beside results.json is said in the
    page.

    Raises:
        InputError: no run is given, one is given twice, a folder or its results.json is missing or cannot be used.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise InputError("no run to report on", expected="one or more run folders")
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise InputError("the same run is given twice", path=folders[index])
    read = [read_run(folder, _VIDEO_BYTES // len(folders)) for folder in folders]
    for run, folder in zip(read, folders, strict=True):
        if not run.records and run.config.get("evaluation", {}).get("mode") != "none":
            raise InputError("the run has no results", path=folder / "results.json", field="records", found="[]")
    shared = os.path.commonpath([folder.parent for folder in resolved])
    path = resolved[0] / "report.html" if len(resolved) == 1 else Path(shared) / "comparison.html"
    if out is not None:
        path = Path(out)
    if path.is_dir():
        raise InputError("the page cannot be written", path=path, found="a folder", expected="a file name")
    atomic_write_text(path, render_page(read))
    return path


def render_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML that loads nothing from anywhere."""
    arms = group_arms(runs)
    counted = [arm for arm in arms if arm.select()]
    curves, more_metrics = curve_figure(runs)
    several = len(runs) > 1
    return render_template(
        "report.html.j2",
        title=f"Comparison of {len(runs)} runs" if several else f"Run {runs[0].name}",
        several=several,
        arms=arms,
        counted=counted,
        columns=[(arm, name) for arm in counted for name in arm.checkpoints if arm.select(checkpoint=name)],
        tasks=tasks_by_split(record for arm in counted for record in arm.select()),
        split_words=_SPLIT_WORDS,
        paper=_paper,
        in_paper=_in_paper(TABLE_1, arms),
        returns_in_paper=_in_paper(TABLE_2, arms),
        paper_means=_paper_means,
        success_figure=success_figure(counted),
        spread=any(len(arm.seeds) > 1 for arm in arms),
        handed_over=any(record.tracked for arm in counted for record in arm.select()),
        returns=_returns_table(arms),
        offline=_offline_table(arms),
        metadata=[metadata(arm) for arm in arms],
        curves=curves,
        more_metrics=more_metrics,
        differences=differing_settings(runs) if several else [],
        run_names=[run.name for run in runs],
        runs=[_run_view(run) for run in runs],
    )


def render_template(name: str, **values: Any) -> str:
    """A page of this package by its template's name; it gets the style that all of them share, as `style`."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,  # names of tasks and prompts come from files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((_FOLDER / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(name).render(style=style, **values)


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _in_paper(table: PaperTable, arms: Sequence[Arm]) -> bool:
    """Whether the paper reports any of the tasks."""
    return any(find_row(table, record.task) is not None for arm in arms for record in arm.records)


def _paper(task: str, split: str) -> tuple[str, str]:
    """The paper's two columns for a task; where the paper counts it to the other split, that is said."""
    row = find_row(TABLE_1, task)
    if row is None:
        return "", ""
    other = "" if row.split == split else f" ({row.split} there)"
    return f"{row.llmdpd}{other}", f"{row.baseline}{other}"


def _paper_means(tasks: Sequence[str], split: str) -> tuple[str, str]:
    """Means of the paper's figures, only where it has every one of these tasks in the same split."""
    rows = [find_row(TABLE_1, task) for task in tasks]
    known = [row for row in rows if row is not None and row.split == split]
    if len(known) < len(rows):
        return "", ""
    return f"{fmean(row.llmdpd.mean for row in known):.1f}", f"{fmean(row.baseline.mean for row in known):.1f}"


def _returns_table(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[TaskResult]] = {}
    for arm in arms:
        for record in arm.records:
            if record.returns_mean is not None:
                groups.setdefault((arm.label, record.task, record.checkpoint), []).append(record)
    return [_returns_row(*key, records) for key, records in groups.items()]


def _returns_row(arm: str, task: str, checkpoint: str, records: Sequence[TaskResult]) -> dict[str, Any]:
    paper = find_row(TABLE_2, task)
    return {
        "arm": arm,
        "task": task,
        "checkpoint": checkpoint,
        "episodes": sum(record.episodes for record in records),
        "returns": _over_seeds([record.returns_mean for record in records], records[0].returns_std),
        "score": _over_seeds([record.normalised_score for record in records], None),
        "data": records[0].training_data,
        "paper": ("", "") if paper is None else (str(paper.llmdpd), str(paper.baseline)),
    }


def _offline_table(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Rows of what was judged on recorded episodes: a task, a checkpoint and a kind of prompts each."""
    groups: dict[tuple[str, str, str, str], list[TaskResult]] = {}
    for arm in arms:
        for record in arm.records:
            if not record.rolled_out:
                groups.setdefault((arm.label, record.task, record.checkpoint, record.prompts.kind), []).append(record)
    return [
        {
            **{"arm": arm, "task": task, "split": records[0].split, "checkpoint": checkpoint, "prompts": kind},
            "episodes": sum(record.episodes for record in records),
            "error": f"{100 * fmean(record.action_error or 0.0 for record in records):.2f}",
            "errors": [f"{error:.3g}" for error in np.mean([record.action_errors for record in records], 0)],
            "loss": _over_seeds([record.diffusion_loss for record in records], None, digits=4),
        }
        for (arm, task, checkpoint, kind), records in groups.items()
    ]


def _over_seeds(values: Sequence[float | None], one_std: float | None, digits: int = 1) -> str:
    """Mean ± std over seeds; for one seed its mean and, if given, the std over its episodes."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    std = stdev(numbers) if len(numbers) > 1 else one_std
    return f"{fmean(numbers):.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def metadata(arm: Arm) -> dict[str, str]:
    """What the arm's results were obtained with."""
    first = arm.records[0]
    by_checkpoint = [
        f"{_span([r.iterations for r in arm.records if r.checkpoint == name])} ({name})" for name in arm.checkpoints
    ]
    return {
        "results of": arm.label,
        "protocol": first.protocol,
        "trained on": ", ".join(first.trained_on) or "nothing",
        "training data": first.training_data or "not recorded",
        **({"started from": first.started_from} if first.started_from else {}),
        "goal in the observation": goal_words(first.goal_visible),
        "text prompt": on_off(first.prompts.text),
        "trajectory prompt": on_off(first.prompts.trajectory),
        "method": first.method,
        "context": first.context,
        "iterations": ", ".join(by_checkpoint),
        "episodes a task": _span([record.episodes for record in arm.records]),
        "steps an episode": f"at most {first.max_steps}",
        "acting": str(first.acting),
        "seeds": ", ".join(map(str, arm.seeds)),
    }


def _run_view(run: Run) -> dict[str, Any]:
    tasks = list(dict.fromkeys(record.task for record in run.records))
    videos = {video.task: video for video in run.videos}
    # What was never trained on first: it is what a policy is judged by.
    split = {record.task: record.split for record in run.records}
    order = sorted(dict.fromkeys([*tasks, *videos]), key=lambda task: split.get(task) == "seen")
    command = run.meta.get("command")
    if isinstance(command, dict):
        command = command.get("argv")
    # What is in meta.json beyond the three tables is shown too, rather than lost.
    other = {name: entry for name, entry in run.meta.items() if name not in ("versions", "machine", "times", "command")}
    tables = {name.capitalize(): run.meta.get(name) for name in ("versions", "machine", "times")}
    tables |= {"Also recorded": other} if other else {}
    return {
        "name": run.name,
        "problems": run.problems,
        "videos": [(task, videos[task]) for task in order if task in videos],
        "unrecorded": [task for task in tasks if task not in videos],
        "videos_note": f"{run.videos_note or _NO_VIDEOS} {_VIDEO_COMMANDS}",
        "prompts": run.prompts,
        "unprompted": [task for task in tasks if run.prompts and task not in run.prompts],
        "config": {name: _plain(value) for name, value in flatten(run.config).items()},
        "tables": [
            (title, {name: measure(name, value) for name, value in flatten(entries or {}).items()})
            for title, entries in tables.items()
        ],
        "command": shlex.join(map(str, command)) if isinstance(command, list) else str(command or ""),
    }


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def measure(name: str, value: object) -> str:
    """A value of meta.json; seconds as a time that can be read."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name.endswith("seconds"):
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes:02d} min"
        return f"{minutes} min {seconds:02d} s" if minutes else f"{value:.1f} s" if value else "0 s"
    return _plain(value)
