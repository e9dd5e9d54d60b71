"""The prompts that a run keeps, so that its evaluation can be repeated without the data that they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmdpd.config.presets import PRESETS
from llmdpd.data import TrajectoryDataset, load_dataset
from llmdpd.evaluation.prompts import choose_demonstrations
from llmdpd.prompts import metaworld_prompt
from llmdpd.runs.folder import RunFolder
from llmdpd.runs.prompt_choice import keep_prompts


def test_demonstrations_are_kept_in_the_run(metaworld_data: Callable[..., TrajectoryDataset], tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", PRESETS["smoke"])
    data = metaworld_data(("reach-v3", "push-v3", "sweep-v3"), first_seed=40)
    prompts = keep_prompts(run, data, ("push-v3", "reach-v3"), True)
    kept = load_dataset(run.prompts)
    assert sorted(kept.tasks) == ["push-v3", "reach-v3"]
    assert kept.num_episodes == 2
    described = json.loads((run.path / "prompts.json").read_text())
    for task in kept.tasks:
        shown = prompts[task].demonstration
        original = data.episode(choose_demonstrations(data, task)[0])
        assert shown is not None
        np.testing.assert_array_equal(shown.observations, original.observations)
        np.testing.assert_array_equal(shown.actions, original.actions)
        trajectory = {"source": "made by a test", "seed": 40, "steps": 30}
        text = metaworld_prompt(task).render()
        assert described[task] == {"text": text, "text_source": "built in", "trajectory": trajectory}


def test_a_demonstration_that_shows_two_tasks_is_kept_once(
    metaworld_data: Callable[..., TrajectoryDataset], tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path / "run", PRESETS["smoke"])
    data = metaworld_data(("finish-push", "finish-soccer"), first_seed=40)
    prompts = keep_prompts(run, data, ("wait-push", "finish-push", "wait-soccer"), True)
    kept = load_dataset(run.prompts)
    assert sorted(kept.tasks) == ["finish-push", "finish-soccer"]
    assert kept.num_episodes == 2
    described = json.loads((run.path / "prompts.json").read_text())
    assert list(described) == ["wait-push", "finish-push", "wait-soccer"]
    assert described["wait-push"]["trajectory"] == described["finish-push"]["trajectory"]
    assert described["wait-push"]["text"] != described["finish-push"]["text"]
    for task, shown in (("wait-push", "finish-push"), ("wait-soccer", "finish-soccer")):
        demonstration, original = prompts[task].demonstration, data.episode(choose_demonstrations(data, shown)[0])
        assert demonstration is not None
        np.testing.assert_array_equal(demonstration.observations, original.observations)
