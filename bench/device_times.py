"""The CUDA kernels by themselves: device time as replays of a CUDA graph, beside the call's time with its host's work.

    python bench/device_times.py --device cuda

`graph`: the operator captured, which packs the weights as well; `call`: an eager call, weights packed before. For
float32 both ways to multiply. The critics' two networks forward and backward: in PyTorch layer by layer (`layers`), and
in a launch each way (`ours`), both as graphs. `triton`: a launch by triton's own launcher, `ours` by the driver.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from common import Bench, Deadline, NotHere, add_common_arguments, finish, settings_of, sizes_of, start
from counting import Sizes, chain_forward
from timing import Call
from torch import Tensor

from llmdpd import kernels
from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_coefficients
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops.mish_mlp import mish_mlp_reference

BATCHES = (1, 256, 65536)
STEPS = 5


def replayed(work: Callable[[], object], device: torch.device) -> Call:
    """The work as a replay of a CUDA graph."""
    if device.type != "cuda":
        raise NotHere("CUDA graphs need a CUDA device")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    return lambda: (graph.replay(), kept)[0]  # what the graph writes to lives as long as the call


def _chain(sizes: Sizes, batch: int, precision: str, products: str, graph: bool, device: torch.device) -> Call:
    net = NoiseMLP(sizes.state, sizes.action, sizes.prompt, sizes.hidden).to(device).requires_grad_(False)
    state, prompt = torch.randn(batch, sizes.state, device=device), torch.randn(sizes.prompt, device=device)
    plan = sampler_coefficients("ddpm", STEPS)

    def sample() -> Tensor:
        kernels.set_fp32_products(cast("Any", products))
        try:
            return reverse_diffusion(net, state, prompt, plan, precision=cast("Any", precision))
        finally:
            kernels.set_fp32_products("tf32x3")

    return replayed(sample, device) if graph else sample


def _critics(sizes: Sizes, batch: int, precision: str, ours: bool, device: torch.device) -> Call:
    critics = DoubleQ(sizes.state, sizes.action, hidden_dim=sizes.hidden).to(device)
    inputs = torch.randn(batch, sizes.state, device=device), torch.randn(batch, sizes.action, device=device)
    parameters, prompt = list(critics.parameters()), torch.randn(sizes.prompt, device=device)

    def layers() -> list[Tensor]:
        found = []
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for network in (critics.q1, critics.q2):
                w1, b1, *trunk = network.parameters()
                found.append(mish_mlp_reference(torch.cat(inputs, 1), w1, b1, trunk).float())
        return found

    def both() -> tuple[Tensor, ...]:
        values = critics(*inputs, prompt, cast("Any", precision)) if ours else layers()
        return torch.autograd.grad(sum(value.square().mean() for value in values), parameters)

    return replayed(both, device)


def _launch(by_triton: bool, device: torch.device) -> Call:
    if device.type != "cuda":
        raise NotHere("kernels are launched on a CUDA device")
    from llmdpd.kernels import report
    from llmdpd.kernels import reverse_diffusion as operation

    chain = report.arguments(1, 64, 4, True)
    real = [
        torch.zeros(part.shape, dtype=part.dtype, device=device) for part in (*chain[:5], *chain.trunk, *chain[6:8])
    ]
    launch = operation.pack(chain._make((*real[:5], real[5:11], *real[11:], *chain[8:]))).launch
    options = launch.options()
    if by_triton:
        grid = launch.kernel[(launch.programs, 1)]
        return lambda: grid(*launch.arguments.values(), **launch.constants, **options)
    return launch.run


def measure(bench: Bench, sizes: Sizes, batches: Sequence[int] = BATCHES) -> None:
    """One group a case."""
    device = bench.device
    for batch in batches:
        for precision, products in (("bf16", ("tf32x3",)), ("fp32", ("tf32x3", "ieee"))):
            makers = {
                f"{'graph' if graph else 'call'}, {how}": partial(_chain, sizes, batch, precision, how, graph, device)
                for how in products
                for graph in (True, False)
            }
            case = {"direction": "forward", "B": batch, "K": STEPS, "precision": precision}
            bench.group(case, chain_forward(sizes, batch, STEPS), makers, estimate=3 * bench.budget.seconds)
    for precision in ("bf16", "fp32"):
        makers = {
            name: partial(_critics, sizes, batches[-2], precision, name == "ours", device)
            for name in ("layers", "ours")
        }
        rows, width, inputs = batches[-2], sizes.hidden, sizes.state + sizes.action
        flops = 2 * 6.0 * rows * width * (inputs + 2 * width + 1)
        bench.group({"direction": "critics", "B": rows, "K": 1, "precision": precision}, flops, makers)
    makers = {"triton": partial(_launch, True, device), "ours": partial(_launch, False, device)}
    bench.group({"direction": "launch", "B": 1, "K": 1, "precision": "bf16"}, 1.0, makers)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0, or 1 where an implementation failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(options)
    arguments = options.parse_args(words)
    device, budget = start(arguments)
    bench = Bench("kernels", device, budget, settings_of(arguments), Deadline(arguments.within))
    measure(bench, sizes_of(arguments), (2, 3) if arguments.quick else BATCHES)
    return finish(bench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
