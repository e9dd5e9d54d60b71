"""The D4RL presets from end to end: every spelling of their data, normalised scores, no prompts at all, resuming."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from llmdpd.cli.evaluate import main as evaluate_main
from llmdpd.config.presets import PRESETS
from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes, load_dataset, save_minari
from llmdpd.data.d4rl import load_d4rl
from llmdpd.data.task_data import load_tasks
from llmdpd.evaluation.prompts import choose_demonstrations
from llmdpd.evaluation.results import TaskResult, read_results
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.tasks.locomotion import REFERENCE_RETURNS
from llmdpd.training.metrics import read_metrics

Train = Callable[..., int]
WIDTHS = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6)}


def locomotion_data(task: str, episodes: int = 5, seed: int = 0) -> TrajectoryDataset:
    """Random episodes of a task's widths; episode 2 has the highest return."""
    state_dim, action_dim = WIDTHS[task.split("-")[0].lower()]
    draw = np.random.default_rng(seed)
    records = [
        EpisodeRecord(
            observations=draw.normal(size=(31 + number, state_dim)),
            actions=draw.uniform(-1, 1, (30 + number, action_dim)),
            rewards=draw.uniform(0, 1, 30 + number) + 5 * (number == 2),
            task=task,
            terminated=number % 2 == 0,
        )
        for number in range(episodes)
    ]
    return join_episodes(records, source="made by a test")


def write_d4rl(path: Path, data: TrajectoryDataset, *, following: bool = False, **attributes: str) -> Path:
    """A file as D4RL's are: no attributes of ours, timeouts where an episode did not terminate."""
    timeouts = np.zeros(data.num_transitions, bool)
    timeouts[data.offsets[1:] - 1] = True
    with h5py.File(path, "w") as file:
        for name in ("observations", "actions", "rewards", "terminals"):
            file[name] = getattr(data, name)
        file["timeouts"] = timeouts & ~data.terminals
        if following:
            file["next_observations"] = data.next_observations
        file.attrs.update(attributes)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a run of seconds, without its data."""
    fields = {
        "data.root": tmp_path_factory.mktemp("collected"),
        "data.workers": 1,
        "threads": 1,
        "training.iterations": 40,
        "method.batch-size": 8,
        "training.log-every": 10,
        "training.checkpoint-every": 20,
        "training.select-every": 20,
        "training.select-episodes": 1,
        "evaluation.episodes": 2,
        "evaluation.max-steps": 12,
        "method.network.hidden-dim": 16,
        "method.network.context.encoder.width": 16,
        "method.network.context.encoder.steps": 8,
        "method.critic-hidden": 16,
        "method.acting.samples": 3,
    }
    return [*(word for name, value in fields.items() for word in (f"--{name}", str(value))), "--evaluation.no-videos"]


@pytest.fixture(scope="module")
def hopper_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_d4rl(tmp_path_factory.mktemp("d4rl") / "hopper_medium_replay-v2.hdf5", locomotion_data("hopper"))


@pytest.fixture(scope="module")
def hopper_run(tmp_path_factory: pytest.TempPathFactory, train: Train, tiny: list[str], hopper_file: Path) -> Path:
    """A run on a file as D4RL's are. Copy it before changing anything."""
    run = tmp_path_factory.mktemp("runs") / "hopper"
    assert train("--preset", "d4rl-hopper", "--data", hopper_file, "--run-dir", run, *tiny) == 0
    return run


def check_records(records: list[TaskResult], task: str) -> None:
    assert {record.checkpoint for record in records} == {"last", "best"}
    low, high = REFERENCE_RETURNS[task.split("-")[0].lower()]
    for record in records:
        assert record.task == task
        assert (record.protocol, record.split, record.goal_visible) == ("d4rl", "seen", None)
        assert record.successes is None
        assert record.returns_mean is not None
        assert record.returns_std is not None
        assert record.returns_std >= 0
        assert record.normalised_score == pytest.approx(100 * (record.returns_mean - low) / (high - low))


def test_a_preset_on_a_file_of_d4rl(hopper_run: Path, hopper_file: Path) -> None:
    records = read_results(hopper_run / "results.json")
    check_records(records, "Hopper-v4")
    assert records[0].training_data == f"{hopper_file}, 5 episodes; clones the executed actions"
    assert records[0].prompts.text == "built in"
    prompts = json.loads((hopper_run / "prompts.json").read_text())
    assert "hop" in prompts["Hopper-v4"]["text"]
    assert prompts["Hopper-v4"]["trajectory"]["source"] == str(hopper_file)
    example = load_dataset(hopper_run / "prompt_data")
    best = locomotion_data("hopper").episode(2)
    # Without next_observations the last step before a time limit is not kept.
    np.testing.assert_array_equal(example.episode(0).actions, best.actions[: len(example.episode(0))])


