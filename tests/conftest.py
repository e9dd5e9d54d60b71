"""Shared fixtures: random numbers, tiny data sets, and the training command on them.

Random numbers are fresh each run; its seed stands in the header, and LLMDPD_TEST_SEED repeats one. A test's own seed
is made of the run's and its name, so that it repeats alone, in any order and on any worker.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes, save_minari
from llmdpd.ops import native
from llmdpd.tasks.user import use_no_file

# A user's tasks, as modules that know nothing of the tests: see `family`.
sys.path.append(str(Path(__file__).parent / "family"))
# Writers of recorded data in every format that is read: see `data_writers`.
sys.path.append(str(Path(__file__).parent / "data" / "files"))

if TYPE_CHECKING:
    from llmdpd.diffusion import NoiseMLP, SamplerCoefficients

MakeMetaworldData = Callable[..., TrajectoryDataset]
SEEN, UNSEEN = ("reach-v3", "push-v3"), ("door-lock-v3",)

# Tests are made of small tensors: more threads spin more than they compute, twenty times over on a busy machine.
torch.set_num_threads(1)

# Set, not only read: worker processes of one run inherit it.
_RUN_SEED = int(os.environ.setdefault("LLMDPD_TEST_SEED", str(secrets.randbits(31))))


def pytest_report_header() -> str:
    return f"LLMDPD_TEST_SEED={_RUN_SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Parallel workers begin with what takes minutes, so that none is left alone with it at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name != "test_interpreter.py")


def pytest_collection_finish() -> None:
    """What is there before the first test stays: collections of garbage need not look through it, 0.2 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Writes a user's tasks into the test's folder: see `tabletop_files.write_family`. Afterwards none are in use."""
    from tabletop_files import write_family

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "demos"))
    path = list(sys.path)
    yield lambda *arguments, **options: write_family(tmp_path, *arguments, **options)
    use_no_file()
    assert str(tmp_path) not in sys.path
    sys.path[:] = path


@pytest.fixture(scope="session")
def seed_of() -> Callable[[str], int]:
    """The seed of what has this name, in this run."""
    return lambda name: zlib.crc32(f"{_RUN_SEED} {name}".encode()) >> 1


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest, seed_of: Callable[[str], int]) -> int:
    """The test's own seed, 31 bits; torch's global generator starts from it, on one thread: commands leave several."""
    torch.set_num_threads(1)
    native.set_threads(None)
    seed = seed_of(request.node.nodeid)
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def rng(fresh_seed: int) -> np.random.Generator:
    """numpy's generator, of the test's own seed."""
    print(f"repeat with LLMDPD_TEST_SEED={_RUN_SEED}")
    return np.random.default_rng(fresh_seed)


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled instruction set in turn, the best one again afterwards."""
    module = native.module()
    if request.param not in module.runnable_isas():
        pytest.skip(f"{request.param} can't run on this CPU")
    module.set_isa(request.param)
    yield request.param
    module.set_isa("")


@pytest.fixture
def make_net(rng: np.random.Generator) -> Callable[..., NoiseMLP]:
    """Makes a noise network (S, A, Z, H, T, dtype) in which every weight and bias is random and none is zero."""
    from llmdpd.diffusion import NoiseMLP

    def make(S: int, A: int, Z: int, H: int = 33, T: int = 8, dtype: torch.dtype = torch.float32) -> NoiseMLP:
        net = NoiseMLP(S, A, Z, H, T)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * 1.3 / np.sqrt(parameter.shape[-1])))
        return net.to(dtype)

    return make


@pytest.fixture
def random_coefficients(rng: np.random.Generator) -> Callable[..., SamplerCoefficients]:
    """Makes sampler coefficients (steps, clip) none of which is zero or one, so that each must be used correctly."""
    from llmdpd.diffusion import sampler_coefficients

    def make(steps: int = 5, clip: float | None = 0.9) -> SamplerCoefficients:
        table = {name: rng.uniform(0.2, 0.8, steps) * rng.choice([-1, 1], steps) for name in "peABCS"}
        table["S"] = np.abs(table["S"])
        start = float(rng.uniform(0.5, 1.5))
        return dataclasses.replace(sampler_coefficients("ddpm", steps=steps), clip=clip, start=start, **table)

    return make


