"""From runs to what the page shows: runs that differ by seed alone are one arm, with a cell per task and checkpoint."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmdpd.evaluation.results import CHECKPOINTS, SPLITS, TaskResult
from llmdpd.reporting.run import Run

# Settings that say where a run was written, which draw of luck it had, how often it wrote and how fast it could be:
# not what was done.
_NOT_COMPARED = {
    *("seed", "run", "run_dir", "out", "output", "resume", "name", "root"),
    *("threads", "workers", "log_every", "checkpoint_every", "films"),
}


# Names with values, hashable; a group of runs is known by its configuration, its setting and a number for copies.
_Named = tuple[tuple[str, str], ...]
_Groups = dict[tuple[_Named, _Named, int], list[tuple[Run, tuple[TaskResult, ...]]]]


@dataclass(frozen=True)
class Cell:
    """Success in percent of one task (or the mean over tasks) for one arm and checkpoint.

    One seed: `low`, `high` are the 95 % Wilson interval (None for a mean over tasks). Several: mean -/+ one sample
    standard deviation over seeds, within 0…100.
    """

    mean: float
    low: float | None
    high: float | None
    std: float | None
    by_seed: tuple[float, ...]
    successes: int
    episodes: int

    @property
    def text(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"

    @property
    def interval(self) -> str:
        return "" if self.std is not None or self.low is None else f"{self.low:.1f} to {self.high:.1f}"

    @property
    def counts(self) -> str:
        return f"{self.successes}/{self.episodes}"

    @property
    def seeds(self) -> str:
        """Every seed's own figure, where there are several: a spread over three says less than the three."""
        return "" if self.std is None else ", ".join(f"{value:.1f}" for value in self.by_seed)


@dataclass(frozen=True)
class Arm:
    """Records of runs that differ by nothing but the seed, under one evaluation setting."""

    label: str
    members: tuple[tuple[Run, tuple[TaskResult, ...]], ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for run, _ in self.members)

    @property
    def records(self) -> tuple[TaskResult, ...]:
        return tuple(record for _, records in self.members for record in records)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        found = {record.checkpoint for record in self.records}
        return tuple(name for name in CHECKPOINTS if name in found)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({record.seed for record in self.records}))

    def select(
        self, task: str | None = None, split: str | None = None, checkpoint: str | None = None
    ) -> list[TaskResult]:
        """The arm's success records with this task, split and checkpoint (None: any)."""
        return [
            record
            for record in self.records
            if record.successes is not None
            and task in (None, record.task)
            and split in (None, record.split)
            and checkpoint in (None, record.checkpoint)
        ]

    def cell(self, task: str, split: str, checkpoint: str) -> Cell | None:
        """The task's cell, or None where it was not evaluated."""
        records = self.select(task, split, checkpoint)
        return _cell([_percent(record) for record in records], records) if records else None

    def mean_cell(self, split: str, checkpoint: str) -> Cell | None:
        """The mean over the tasks of a split, seed by seed; None where none was evaluated."""
        records = self.select(None, split, checkpoint)
        if not records:
            return None
        chosen = set(map(id, records))
        by_seed: dict[tuple[int, int], list[float]] = {}
        for index, (_, own) in enumerate(self.members):
            for record in own:
                if id(record) in chosen:
                    by_seed.setdefault((index, record.seed), []).append(_percent(record))
        return _cell([statistics.fmean(values) for values in by_seed.values()], records, one_task=False)


def _percent(record: TaskResult) -> float:
    rate = record.success_rate
    assert rate is not None  # only success records come here
    return 100 * rate


def _cell(values: Sequence[float], records: Sequence[TaskResult], one_task: bool = True) -> Cell:
    mean = statistics.fmean(values)
    low = high = std = None
    if len(values) > 1:
        std = statistics.stdev(values)
        low, high = max(0.0, mean - std), min(100.0, mean + std)
    elif one_task and records[0].ci95 is not None:
        low, high = (100 * bound for bound in records[0].ci95)
    successes = sum(record.successes or 0 for record in records)
    return Cell(mean, low, high, std, tuple(values), successes, sum(record.episodes for record in records))


