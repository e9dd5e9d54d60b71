"""A training iteration: critics, actor, averages. Ours against Diffusion-QL's, at its size; then the whole of LLMDPD.

    python bench/train_step.py --json bench/results/train-step-NAME.json

`diffusion-ql` is the common ground: no prompt encoder, S = 39, A = 4, H = 256, K = 5, B = 256. `llmdpd` is the paper's
algorithm with its text and trajectory encoders (pooled), which no peer has. `default` is the default preset's, which
clones with the retrieval context, 480 states under 12 prompts; its peer is its own definition in PyTorch.
The columns: docs/research-log/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import retrieval
import torch
from common import (
    Bench,
    Deadline,
    Make,
    NotHere,
    add_common_arguments,
    finish,
    settings_of,
    sizes_of,
    start,
    threads_for,
)
from counting import Sizes
from peers import Compiler, Trainer
from timing import Call
from workloads import Training, diffusion_ql, metaworld

from llmdpd.errors import InputError
from llmdpd.methods.batch import PromptedBatch
from llmdpd.ops.arguments import Precision
from llmdpd.training import cuda_graph
from llmdpd.training.config import CudaGraphMode


def peer_call(sizes: Sizes, batch: PromptedBatch, steps: int, precision: str, compiler: Compiler | None) -> Call:
    """An iteration of the peer on the same batch."""
    trainer = Trainer(
        dataclasses.replace(sizes, prompt=0), batch.observations.device, steps, compiler, precision == "bf16"
    )
    words = (
        batch.observations,
        batch.actions,
        batch.next_observations,
        batch.rewards[:, None],
        1 - batch.terminals[:, None],
    )
    if compiler is not None:
        for first in (True, False):  # each is a program of its own; compile both before anything counts
            trainer.train_step(*words, first=first)
    return lambda: trainer.train_step(*words)


def graphed(training: Training | retrieval.Iteration) -> Call:
    """Our iteration captured in one CUDA graph.

    Raises:
        NotHere: this device can't.
    """
    if training.batch.observations.device.type != "cuda":
        raise NotHere("CUDA graphs need a CUDA device")
    return graph_call(cuda_graph, training)


def graph_call(module: Any, training: Training | retrieval.Iteration) -> Call:
    """The one place that knows how `llmdpd.training.cuda_graph` is called.

    Raises:
        NotHere: the iteration can't be captured.
    """
    device = training.batch.observations.device
    update = module.with_cuda_graph(training.learner, "on", device).update

    def call() -> object:
        metrics = update(training.batch, training.iteration)
        training.iteration += 1
        return metrics

    try:
        for _ in range(5):  # a kind of batch is captured once it has come some times
            call()
    except InputError as error:
        raise NotHere(f"{error.problem}: {error.found}") from None
    return call


def measure(bench: Bench, sizes: Sizes, compiler: Compiler, precisions: Sequence[Precision], quick: bool) -> None:
    """The common ground, then LLMDPD with its encoders; bf16 is autocast for the peers."""
    batch, steps = (4, 2) if quick else (256, 5)
    for precision in precisions:
        probe = diffusion_ql(sizes, bench.device, batch, steps)
        peer = functools.partial(peer_call, sizes, probe.batch, steps, precision)
        makers: dict[str, Make] = {"eager": functools.partial(peer, None), "compile": functools.partial(peer, compiler)}
        makers |= ours(functools.partial(diffusion_ql, sizes, bench.device, batch, steps, precision), bench.device)
        _group(bench, "diffusion-ql", precision, batch, steps, probe, makers)
    for precision in precisions:
        probe = metaworld(sizes, bench.device, quick)
        makers = ours(functools.partial(metaworld, sizes, bench.device, quick, precision), bench.device)
        steps = probe.learner.policy.config.diffusion_steps
        _group(bench, "llmdpd", precision, len(probe.batch.rewards), steps, probe, makers)


def measure_seeds(bench: Bench, sizes: Sizes, precisions: Sequence[Precision], quick: bool, seeds: int = 8) -> None:
    """So many learners at Diffusion-QL's size, batches of 64, at once and one after another; on CUDA from graphs."""
    batch, steps = (4, 2) if quick else (64, 5)
    for precision in precisions:
        make = functools.partial(diffusion_ql, sizes, bench.device, batch, steps, precision)
        probe, mode = make(), cast("CudaGraphMode", "on" if bench.device.type == "cuda" else "off")
        makers: dict[str, Make] = {
            "one after another": functools.partial(_one_after_another, make, seeds, mode),
            "at once": functools.partial(_at_once, make, seeds, mode),
        }
        whole = dataclasses.replace(probe, flops=seeds * probe.flops)
        _group(bench, f"diffusion-ql, {seeds} seeds", precision, batch, steps, whole, makers)


