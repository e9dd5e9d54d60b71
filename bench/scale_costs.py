"""What this project's own code does for each task, and for each cell of an experiment, at 10 to 100,000 of them.

    python bench/scale_costs.py --json bench/results/scale-costs-NAME.json

No network is trained and no environment stepped: the tasks have two made-up episodes of five steps each, the cells end
at once. Reported are seconds of processor time, and megabytes where there are many; what grows faster than the tasks is
what breaks first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import retrieval
import torch
from machine import Others, describe
from report import format_table, write_report
from scale_data import BATCH, CPU, PROMPTS

from llmdpd.config.schema import TrainConfig
from llmdpd.data import EpisodeRecord, TrajectoryDataset, join_episodes, load_dataset, save_shards
from llmdpd.data.task_data import load_tasks
from llmdpd.data.task_file import use_task_file
from llmdpd.experiments import scheduler
from llmdpd.experiments.cell import Cell, Share, Step
from llmdpd.experiments.executors.base import Executor, Resources, Running
from llmdpd.policy.folder import text_key
from llmdpd.policy.policy import Policy
from llmdpd.prompts import LLMEncoder
from llmdpd.tasks.specs import common_spec
from llmdpd.training.batches import BatchSampler
from llmdpd.training.stopping import StopSignals
from llmdpd.utils.progress import console

SIZES = (10, 1_000, 100_000)
EPISODES, STEPS, BATCHES, AT_ONCE = 2, 5, 30, 64
MOST_IN_A_FILE = 5_000


def made_up(tasks: int) -> TrajectoryDataset:
    """Two episodes of each task, of Meta-World's sizes."""
    rng = np.random.default_rng(0)
    count = tasks * EPISODES
    observations = rng.random((count, STEPS + 1, retrieval.STATE), np.float32)
    actions = rng.random((count, STEPS, retrieval.ACTION), np.float32)
    names = [f"task-{number}" for number in range(tasks)]
    records = (
        EpisodeRecord(observations[e], actions[e], actions[e, :, 0], names[e // EPISODES], success=1)
        for e in range(count)
    )
    return join_episodes(records, texts={name: f"Move thing {name} to its place." for name in names})


class Costs:
    """Seconds of processor time by what was done, in the order in which it was."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, what: str, work: Callable[[], Any], share: float = 1.0) -> Any:
        """What `work` returns; its time is noted, times `share`."""
        begin = time.process_time()
        result = work()
        self.seconds[what] = (time.process_time() - begin) * share
        return result


def of_data(tasks: int, folder: Path, costs: Costs) -> None:
    """Data in shards, all tasks chosen by name, batches of the default preset."""
    costs.of("write shards", lambda: save_shards([made_up(tasks)], folder / "data"))
    dataset = costs.of("open them", lambda: load_dataset(folder / "data"))
    dataset = costs.of("choose all tasks by name", lambda: dataset.select_tasks(dataset.tasks))
    vectors = torch.randn(tasks, retrieval.TEXT)

    def sampler() -> BatchSampler:
        context, self_prompted = retrieval.METHOD.network.context, retrieval.METHOD.self_prompted
        sizes = BATCH, PROMPTS, 0, CPU
        return BatchSampler(
            dataset, vectors, context.encoder, *sizes, layout=retrieval.LAYOUT, self_prompted=self_prompted
        )

    made = costs.of("make the sampler", sampler)
    costs.of("a batch", lambda: [made.next() for _ in range(BATCHES)], 1 / BATCHES)
    texts = {text_key(text): vector for text, vector in zip(dataset.texts, vectors, strict=True)}
    network = retrieval.network_of(retrieval.METHOD, CPU)
    policy = Policy("llmdpd", network, None, retrieval.METHOD.acting, llm="minilm", texts=texts, metadata={})
    costs.of("save a policy with all texts", lambda: policy.save(folder / "policy"))
    costs.of("load it", lambda: Policy.load(folder / "policy"))


def of_texts(tasks: int, folder: Path, costs: Costs) -> None:
    """The cache of embeddings, which a made-up model names."""
    encoder = LLMEncoder("minilm", cache_dir=folder / "cache")
    vector = np.random.default_rng(0).random((1, retrieval.TEXT), np.float32)
    encoder._embedder = cast(Any, SimpleNamespace(dim=retrieval.TEXT, embed=lambda prompts: vector))
    texts = [f"Move thing {number} to its place." for number in range(tasks)]
    costs.of("keep embeddings in the cache", lambda: encoder.encode(texts))
    costs.of("read them from there", lambda: encoder.encode(texts))


def of_task_file(tasks: int, folder: Path, costs: Costs) -> None:
    """A task file that names the shards: read, its tasks' specs made, their data loaded. It has at most a megabyte."""
    if tasks > MOST_IN_A_FILE:
        return
    place = json.dumps(str(folder / "data"))
    tables = [f'[tasks.task-{n}]\ndata = {place}\ntext = "Move thing task-{n} to its place."\n' for n in range(tasks)]
    (folder / "tasks.toml").write_text("\n".join(tables))
    costs.of("read the task file", lambda: use_task_file(folder / "tasks.toml"))
    names = [f"task-{number}" for number in range(tasks)]
    costs.of("look at each task's data", lambda: common_spec(names))
    costs.of("load all tasks' data", lambda: load_tasks(None, names, True))


class _Short(Cell):
    """A cell whose one step ends at its first look."""

    begun: ClassVar[set[Path]] = set()

    def next_step(self, share: Share) -> Step | None:
        return None if self.folder in self.begun else Step("training", ("cell", self.name))


class _Ended:
    """A step that has ended."""

    def poll(self) -> int:
        return 0

    def is_queued(self) -> bool:
        return False

    def stop(self) -> None: ...

    def wait(self) -> None: ...


class _AtOnce(Executor):
    """Sixty-four workers, each of which is done when it begins."""

    name = "at once"

    def shares(self, cells: int) -> list[Share]:
        return [Share(1, None)] * AT_ONCE

    def start(self, argv: list[str], share: Share, log: Path) -> Running:
        _Short.begun.add(log.parent.parent / argv[-1])
        return _Ended()


def of_queue(cells: int, folder: Path, costs: Costs) -> None:
    """The scheduler alone, with 64 workers."""
    config = TrainConfig()
    queue = [_Short("a", "smoke", (), config, folder / f"cell-{number}", 1, folder) for number in range(cells)]
    with StopSignals() as stop:
        made = scheduler.Scheduler(queue, _AtOnce(Resources()), folder / "logs", stop)
        pause, quiet = scheduler._POLL_SECONDS, console.quiet
        scheduler._POLL_SECONDS, console.quiet = 0, True
        try:
            costs.of("schedule a cell", made.execute, 1 / cells)
        finally:
            scheduler._POLL_SECONDS, console.quiet = pause, quiet


PARTS: dict[str, Callable[[int, Path, Costs], None]] = {
    "data": of_data,
    "task file": of_task_file,
    "queue": of_queue,
    "texts": of_texts,
}


def measured(count: int, names: Sequence[str]) -> dict[str, Any]:
    """The costs of so many tasks and cells, in this process."""
    costs = Costs()
    TrainConfig()  # imports that are no task's
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            PARTS[name](count, Path(temporary), costs)
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return {"seconds": costs.seconds, "megabytes": most}


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of tasks, and of cells")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measured(options.one, options.parts)))
        return 0
    others, found = Others(), dict[str, Any]()
    for size in options.sizes:  # each in a fresh process, for its memory
        command = [sys.executable, __file__, "--one", str(size), "--parts", *options.parts]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[str(size)] = json.loads(done.stdout.splitlines()[-1])
    report = {"benchmark": "scale-costs", "machine": describe(CPU), "others": others.share(), "sizes": found}
    names = list(dict.fromkeys(name for each in found.values() for name in each["seconds"]))
    rows = [[name, *(_words(each["seconds"].get(name)) for each in found.values())] for name in names]
    rows.append(["most memory", *(f"{each['megabytes']:.0f} MB" for each in found.values())])
    print(format_table(["tasks, or cells", *(f"{int(size):,}" for size in found)], rows))
    if options.json:
        write_report(options.json, report)
    return 0


def _words(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.2g} ms"


if __name__ == "__main__":
    raise SystemExit(main())