def _metaworld_data(
    tasks: tuple[str, ...] = SEEN,
    episodes: int = 3,
    *,
    seed: int = 0,
    length: int = 30,
    first_seed: int = 0,
    expert: bool = True,
    success: int = 1,
    state_dim: int = 39,
    goal_visible: bool | None = True,
) -> TrajectoryDataset:
    draw = np.random.default_rng(seed)
    records = [
        EpisodeRecord(
            observations=draw.normal(size=(length + number + 1, state_dim)),
            actions=draw.uniform(-1, 1, (length + number, 4)),
            rewards=draw.uniform(0, 1, length + number),
            task=task,
            expert_actions=draw.uniform(-1, 1, (length + number, 4)) if expert else None,
            noise_level=0.1 * number,
            success=success,
            seed=first_seed + number,
        )
        for task in tasks
        for number in range(episodes)
    ]
    return join_episodes(records, goal_visible=goal_visible, source="made by a test")


@pytest.fixture(scope="session")
def metaworld_data() -> MakeMetaworldData:
    """Random trajectories of Meta-World's widths; episode e of a task is e steps longer and e tenths noisier."""
    return _metaworld_data


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Minari data sets `train` (the seen tasks) and `prompts` (all)."""
    folder = tmp_path_factory.mktemp("data")
    save_minari(_metaworld_data(), folder / "train")
    save_minari(_metaworld_data((*SEEN, *UNSEEN), 2, seed=1, first_seed=100), folder / "prompts")
    return folder


@pytest.fixture(scope="session")
def shared_options(data_folder: Path) -> list[str]:
    """Options of llmdpd.train for a run of seconds: 200 iterations, a selection every 50, a checkpoint every 25.

    Those that all runs of an experiment can share; `tiny_options` has the rest.
    """
    context = {
        "text-dim": 8,
        "trajectory-dim": 8,
        "text-hidden": 16,
        "encoder.layers": 1,
        "encoder.width": 16,
        "encoder.inner": 32,
        "encoder.steps": 8,
        "retrieval.width": 16,
    }
    fields = {
        "data.path": data_folder / "train",
        "data.demonstrations": data_folder / "prompts",
        "training.iterations": 200,
        "training.log-every": 10,
        "training.checkpoint-every": 25,
        "training.select-every": 50,
        "training.select-episodes": 1,
        "evaluation.max-steps": 15,
        "method.batch-size": 16,
        "method.prompts-per-batch": 2,
        "method.network.hidden-dim": 16,
        **{f"method.network.context.{name}": value for name, value in context.items()},
        "method.eta": 0.05,
        "method.critic-hidden": 16,
        "method.ema-start": 20,
    }
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    options += ["--tasks.seen", *(task.removesuffix("-v3") for task in SEEN)]
    return [*options, "--tasks.unseen", *(task.removesuffix("-v3") for task in UNSEEN)]


@pytest.fixture(scope="session")
def tiny_options(data_folder: Path, shared_options: list[str]) -> list[str]:
    """`shared_options`, and those that an experiment would decide: one thread, two episodes, no videos."""
    fields = {"data.root": data_folder / "collected", "data.workers": 1, "threads": 1, "evaluation.episodes": 2}
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return [*options, *shared_options, "--evaluation.no-videos"]


def _result(**changes: Any) -> Any:
    """A success record of Meta-World, with the fields in `changes` put in."""
    from llmdpd.evaluation.results import ActingUse, PromptUse, TaskResult

    values: dict[str, Any] = {
        "task": "sweep-into-v3",
        "split": "seen",
        "protocol": "paper",
        "episodes": 25,
        "seed": 0,
        "max_steps": 500,
        "prompts": PromptUse(text=True, trajectory=True),
        "acting": ActingUse(samples=1, selection="soft", temperature=1.0, noise_scale=1.0, sampler="ddpm", steps=5),
        "trained_on": ("sweep-into-v3", "coffee-push-v3", "disassemble-v3"),
        "training_data": "scripted experts, noise mix, 100 episodes a task",
        "goal_visible": True,
        "checkpoint": "last",
        "context": "pooled",
        "iterations": 30_000,
        "wall_seconds": 12.5,
        "successes": 20,
    }
    return TaskResult(**(values | changes))


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Any]:
    """Makes `TaskResult`s: keywords are the fields in which one differs from a success record of Meta-World."""
    return _result


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, seed_of: Callable[[str], int]) -> tuple[Path, Path]:
    """The folder of a GPT-2 of two layers of 16, and the text that it learned to predict, for a second."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("language")
    words = ["the", "puck", "goes", "to", "a", "goal", "and", "stays", "there", "door", "opens", "again"]
    draw = np.random.default_rng(seed_of("tiny_gpt2"))
    lines = [str(draw.choice(["the puck goes to a goal and stays there", "the door opens again"])) for _ in range(300)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("tiny_gpt2"))
        sizes = {"vocab_size": len(vocabulary), "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, initializer_range=0.3))
        tokens = torch.tensor([vocabulary[word] for word in " ".join(lines).split()])
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(80):
            blocks = tokens[torch.randint(len(tokens) - 24, (16, 1)) + torch.arange(24)]
            optimizer.zero_grad()
            model(blocks, labels=blocks).loss.backward()
            optimizer.step()
    model.save_pretrained(folder / "gpt2")
    fast.save_pretrained(folder / "gpt2")
    return folder / "gpt2", folder / "corpus.txt"


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """XDG_CACHE_HOME of this session: text embeddings are computed once and shared."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("COLUMNS", "80")
        yield folder


@pytest.fixture(scope="session")
def kept_workers() -> Iterator[None]:
    """Workers of commands in this process outlive their pool and serve the next one: a start takes a second or more.

    Not those that have calls pending, that know a task file, or that have served often: their environments are many.
    """
    from llmdpd.evaluation import scoring
    from llmdpd.runs import pipeline
    from llmdpd.tasks.simulation.processes import Worker
    from llmdpd.tasks.simulation.rollout import EnvPool
    from llmdpd.tasks.user import file_in_use

    idle: dict[tuple[Any, ...], list[Worker]] = {}
    served: Counter[int] = Counter()

    class KeptPool(EnvPool):
        def kind(self) -> tuple[Any, ...]:
            return (self._arguments, self._count, tuple(sys.path), file_in_use() is None)

        def run(self, *arguments: Any, **options: Any) -> Any:
            self._workers = self._workers or idle.pop(self.kind(), [])
            return super().run(*arguments, **options)

        def close(self) -> None:
            served.update(self.pids)
            whole = all(not w.pending and w._process.poll() is None and served[w.pid] < 12 for w in self._workers)
            if self._workers and whole and file_in_use() is None and self.kind() not in idle:
                idle[self.kind()], self._workers = self._workers, []
            super().close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "EnvPool", KeptPool)
        patch.setattr(scoring, "EnvPool", KeptPool)
        yield
    for worker in (worker for workers in idle.values() for worker in workers):
        worker.stop()


@pytest.fixture(scope="session")
def torch_settings(kept_workers: None) -> Iterator[None]:
    """Put back what the training command sets for its whole process."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    native.set_threads(None)


@pytest.fixture(scope="session")
def train(cache_home: Path, torch_settings: None) -> Callable[..., int]:
    """`llmdpd.cli.train.main` on a list of words, in this process."""
    from llmdpd.cli.train import main

    return lambda *words: main([str(word) for word in words])


@pytest.fixture
def refused(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the training command, which must refuse its words with one message; returns what it wrote to stderr."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert train(*words) == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1
        assert "Traceback" not in error
        return error

    return run


@pytest.fixture
def started(cache_home: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command of llmdpd, as ("train", "--run-dir", …), in a process of its own, in `tmp_path`."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: str, *words: object) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", f"llmdpd.{command}", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(argv, **pipes, text=True, cwd=tmp_path))  # type: ignore[call-overload]
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Waits for a condition; fails after four minutes, or where the process that is to bring it about has ended."""

    def wait(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert process is None or process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "it did not get that far"
            time.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., int], tiny_options: list[str]) -> Path:
    """The folder of a tiny run that was never disturbed. Copy it before changing anything (see `run_copy`)."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train("--run-dir", folder, *tiny_options) == 0
    return folder


@pytest.fixture
def run_copy(straight_run: Path, tmp_path: Path) -> Path:
    """A copy of `straight_run`, for tests that change it."""
    return shutil.copytree(straight_run, tmp_path / "run")


@pytest.fixture
def stopped_and_resumed(train: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs into `run`, with a method of class `kind`, stopped by SIGTERM in iteration `at`, resumed to its end."""

    def go(run: Path, options: list[str], kind: type[Any], at: int) -> None:
        update = kind.update

        def stopped(self: Any, batch: Any, iteration: int) -> dict[str, torch.Tensor]:
            if iteration == at:
                os.kill(os.getpid(), signal.SIGTERM)
            metrics: dict[str, torch.Tensor] = update(self, batch, iteration)
            return metrics

        with monkeypatch.context() as patch:
            patch.setattr(kind, "update", stopped)
            assert train("--run-dir", run, *options) == 143
        # What was kept is the policy of the iteration that the stop came in.
        assert json.loads((run / "policy" / "policy.json").read_text())["metadata"]["iterations"] == at + 1
        assert train("--resume", run) == 0

    return go


def _contents(run: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how it was interrupted: file → content, less times and paths."""
    (checkpoint,) = (run / "checkpoint").iterdir()
    found: dict[str, Any] = {"checkpoint": checkpoint.name, "config": json.loads((run / "config.json").read_text())}
    for folder in (checkpoint, run / "policy", run / "policy_best"):
        for file in sorted(folder.iterdir()):
            name = f"{folder.relative_to(run)}/{file.name}"
            found[name] = json.loads(file.read_text()) if file.name == "state.json" else file.read_bytes()
    for timed in ("elapsed", "sha256_of_this"):  # the checksum is over the time as well
        del found[f"checkpoint/{checkpoint.name}/state.json"][timed]
    found["results"] = [
        {**record, "wall_seconds": None, "prompts": None}
        for record in json.loads((run / "results.json").read_text())["records"]
    ]
    return found


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, Any]]:
    """See `_contents`."""
    return _contents


@pytest.fixture(scope="session")
def in_processes() -> Callable[[int, Callable[[int], int | None]], list[int]]:
    """Calls a function with the number of the process in each of so many, which find each other as torchrun's do.

    Gives their exit codes: what the function returned, 0 for None; 70 after an exception, which is printed. They are
    copies of the test's own process: a start of Python would take seconds each.
    """

    def call(count: int, work: Callable[[int], int | None]) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [os.fork() or _be_process(number, count, port, work) for number in range(count)]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    return call


def _be_process(number: int, count: int, port: int, work: Callable[[int], int | None]) -> int:
    from llmdpd.evaluation import scoring
    from llmdpd.runs import pipeline
    from llmdpd.tasks.simulation.rollout import EnvPool

    code = 70
    vars(pipeline)["EnvPool"] = vars(scoring)["EnvPool"] = EnvPool  # the parent's workers serve the parent
    try:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
        native.set_threads(1)  # the parent's threads are not here
        code = work(number) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
