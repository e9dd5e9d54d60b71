"""Latency of acting: observations to actions, numpy to numpy.

    python bench/act.py --json bench/results/act-NAME.json

First the default policy, which looks into its demonstration and samples once; its peers are its own definition in
PyTorch. Then the best of 50 samples by the critics' soft choice, S = 39, A = 4, Z = 256, H = 256, K = 5. One state,
then 16 and 64 at once. The columns: docs/research-log/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import retrieval
import torch
from common import PEERS, Bench, Deadline, Make, add_common_arguments, finish, settings_of, sizes_of, start, threads_for
from counting import Sizes, best_of
from numpy.typing import NDArray
from peers import Acting, Compiler
from timing import Call, HostClock
from workloads import TEXT

SAMPLES = 50


def our_call(
    sizes: Sizes,
    device: torch.device,
    samples: int,
    steps: int,
    observation: NDArray[np.float32],
    precision: Any,
    graph: bool,
) -> Call:
    """`Policy.act` of a policy of random weights under a text and a demonstration; from a CUDA graph or without.

    Raises:
        ImportError: `llmdpd.policy.policy` can't be imported here.
    """
    from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
    from llmdpd.nn.acting import BestOfN
    from llmdpd.nn.context import ContextConfig
    from llmdpd.nn.spaces import Spaces
    from llmdpd.policy.folder import text_key
    from llmdpd.policy.policy import Policy
    from llmdpd.prompts.demonstration import TrajectoryEncoderConfig

    half = sizes.prompt // 2
    encoder = TrajectoryEncoderConfig(layers=1, width=32, inner=32, steps=10)
    context = ContextConfig(text_dim=half, trajectory_dim=sizes.prompt - half, encoder=encoder)
    config = DiffusionNetworkConfig(hidden_dim=sizes.hidden, diffusion_steps=steps, context=context)
    acting = BestOfN(samples=samples, precision=precision)
    network = DiffusionPolicy(Spaces(sizes.state, sizes.action, TEXT), config).to(device)
    critic = network.make_critic(sizes.hidden).to(device)
    task = "a task"
    texts, mode = {text_key(task): torch.randn(TEXT)}, "on" if graph else "off"
    policy = Policy("llmdpd", network, critic, acting, texts=texts, cuda_graph=mode)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    shown = tuple(rng.normal(size=(20, n)).astype(np.float32) for n in (sizes.state, sizes.action))
    policy.prompt(text=task, trajectory=(shown[0], shown[1]))
    return retrieval.captured(lambda: policy.act(observation), policy, graph)


def peer_call(
    sizes: Sizes,
    device: torch.device,
    samples: int,
    steps: int,
    observation: NDArray[np.float32],
    precision: str,
    compiler: Compiler | None,
) -> Call:
    """The peer's action, under a prompt vector that is part of its condition."""
    acting = Acting(sizes, device, steps, samples, compiler, precision == "bf16")
    return lambda: acting.act(observation)


def measure_default(bench: Bench, compiler: Compiler, states: Sequence[int]) -> None:
    """One group a number of states, in fp32: the context has no other precision."""
    quick = bool(bench.settings.get("quick"))
    policy = retrieval.policy(quick, bench.device)
    for count in states:
        shape = (retrieval.STATE,) if count == 1 else (count, retrieval.STATE)
        observation = (0.3 * np.random.default_rng(1).normal(size=shape)).astype(np.float32)
        makers: dict[str, Make] = {
            "eager": partial(retrieval.action_in_torch, policy, observation, None),
            "compile": partial(retrieval.action_in_torch, policy, observation, compiler),
            **ours(partial(retrieval.our_action, policy, observation), bench.device),
        }
        case = {"policy": "default", "B": count, "samples": 1, "K": 5, "precision": "fp32"}
        estimate = (60.0 if not quick else 1.0) + len(makers) * bench.budget.seconds
        flops = retrieval.action_flops(policy, count)
        bench.group(case, flops, makers, clock=HostClock(), prepare=prepared(makers, bench.threads), estimate=estimate)
    retrieval.in_torch(False)


def ours(make: Callable[[bool], Call], device: torch.device) -> dict[str, Make]:
    """Our action; on a GPU also from a CUDA graph, where it is one by default."""
    makers: dict[str, Make] = {"ours": partial(make, False)}
    if device.type == "cuda":
        makers["ours, graph"] = partial(make, True)
    return makers


def prepared(makers: Mapping[str, Make], threads: int) -> dict[str, Call]:
    """Before each turn: the threads, and PyTorch alone for the peers."""
    shared = threads_for(makers, threads)

    def prepare(name: str) -> None:
        shared[name]()
        retrieval.in_torch(name in PEERS)

    return {name: partial(prepare, name) for name in makers}


def measure(bench: Bench, sizes: Sizes, compiler: Compiler, precisions: Sequence[str], states: Sequence[int]) -> None:
    """One group a number of states and precision."""
    device = bench.device
    steps, samples = (2, 3) if bench.settings.get("quick") else (5, SAMPLES)
    critic = Sizes(sizes.state, sizes.action, 0, sizes.hidden)
    for count in states:
        shape = (sizes.state,) if count == 1 else (count, sizes.state)
        observation = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        for precision in precisions:
            words = (sizes, device, samples, steps, observation, precision)
            makers: dict[str, Make] = {
                "eager": partial(peer_call, *words, None),
                "compile": partial(peer_call, *words, compiler),
                **ours(partial(our_call, *words), device),
            }
            case = {"policy": "pooled", "B": count, "samples": samples, "K": steps, "precision": precision}
            estimate = (40.0 if not bench.settings.get("quick") else 1.0) + len(makers) * bench.budget.seconds
            # To the host and back is part of it, so the host's clock is the right one on a GPU too.
            flops = best_of(sizes, critic, count, steps, samples)
            threads = threads_for(makers, bench.threads)
            bench.group(case, flops, makers, clock=HostClock(), prepare=threads, estimate=estimate)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0, or 1 where an implementation failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--states", type=int, nargs="+", default=[1, 16, 64], help="states a call")
    arguments = parser.parse_args(words)
    device, budget = start(arguments)
    compiler = Compiler(device, "eager" if arguments.quick else "inductor")
    bench = Bench("act", device, budget, settings_of(arguments), Deadline(arguments.within))
    states = [1, 2] if arguments.quick else arguments.states
    measure_default(bench, compiler, states)
    measure(bench, sizes_of(arguments), compiler, arguments.precisions, states)
    return finish(bench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
