"""Pushing a run's policy to the Hugging Face hub, with its results, prompts, demonstrations and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdpd.evaluation.results import PromptUse, TaskResult, read_results
from llmdpd.policy.card import UNKNOWN_LICENCE
from llmdpd.policy.hub import Pushed
from llmdpd.policy.policy import Policy
from llmdpd.policy.publish import push_policy, without_places
from llmdpd.runs.folder import RunFolder
from llmdpd.utils.files import read_json


def push_run(folder: Path, target: str, *, licence: str = UNKNOWN_LICENCE, private: bool = True) -> Pushed:
    """Push a run's last policy, with what the run knows of it; the folder that is pushed is RUN/hub.

    The card has the results of the last checkpoint under the tasks' own prompts; `results.json` beside it has all.

    Args:
        folder: the run's.
        target, licence, private: see `Policy.push_to_hub`.

    Raises:
        InputError: no run, no policy or results in it, and as `Policy.push_to_hub`.
    """
    run = RunFolder.open(folder)
    policy, records, prompts = Policy.load(run.policy("last")), read_results(run.results), _prompts(run)
    config = read_json(run.config)
    local = [*_places(config), str(run.path.absolute())]
    texts = {task: entry["text"] for task, entry in prompts.items() if entry.get("text")}
    return push_policy(
        policy,
        target,
        run.path / "hub",
        results=_results_of(policy, records),
        prompts=texts,
        demonstrations=run.prompts if run.prompts.is_dir() else None,
        documents={
            "config.json": without_places(config, local),
            "results.json": without_places(read_json(run.results), local),
            "prompts.json": {
                task: {**without_places(entry, local), "text": entry.get("text")} for task, entry in prompts.items()
            },
        },
        licence=licence,
        private=private,
        local=local,
    )


def _places(config: Mapping[str, Any]) -> list[str]:
    """The places of this machine that a run's configuration names."""
    data = config["data"]
    named = [data.get(name) for name in ("path", "demonstrations", "root")]
    named += [config.get("tasks", {}).get("file"), config.get("init", {}).get("source"), config.get("llm")]
    return [place for place in named if place and Path(place).is_absolute()]


def _results_of(policy: Policy, records: Sequence[TaskResult]) -> list[TaskResult]:
    """The results of these weights under the tasks' own prompts, of the kinds that the policy reads.

    A run that goes on and is stopped keeps the results of fewer iterations until it is evaluated again.
    """
    reads = policy.network.reads
    own = PromptUse(text=reads.text, trajectory=reads.trajectory).kind
    return [
        record
        for record in records
        if record.checkpoint == "last"
        and record.prompts.kind == own
        and record.iterations == policy.metadata["iterations"]
    ]


def _prompts(run: RunFolder) -> Mapping[str, Mapping[str, Any]]:
    """The run's prompts by task; none where an earlier version wrote none."""
    file = run.path / "prompts.json"
    return read_json(file) if file.is_file() else {}
