"""`llmdpd.fit`: a robot's logs in memory, without an environment, become a policy; and so does a task file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import llmdpd
from llmdpd.config.parse import parse_train
from llmdpd.config.presets import PRESETS
from llmdpd.data import EpisodeRecord, Trajectory, TrajectoryDataset, load_dataset, save_shards
from llmdpd.errors import InputError
from llmdpd.evaluation.offline import score_offline
from llmdpd.evaluation.prompts import TaskPrompt
from llmdpd.evaluation.results import read_results
from llmdpd.tasks.specs import find_suite

S, A, STEPS = 20, 7, 12
TEXTS = {"pour": 'Task: pour "water".\nObjective: the cup is full.', "wipe": "Task: wipe the table."}
SIZES = {
    "training.iterations": 250,
    "training.checkpoint-every": 50,
    "training.select-every": 50,
    "method.batch-size": 64,
    "method.prompts-per-batch": 4,
    "method.lr": 3e-3,
    "method.lr-warmup": 0,
    "method.network.hidden-dim": 64,
    "method.network.context.encoder.width": 16,
    "method.network.context.encoder.inner": 32,
    "threads": 1,
}
OPTIONS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def log(rng: np.random.Generator, task: str) -> EpisodeRecord:
    """Seven joints turn, each at a speed of its own: in one task forwards, in the other backwards."""
    observations = rng.normal(3, 2, (STEPS + 1, S))
    speed = np.linspace(5, 80, A) * rng.uniform(0.6, 1, (STEPS, A))
    actions = speed if task == "pour" else -speed
    return EpisodeRecord(observations, actions, np.zeros(STEPS), task)


@pytest.fixture
def logs(rng: np.random.Generator) -> TrajectoryDataset:
    return TrajectoryDataset.from_episodes([log(rng, task) for task in TEXTS for _ in range(12)], texts=TEXTS)


def test_a_robots_log_becomes_a_policy_that_reads_its_prompts(
    logs: TrajectoryDataset, rng: np.random.Generator, tmp_path: Path
) -> None:
    options = ["--evaluation", "offline", *OPTIONS, "--iterations", "600"]  # errors of 0.12 to 0.42 of the other's
    policy = llmdpd.fit(logs, options=options, run_dir=tmp_path / "run")
    new = TrajectoryDataset.from_episodes([log(rng, task) for task in TEXTS for _ in range(4)])
    held = {task: [new.episode(int(e)) for e in new.episodes_of(task)[1:]] for task in TEXTS}
    shown = {task: new.episode(int(new.episodes_of(task)[0])) for task in TEXTS}

    def error(of: dict[str, Trajectory], texts: dict[str, str]) -> float:
        prompts = {task: TaskPrompt(texts[task], "given", (of[task],), "logs") for task in TEXTS}
        return float(np.mean([score.action_error for score in score_offline(policy, prompts, held).values()]))

    swapped = dict(zip(TEXTS, reversed(TEXTS), strict=True))
    own = error(shown, TEXTS)
    other = error({t: shown[o] for t, o in swapped.items()}, {t: TEXTS[o] for t, o in swapped.items()})
    assert own < 0.6 * other, "with another task's prompts it does what that task asks for"
    action = policy.prompt(text=TEXTS["pour"], trajectory=shown["pour"]).act(held["pour"][0].observations[0])
    assert action.shape == (A,)
    assert np.abs(action / np.linspace(5, 80, A)).max() <= 1.05, "in the robot's own numbers"
    kinds = {(record.task, record.prompts.kind) for record in read_results(tmp_path / "run" / "results.json")}
    assert kinds >= {(task, kind) for task in TEXTS for kind in ("own", "swapped")}
    assert not any(record.rolled_out for record in read_results(tmp_path / "run" / "results.json"))


def test_without_a_folder_nothing_is_left_behind(
    logs: TrajectoryDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    plain = TrajectoryDataset.from_episodes([log(np.random.default_rng(n), t) for n, t in enumerate([*TEXTS] * 2)])
    policy = llmdpd.fit(plain, TEXTS, options=[*OPTIONS, "--iterations", "2"])
    assert policy.metadata["iterations"] == 2
    assert policy.metadata["trained_on"] == list(TEXTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({}, "no text of pour, wipe"),
        ({"pour": "Pour."}, "no text of wipe"),
        ({**TEXTS, "stir": "Stir."}, "texts of stir"),
    ],
)
def test_each_task_has_a_text(texts: dict[str, str], found: str, rng: np.random.Generator) -> None:
    plain = TrajectoryDataset.from_episodes([log(rng, task) for task in TEXTS])
    with pytest.raises(InputError, match="text prompt") as error:
        llmdpd.fit(plain, texts)
    assert error.value.found == found


def test_there_is_something_to_learn_from() -> None:
    with pytest.raises(InputError, match="nothing to learn from"):
        llmdpd.fit(tasks=TEXTS)


def test_what_is_known_of_success_is_learned_by(rng: np.random.Generator, tmp_path: Path) -> None:
    """Episodes that failed are neither learned from nor shown, as in `llmdpd train`."""
    records = [log(rng, task) for task in TEXTS for _ in range(4)]
    known = [dataclasses.replace(one, success=n % 2, success_step=3 if n % 2 else -1) for n, one in enumerate(records)]
    logs = TrajectoryDataset.from_episodes(known, texts=TEXTS)
    policy = llmdpd.fit(logs, options=[*OPTIONS, "--iterations", "2"], run_dir=tmp_path / "run")
    assert "failed ones left out" in policy.metadata["training_data"]


def test_options_change_a_given_configuration(logs: TrajectoryDataset) -> None:
    config = parse_train(["--preset", "smoke", *OPTIONS, "--evaluation", "none"])
    config = dataclasses.replace(config, method=dataclasses.replace(PRESETS["tasks-plain"].method))
    assert llmdpd.fit(logs, config=config, options=["--iterations", "3"]).metadata["iterations"] == 3


def test_a_folder_that_is_not_empty_is_left_as_it_is(logs: TrajectoryDataset, tmp_path: Path) -> None:
    (tmp_path / "run-inputs").mkdir()
    (tmp_path / "run-inputs" / "mine").write_text("mine")
    with pytest.raises(InputError, match="folder of its own"):
        llmdpd.fit(logs, run_dir=tmp_path / "run")
    assert [path.name for path in tmp_path.rglob("*")] == ["run-inputs", "mine"]


def test_given_data_are_those_of_a_files_tasks_and_the_file_is_not_in_use_afterwards(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Also where a task's name has a slash, which no file's name can have."""
    names = ("my-robot/pour", "wipe")
    tables = [f"[tasks.{name!r}]\ntext = 'Task: {name}.'\n" for name in names]
    (tmp_path / "tasks.toml").write_text("\n".join(tables))
    data = TrajectoryDataset.from_episodes([log(rng, name) for name in names for _ in range(3)])
    options = [*OPTIONS, "--iterations", "2"]
    policy = llmdpd.fit(data, tmp_path / "tasks.toml", options=options, run_dir=tmp_path / "run")
    assert policy.metadata["trained_on"] == list(names)
    assert find_suite("wipe") is None


def test_data_in_shards_give_the_same_policy(logs: TrajectoryDataset, tmp_path: Path) -> None:
    stored = load_dataset(save_shards([logs], tmp_path / "data"))
    options = [*OPTIONS, "--iterations", "3"]
    run = tmp_path / "run"
    policies = [llmdpd.fit(logs, options=options), llmdpd.fit(stored, options=options, run_dir=run)]
    for own, other in zip(*(policy.network.state_dict().values() for policy in policies), strict=True):
        assert torch.equal(own, other)
    assert (tmp_path / "run-inputs" / "fit" / "shards.json").is_file()
