"""Pushing a run's policy to the Hugging Face hub, with its results, prompts, demonstrations and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdpd.evaluation.results import read_results
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
    data = read_json(run.config)["data"]
    named = [data.get(name) for name in ("path", "demonstrations", "root")]
    local = [place for place in (*named, str(run.path.absolute())) if place and Path(place).is_absolute()]
    texts = {task: entry["text"] for task, entry in prompts.items() if entry.get("text")}
    return push_policy(
        policy,
        target,
        run.path / "hub",
        results=[record for record in records if record.checkpoint == "last" and record.prompts.kind == "own"],
        prompts=texts,
        demonstrations=run.prompts if run.prompts.is_dir() else None,
        documents={
            "config.json": without_places(read_json(run.config), local),
            "results.json": without_places(read_json(run.results), local),
            "prompts.json": {
                task: {**without_places(entry, local), "text": entry.get("text")} for task, entry in prompts.items()
            },
        },
        licence=licence,
        private=private,
        local=local,
    )


def _prompts(run: RunFolder) -> Mapping[str, Mapping[str, Any]]:
    """The run's prompts by task; none where an earlier version wrote none."""
    file = run.path / "prompts.json"
    return read_json(file) if file.is_file() else {}
