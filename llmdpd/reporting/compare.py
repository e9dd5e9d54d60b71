"""From runs to what the page compares: runs that differ by their seed alone are one arm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmdpd.evaluation.results import CHECKPOINTS, TaskResult
from llmdpd.reporting.estimate import Estimate, best_is_last, mean_estimate, task_estimates
from llmdpd.reporting.run import Run
from llmdpd.utils.legacy import leaves

# Settings that say where a run was written, its random seed, how often it wrote and how fast it could be: not what was
# done.
_NOT_COMPARED = {
    *("seed", "run", "run_dir", "out", "output", "resume", "root"),
    *("threads", "workers", "log_every", "checkpoint_every", "films", "videos"),
}


_Named = tuple[tuple[str, str], ...]  # names with values, hashable


@dataclass(frozen=True)
class Arm:
    """Records of runs that differ by nothing but the seed, under one evaluation setting."""

    label: str
    records: tuple[TaskResult, ...]

    @property
    def checkpoints(self) -> tuple[str, ...]:
        found = {record.checkpoint for record in self.records}
        return tuple(name for name in CHECKPOINTS if name in found)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({record.seed for record in self.records}))

    @property
    def best_is_last(self) -> bool:
        return best_is_last(self.records)

    def select(self, split: str | None = None, checkpoint: str | None = None) -> list[TaskResult]:
        """The arm's success records with this split and checkpoint (None: any)."""
        return [
            record
            for record in self.records
            if record.successes is not None
            and split in (None, record.split)
            and checkpoint in (None, record.checkpoint)
        ]

    def estimates(self, split: str, checkpoint: str) -> dict[str, Estimate]:
        """Each evaluated task's success."""
        return task_estimates(self.select(split, checkpoint))

    def mean(self, split: str, checkpoint: str) -> Estimate | None:
        """The mean success over the tasks of a split; None where none was evaluated."""
        return mean_estimate(self.select(split, checkpoint))


def flatten(value: Any) -> dict[str, Any]:
    """Nested objects as one level with dotted names; what is no object has the name ""."""
    return dict(leaves(value)) if isinstance(value, dict) else {"": value}


def compared_config(run: Run) -> dict[str, str]:
    """The settings by which runs are told apart, as texts in which the run's own folder reads RUN."""
    return {
        name: _without_folder(str(value), run)
        for name, value in flatten(run.config).items()
        if name != "name" and name.split(".")[-1] not in _NOT_COMPARED
    }


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: (name, one text per run)."""
    configs = [compared_config(run) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [config.get(name, "not set") for config in configs]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Arms in order of the runs. Runs are one arm if config and setting agree, and each adds seeds of its own."""
    groups: dict[tuple[_Named, _Named, int], list[tuple[Run, list[TaskResult]]]] = {}
    for run in runs:
        settings: dict[_Named, list[TaskResult]] = {}
        for record in run.records:
            settings.setdefault(_setting(record, run), []).append(record)
        config = tuple(sorted(compared_config(run).items()))
        for setting, records in settings.items():
            # A run whose seed is there already (a copy, a second evaluation) gets a group of its own, and so does one
            # without a configuration: nobody knows that seeds are all that differs.
            copy, seeds = 0, {record.seed for record in records}
            while members := groups.setdefault((config, setting, copy), []):
                if config and not seeds & {record.seed for _, others in members for record in others}:
                    break
                copy += 1
            members.append((run, records))
    labels = _labels([([run for run, _ in members], dict(key[1])) for key, members in groups.items()])
    joined = [tuple(record for _, records in members for record in records) for members in groups.values()]
    return [Arm(label, records) for label, records in zip(labels, joined, strict=True)]


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