def test_best_is_chosen_by_the_normalised_score(hopper_run: Path) -> None:
    found = [r for r in read_metrics(hopper_run / "metrics.jsonl") if "eval/seen_score" in r]
    assert [r["iteration"] for r in found] == [20, 40]
    assert all(r["eval/seen_score"] == r["eval/Hopper-v4_score"] for r in found)
    best = max(found, key=lambda r: (r["eval/seen_score"], r["iteration"]))
    chosen = next(r for r in read_results(hopper_run / "results.json") if r.checkpoint == "best")
    assert chosen.iterations == best["iteration"]


def test_the_report_shows_the_normalised_score(hopper_run: Path) -> None:
    page = (hopper_run / "report.html").read_text()
    for record in read_results(hopper_run / "results.json"):
        assert f"{record.normalised_score:.1f}" in page
        assert f"{record.returns_mean:.1f} ± {record.returns_std:.1f}" in page
    assert "normalised score in training" in page
    assert "105.9 ± 1.5" in page, "the paper's figure for hopper"
    assert "Success by task" not in page


@pytest.mark.parametrize(
    ("task", "spelling"), [("halfcheetah", "minari"), ("walker2d", "folder"), ("hopper", "d4rl"), ("hopper", "config")]
)
def test_every_spelling_of_the_data(
    task: str, spelling: str, train: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, words = locomotion_data(f"{task}-medium-replay-v2"), ["--data"]
    if spelling == "minari":
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
        save_minari(data, tmp_path / "minari", namespace="mujoco", name="medium-v0")
        words.append(f"minari:mujoco/{task}-medium-replay-v2/medium-v0")
    elif spelling == "folder":
        save_minari(data, tmp_path / "folder")
        words.append(str(tmp_path / "folder"))
    else:
        path = write_d4rl(tmp_path / "any.hdf5", data, following=True, environment="Hopper-v4", collector="a SAC run")
        words = ["--data.path", str(path)] if spelling == "config" else ["--data", f"d4rl:{task}-medium-replay-v2"]
        monkeypatch.setattr(
            "llmdpd.data.d4rl.load_d4rl_by_name", lambda name, reading: load_d4rl(path, reading, task=name)
        )
    run, without = tmp_path / "run", [f"--method.network.context.no-{kind}" for kind in ("text", "trajectory")]
    more = [*tiny, "--training.iterations", 10, *(without if spelling == "folder" else ())]
    assert train("--preset", f"d4rl-{task}", *words, "--run-dir", run, *more) == 0
    gymnasium_id = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}[task]
    records = read_results(run / "results.json")
    check_records(records, gymnasium_id)
    assert records[0].training_data.startswith(words[-1])
    # Of a file that says who made it; without prompts it is Diffusion-QL's run.
    for text in (records[0].training_data, html.unescape((run / "report.html").read_text())):
        assert ("(a SAC run; not D4RL's own)" in text) == (spelling == "config")
    assert {bool(record.prompts.text or record.prompts.trajectory) for record in records} == {spelling != "folder"}
    assert (run / "prompt_data").exists() == (spelling != "folder")