def tasks_by_split(arms: Iterable[Arm]) -> dict[str, list[str]]:
    """Task names with success records: split -> tasks, unseen first, in order of appearance."""
    tasks: dict[str, list[str]] = {split: [] for split in reversed(SPLITS)}
    for arm in arms:
        for record in arm.select():
            if record.task not in tasks[record.split]:
                tasks[record.split].append(record.task)
    return {split: names for split, names in tasks.items() if names}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level with dotted names; lists and scalars stay as they are."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat.update(flatten(entry, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def compared_config(run: Run) -> dict[str, str]:
    """The settings by which runs are told apart, as texts in which the run's own folder reads RUN."""
    return {
        name: _without_folder(str(value), run)
        for name, value in flatten(run.config).items()
        if name.split(".")[-1] not in _NOT_COMPARED
    }


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: (name, one text per run)."""
    configs = [compared_config(run) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [config.get(name, "not set") for config in configs]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Arms in order of the runs. Runs are one arm if config and setting agree, and each adds seeds of its own."""
    groups: _Groups = {}
    for run in runs:
        for setting, records in _by_setting(run).items():
            _join(groups, tuple(sorted(compared_config(run).items())), setting, (run, tuple(records)))
    labels = _labels([([run for run, _ in members], dict(key[1])) for key, members in groups.items()])
    return [Arm(label, tuple(members)) for label, members in zip(labels, groups.values(), strict=True)]


def _join(groups: _Groups, config: _Named, setting: _Named, member: tuple[Run, tuple[TaskResult, ...]]) -> None:
    """Add a run to its group; one whose seed is there already (a copy, a second evaluation) gets a group of its own."""
    seeds = {record.seed for record in member[1]}
    # Without a configuration nobody knows that seeds are all that differs.
    known = bool(member[0].config)
    for copy in range(len(groups) + 1):
        members = groups.setdefault((config, setting, copy), [])
        taken = {record.seed for _, others in members for record in others}
        if not members or (known and not taken & seeds):
            members.append(member)
            return


def _by_setting(run: Run) -> dict[_Named, list[TaskResult]]:
    settings: dict[_Named, list[TaskResult]] = {}
    for record in run.records:
        settings.setdefault(_setting(record, run), []).append(record)
    return settings


def _setting(record: TaskResult, run: Run) -> _Named:
    named = {
        # In the order in which they are used to tell arms apart, short ones first.
        "protocol": record.protocol,
        "text prompt": on_off(record.prompts.text),
        "trajectory prompt": on_off(record.prompts.trajectory),
        "method": record.method,
        "context": record.context,
        "goal": goal_words(record.goal_visible),
        "steps an episode": f"at most {record.max_steps}",
        "acting": str(record.acting),
        "data": record.training_data,
        "trained on": ", ".join(sorted(record.trained_on)),
    }
    return tuple((name, _without_folder(value, run)) for name, value in named.items())


def _without_folder(text: str, run: Run) -> str:
    """The text with the run's folder, as an absolute or a relative path, replaced by RUN."""
    text = text.replace(str(run.folder), "RUN")
    return re.sub(rf"(?<![^\s,])(?:[^\s,]*/)?{re.escape(run.name)}(?=/)", "RUN", text)


def on_off(value: bool | str) -> str:
    """A prompt's use in words: "off", "on", or where it came from."""
    return value if isinstance(value, str) else ("on" if value else "off")


def goal_words(visible: bool | None) -> str:
    """Whether the goal was in the observation, in words."""
    return "does not apply" if visible is None else ("visible" if visible else "hidden")


def _labels(arms: Sequence[tuple[list[Run], dict[str, str]]]) -> list[str]:
    """What tells the arms apart: names of runs where these differ, and settings that differ within the same runs."""
    several = len({tuple(run.folder for run in runs) for runs, _ in arms}) > 1
    labels = []
    for runs, setting in arms:
        folders = {run.folder for run in runs}
        siblings = [other for others, other in arms if folders & {run.folder for run in others}]
        parts = [_names(runs)] if several else []
        parts += [f"{name} {setting[name]}" for name in _telling(siblings)]
        labels.append("; ".join(parts) or _names(runs))
    return labels


def _telling(settings: Sequence[dict[str, str]]) -> list[str]:
    """Names that tell these settings apart, the first ones that do: what follows from them need not be said."""
    chosen: list[str] = []
    kinds = 1
    for name in settings[0]:
        finer = len({tuple(setting[other] for other in (*chosen, name)) for setting in settings})
        if finer > kinds:
            chosen.append(name)
            kinds = finer
    return chosen


def _names(runs: Sequence[Run]) -> str:
    more = len(runs) - 1
    return runs[0].name + (f" and {more} more seed{'s' if more > 1 else ''}" if more else "")
