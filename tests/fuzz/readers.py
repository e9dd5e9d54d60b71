"""The readers: files as the project or its sources write them, damaged, and read as users have them read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from containers import repair_checkpoint
from judge import Case, Target
from mutations import mutate

from llmdpd.config.stored import read_stored
from llmdpd.data import is_named, load_dataset
from llmdpd.data.replay_log import ReplayLog
from llmdpd.errors import InputError
from llmdpd.evaluation.results import TaskResult, write_results
from llmdpd.methods.lamo.corpus import find_corpus, read_texts
from llmdpd.methods.lamo.language_model import find_language_model
from llmdpd.policy.policy import Policy
from llmdpd.prompts.cache import EmbeddingCache, EmbeddingKey
from llmdpd.reporting.page import build_report
from llmdpd.reporting.run import read_run
from llmdpd.runs.folder import RunFolder
from llmdpd.tasks.user.file import read_task_file
from llmdpd.training.metrics import read_metrics
from llmdpd.utils.checkpoint import load_checkpoint, read_state, save_checkpoint
from llmdpd.utils.files import read_json

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / part) for part in ("data/files", "utils", "csrc")]
from data_writers import FORMATS, random_episodes  # noqa: E402
from test_checkpoint import Toy  # noqa: E402

Random = np.random.Generator
_SHARE_OF_PAGES = 0.02
_TASKS_FILE = """
[suite]
observation = ["observation", "desired_goal"]
success = "is_success"
max_steps = 50
[suite.layout]
points = { cube = [3, 4, 5], hand = [0, 1, 2], goal = [10, 11, 12] }
gripper = [9]
action = { move = [0, 1, 2], gripper = [3] }
up = "z"
unit = 0.01
[tasks.push]
env = "FetchPush-v4"
env_kwargs = { reward_type = "dense" }
data = ["demos/push", "minari:fetch/push-v0"]
text = "Task: push it."
[tasks.pour]
data = "logs/pour"
text_file = "pour.txt"
split = "unseen"
success = { return = 3 }
"""


def of_files(
    write: Callable[[Path], object],
    read: Callable[[Path], object],
    *,
    only: str = "*",
    repair: Callable[[Path, Random], None] | None = None,
) -> Target:
    """A reader as a target.

    Args:
        write: whole files, into an empty folder.
        read: the folder.
        only: pattern of the files' names that are damaged.
        repair: makes good, after the damage, what would otherwise refuse it at once, such as checksums.
    """

    def prepare(folder: Path) -> Case:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari misses an author
            write(folder)
        files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        damaged = [path for path in files if path.match(only)]
        read(folder)

        def case(rng: Random) -> None:
            path = damaged[rng.integers(len(damaged))]
            try:
                path.write_bytes(mutate(files[path], rng))
                if repair is not None:
                    repair(folder, rng)
                read(folder)
            finally:
                for file, content in files.items():
                    if not file.is_file() or file.read_bytes() != content:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(content)

        return case

    return Target(prepare, (InputError,))


def _data(kind: str) -> Target:
    def write(folder: Path) -> None:
        episodes = random_episodes(np.random.default_rng(0), success=[[4], [], [2]])
        FORMATS[kind].write(folder, episodes, "push-v3", "")

    return of_files(write, load_dataset)


def _policy(name: str) -> Target:
    def write(folder: Path) -> None:
        shutil.copytree(TESTS / "policy" / "recorded" / name, folder, dirs_exist_ok=True)
        (folder / "actions.npz").unlink()
        policy = Policy.load(folder)
        shutil.rmtree(folder)
        policy.save(folder)

    return of_files(write, Policy.load, repair=_sums)


def _sums(folder: Path, rng: Random) -> None:
    """Checksums of the tensors as they are now, three times of four."""
    file = folder / "policy.json"
    try:
        description = json.loads(file.read_bytes())
        for name in description["sha256"] if rng.random() < 0.75 else ():
            description["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        file.write_text(json.dumps(description))
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return  # the description itself is what was damaged


def _write_run(folder: Path) -> None:
    """A run's folder as training leaves it, with made-up figures."""
    values = json.loads((TESTS / "fuzz" / "result.json").read_text())
    write_results(folder / "results.json", [TaskResult.from_json(values)])
    shutil.copy(TESTS / "config" / "stored" / "llmdpd.json", folder / "config.json")
    lines = [
        {"iteration": i, "wall_seconds": 0.1 * i, "loss/diffusion": 1 / i, "eval/seen_success": 0.5}
        for i in range(1, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = {values["task"]: {"text": "Task: go.", "text_source": "built in", "trajectory": {"source": "x"}}}
    meta = {
        "versions": {"llmdpd": "0.3", "torch": "2"},
        "machine": {"cpu": "x", "gpu": None},
        "times": {"training_seconds": 3.5, "total_seconds": 4.5},
        "command": {"argv": ["python", "-m", "llmdpd.train"]},
    }
    for name, value in (("prompts", prompts), ("meta", meta)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    videos = folder / "videos"
    videos.mkdir()
    (videos / f"{values['task']}.json").write_text(json.dumps({"success": True, "seed": 3, "checkpoint": "last"}))
    (videos / f"{values['task']}.gif").write_bytes(b"GIF89a" + bytes(40) + b";")


def _resume(folder: Path) -> None:
    """What the training command reads of a run before it goes on."""
    run = RunFolder.open(folder)
    run.use_tasks(run.read_config(), unchanged=True)
    with run.timed("total_seconds"):
        read_metrics(run.path / "metrics.jsonl")


def _report() -> Target:
    """All of the run's files; a page, which takes a second, of a few."""
    target = of_files(_write_run, lambda folder: read_run(folder, 1 << 20))
    pages = of_files(_write_run, lambda folder: build_report([folder], folder.parent / "page.html"))

    def prepare(folder: Path) -> Case:
        (folder / "run").mkdir()
        (folder / "page").mkdir()
        read, show = target.prepare(folder / "run"), pages.prepare(folder / "page")
        return lambda rng: (show if rng.random() < _SHARE_OF_PAGES else read)(rng)

    return Target(prepare, (InputError,))


def _checkpoint() -> Target:
    def write(folder: Path) -> None:
        toy = Toy()
        toy.step(("adam",))
        save_checkpoint(folder, toy, 3, {"elapsed": 1.5})

    def read(folder: Path) -> None:
        (checkpoint,) = folder.iterdir()
        read_state(checkpoint)
        load_checkpoint(checkpoint, Toy())

    return of_files(write, read, repair=repair_checkpoint)


def _steps() -> Target:
    def write(folder: Path) -> None:
        arrays = {"observations": np.ones((5, 3), np.float32), "rewards": np.ones(5, np.float32)}
        ReplayLog(folder).append(arrays, 5)

    return of_files(write, lambda folder: ReplayLog(folder).take_up(5))


def _episodes() -> Target:
    """Episodes that collection keeps until it is done: a damaged one is made again, and is no error."""
    from llmdpd.data.collecting import scripted
    from llmdpd.tasks.demonstrators import ScriptedEpisode

    def write(folder: Path) -> None:
        fields = {field.name: np.ones(5, np.float32) for field in dataclasses.fields(ScriptedEpisode)}
        fields |= {"success": np.array(True), "noise_level": np.array(0.1), "success_step": np.array(3)}
        np.savez(folder / "episode.npz", **fields)

    return of_files(write, lambda folder: scripted._length_of(folder / "episode.npz"))


def _language_model() -> Target:
    def write(folder: Path) -> None:
        sizes = {"vocab_size": 10, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
        (folder / "tokenizer.json").write_text("{}")
        index = {"weight_map": {"a": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        safetensors.torch.save_file({"a": torch.ones(3)}, folder / "a.safetensors")

    return of_files(write, lambda folder: find_language_model(str(folder)), only="*.json")


def _corpus(suffix: str) -> Target:
    def write(folder: Path) -> None:
        texts = ["the puck goes to a goal", "ä door opens"] * 20
        if suffix == "txt":
            (folder / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "corpus.parquet")

    return of_files(write, lambda folder: list(read_texts(find_corpus(str(folder)))))


def _embedding() -> Target:
    """A cached embedding: one that is damaged counts as none, and is no error."""
    key = EmbeddingKey("m", "1", "mean", "", "a text", None, "float32")

    def write(folder: Path) -> None:
        EmbeddingCache(folder).put(key, np.ones(4, np.float32))

    return of_files(write, lambda folder: EmbeddingCache(folder).get(key))


def _tasks(folder: Path) -> None:
    (folder / "tasks.toml").write_text(_TASKS_FILE)
    (folder / "pour.txt").write_text("Task: pour it.")


READERS: dict[str, Target] = {
    **{f"data: {kind}": _data(kind) for kind in FORMATS},
    **{f"policy: {name}": _policy(name) for name in ("llmdpd", "chunk", "dt", "mtdiff")},
    "run: report": _report(),
    "run: resume": of_files(_write_run, _resume, only="*.json*"),
    "run: stored configuration": of_files(
        lambda folder: shutil.copy(TESTS / "config" / "stored" / "dt.json", folder),
        lambda folder: read_stored(read_json(folder / "dt.json"), folder / "dt.json"),
    ),
    "checkpoint": _checkpoint(),
    "recorded steps": _steps(),
    "kept episodes": _episodes(),
    "task file": of_files(_tasks, lambda folder: read_task_file(folder / "tasks.toml", is_named)),
    "language model": _language_model(),
    "corpus: text": _corpus("txt"),
    "corpus: parquet": _corpus("parquet"),
    "cached embedding": _embedding(),
}