def _one_after_another(make: Callable[[], Training], count: int, mode: CudaGraphMode) -> Call:
    """An iteration of each, in turns."""
    seeds = [make() for _ in range(count)]
    device = seeds[0].batch.observations.device
    updates = [cuda_graph.with_cuda_graph(seed.learner, mode, device).update for seed in seeds]

    def call() -> None:
        for seed, update in zip(seeds, updates, strict=True):
            update(seed.batch, seed.iteration)
            seed.iteration += 1

    return _captured(call)


def _at_once(make: Callable[[], Training], count: int, mode: CudaGraphMode) -> Call:
    """An iteration of all.

    Raises:
        NotHere: they can't be stacked here.
    """
    seeds = [make() for _ in range(count)]
    device = seeds[0].batch.observations.device
    stack = cuda_graph.stacked([cuda_graph.with_cuda_graph(seed.learner, mode, device) for seed in seeds])
    if stack is None:
        raise NotHere("learners are not stacked here")
    generators = [torch.Generator(device).manual_seed(number) for number in range(len(seeds))]

    def call() -> None:
        stack.update([seed.batch for seed in seeds], seeds[0].iteration, generators)
        for seed in seeds:
            seed.iteration += 1

    return _captured(call)


def _captured(call: Call) -> Call:
    """The call, after its kind of batch has come some times."""
    for _ in range(5):
        call()
    return call


def measure_default(bench: Bench, quick: bool) -> None:
    """The default preset's iteration."""
    make = functools.partial(retrieval.Iteration, quick, bench.device)
    probe = make()
    makers: dict[str, Make] = {"eager": lambda: make().update, "ours": lambda: make().update}
    if bench.device.type == "cuda":
        makers |= {name: lambda: graphed(make()) for name in ("eager, graph", "ours, graph")}
    shared = threads_for(makers, bench.threads)

    def prepare(name: str) -> None:
        shared[name]()
        retrieval.in_torch(name.startswith("eager"))

    config = probe.config
    case = {"size": "default", "B": config.batch_size, "K": config.network.diffusion_steps, "precision": "fp32"}
    bench.group(case, probe.flops(), makers, prepare={name: functools.partial(prepare, name) for name in makers})
    retrieval.in_torch(False)


def ours(make: Callable[[], Training], device: torch.device) -> dict[str, Make]:
    """Our iteration, on CUDA also as one graph."""
    makers: dict[str, Make] = {"ours": lambda: make().update}
    if device.type == "cuda":
        makers["ours, graph"] = lambda: graphed(make())
    return makers


def _group(
    bench: Bench, size: str, precision: str, batch: int, steps: int, probe: Training, makers: dict[str, Make]
) -> None:
    case = {"size": size, "B": batch, "K": steps, "precision": precision}
    estimate = 90.0 if "compile" in makers and not bench.settings.get("quick") else 2.0
    estimate += bench.budget.seconds * len(makers)
    bench.group(case, probe.flops, makers, prepare=threads_for(makers, bench.threads), estimate=estimate)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0, or 1 where an implementation failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    arguments = parser.parse_args(words)
    device, budget = start(arguments)
    compiler = Compiler(device, "eager" if arguments.quick else "inductor")
    bench = Bench("train_step", device, budget, settings_of(arguments), Deadline(arguments.within))
    measure_default(bench, arguments.quick)
    measure(bench, sizes_of(arguments), compiler, arguments.precisions, arguments.quick)
    measure_seeds(bench, sizes_of(arguments), arguments.precisions, arguments.quick)
    status = finish(bench, arguments)
    for row in bench.rows:
        if row["seconds"]:
            name = f"{row['case']['size']}, {row['case']['precision']}, {row['backend']}"
            print(f"{name}: {1 / row['seconds']['median']:.0f} iterations a second")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