@pytest.mark.parametrize(("named", "evaluated"), [(None, "Walker2d-v5"), ("Walker2d-v4", "Walker2d-v4")])
def test_the_version_is_the_datas_unless_it_is_named(
    named: str | None,
    evaluated: str,
    train: Train,
    tiny: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Versions 4 and 5 differ in the friction of a foot and in the reward."""
    data = dataclasses.replace(locomotion_data("walker2d-medium"), environments=("Walker2d-v5",))
    save_minari(data, tmp_path / "data")
    words = [] if named is None else ["--tasks.seen", named]
    short = [*tiny, "--training.iterations", 10]
    run = tmp_path / "run"
    assert train("--preset", "d4rl-walker2d", "--data", tmp_path / "data", *words, "--run-dir", run, *short) == 0
    records = read_results(run / "results.json")
    check_records(records, evaluated)
    assert ", recorded in Walker2d-v5" in records[0].training_data
    assert ("recorded in Walker2d-v5, the evaluation is in Walker2d-v4" in caplog.text) == (named is not None)
    assert json.loads((run / "config.json").read_text())["tasks"]["seen"] == [evaluated]


def test_a_run_on_data_that_sac_collected(
    tmp_path: Path, train: Train, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("stable_baselines3")
    words = ["--preset", "d4rl-hopper", *tiny, "--data.root", tmp_path / "data", "--data.sac-steps", 120]
    assert train(*words, "--run-dir", tmp_path / "one") == 0
    assert "did not reach the medium level" in capsys.readouterr().out
    records = read_results(tmp_path / "one" / "results.json")
    check_records(records, "Hopper-v4")
    (file,) = (tmp_path / "data").rglob("*.hdf5")
    assert f"{file} (stable-baselines3 SAC replay, 120 steps, below medium; not D4RL's own)" in records[0].training_data
    assert load_dataset(file).num_transitions == 120
    # What is collected draws from generators of its own: a run that finds the data is the run that made them.
    assert train(*words, "--run-dir", tmp_path / "two") == 0
    again = read_results(tmp_path / "two" / "results.json")
    assert [r.returns_mean for r in again] == [r.returns_mean for r in records]


def test_a_resumed_run_ends_as_the_straight_one(
    hopper_run: Path,
    hopper_file: Path,
    tmp_path: Path,
    tiny: list[str],
    contents: Callable[[Path], dict[str, Any]],
    stopped_and_resumed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    stopped_and_resumed(run, ["--preset", "d4rl-hopper", "--data", hopper_file, *tiny], LLMDPD, 29)
    assert contents(run) == contents(hopper_run)
    said = capsys.readouterr().out
    assert "normalised score" in said
    assert "Hopper-v4" in said
    assert "success" not in said


def test_evaluation_with_other_prompt_data(
    hopper_run: Path, tmp_path: Path, cache_home: Path, torch_settings: None
) -> None:
    run = shutil.copytree(hopper_run, tmp_path / "run")
    other = write_d4rl(tmp_path / "other.hdf5", locomotion_data("hopper", seed=1), following=True)
    out = tmp_path / "out.json"
    words = [run, "--prompt-data", other, "--episodes", 1, "--workers", 1, "--threads", 1, "--out", out]
    assert evaluate_main([str(word) for word in words]) == 0
    records = read_results(out)
    check_records(records, "Hopper-v4")
    assert {record.prompts.trajectory for record in records} == {str(other)}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--data", "nowhere.hdf5"], ["nowhere.hdf5", "no such file"]),
        (["--data", "d4rl:hopper-medium-replay-v2"], ["d4rl package cannot be used", "hopper_medium_replay-v2.hdf5"]),
        (["--data", "{walker}"], ["no such task", "walker2d", "Hopper-v4"]),
        (["--data", "{nameless}"], ["does not match Hopper-v4", "17 numbers", "11 numbers"]),
        (["--data", "{broken}"], ["broken.hdf5", "a field is missing", "rewards"]),
        (["--data", "{hopper}", "--evaluation.max-steps", "1001"], ["evaluation.max_steps", "1001", "1000"]),
        (["--data", "{hopper}", "--tasks.seen", "hopper", "walker2d"], ["Hopper-v4", "Walker2d-v4", "same obs"]),
        (["--data", "{hopper}", "--tasks.seen", "reach"], ["evaluation.max_steps", "500"]),
        (["--data", "{hopper}", "--method.augmentation.offset", "0.1"], ["method.augmentation", "Hopper-v4"]),
        (["--data", "{hopper}", "--method.clone", "expert"], ["no expert actions"]),
    ],
)
def test_bad_data_and_settings_are_named(
    options: list[str],
    parts: list[str],
    tmp_path: Path,
    refused: Callable[..., str],
    hopper_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    walker = write_d4rl(tmp_path / "walker2d_medium-v2.hdf5", locomotion_data("walker2d"))
    nameless = write_d4rl(tmp_path / "replay.hdf5", locomotion_data("walker2d"))
    broken = shutil.copy(hopper_file, tmp_path / "broken.hdf5")
    with h5py.File(broken, "a") as file:
        del file["rewards"]
    places = {"walker": walker, "nameless": nameless, "broken": broken, "hopper": hopper_file}
    words = [word.format(**places) for word in options]
    error = refused("--preset", "d4rl-hopper", "--run-dir", tmp_path / "run", *words)
    assert all(part in error for part in parts), error
    assert not (tmp_path / "run").exists()


def test_data_of_a_task_is_found_among_others(tmp_path: Path) -> None:
    for task in ("hopper", "walker2d", "halfcheetah"):
        save_minari(locomotion_data(f"{task}-expert-v2"), tmp_path / "hdf5" / task)
    save_minari(locomotion_data("hopper-medium-v0", seed=1), tmp_path / "more")
    assert load_tasks(tmp_path / "hdf5", ("Hopper-v4",), True).state_dim == 11
    found = load_tasks(tmp_path / "hdf5", ("Walker2d-v4",), True)
    assert found.tasks == ("Walker2d-v4",)
    np.testing.assert_array_equal(found.observations, locomotion_data("walker2d").observations)
    both = load_tasks(tmp_path / "hdf5", ("Walker2d-v4", "HalfCheetah-v4"), True)
    assert [both.episodes_of(task).size for task in both.tasks] == [5, 5]
    assert choose_demonstrations(found, "Walker2d-v4") == [2]


@pytest.mark.parametrize(("task", "clip"), [("hopper", 4.0), ("halfcheetah", 2.0), ("walker2d", 4.0)])
def test_the_presets_are_diffusion_qls_settings(task: str, clip: float) -> None:
    config = PRESETS[f"d4rl-{task}"]
    method = config.method
    assert isinstance(method, LLMDPDConfig)
    assert (method.grad_clip, method.eta, method.lr, method.critic_lr) == (clip, 1.0, 3e-4, 3e-4)
    assert (method.gamma, method.tau, method.reward_scale, method.clone) == (0.99, 0.005, 1.0, "executed")
    assert (method.ema_decay, method.ema_every, method.ema_start) == (0.995, 5, 1000)
    assert (method.network.diffusion_steps, method.network.schedule, method.network.hidden_dim) == (5, "vp", 256)
    assert (method.batch_size, method.acting.samples, method.acting.selection) == (256, 50, "soft")
    assert config.evaluation.max_steps == 1000
