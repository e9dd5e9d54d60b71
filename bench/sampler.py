"""The reverse chain, forward, and forward + backward: this project's backends against Diffusion-QL's loop.

    python bench/sampler.py --json bench/results/sampler-NAME.json --plot sampler.png

By default a choice of cases that takes a few minutes on two cores; `--full` measures every combination of B, K,
precision and direction, and any of `--batches`, `--steps`, `--precisions`, `--directions` the combinations named.
docs/research-log/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from common import Bench, Deadline, NotHere, add_common_arguments, finish, settings_of, sizes_of, start, threads_for
from counting import Sizes, chain_both, chain_forward
from peers import Compiler, Diffusion, compiled_sample
from timing import Call
from torch import Tensor, nn

from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_coefficients
from llmdpd.diffusion.sampler import Backend
from llmdpd.diffusion.schedules import Precision

BATCHES, STEPS = (1, 16, 256, 2560, 65536), (5, 15, 50, 100)
PRECISIONS, DIRECTIONS = ("fp32", "bf16"), ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One row of the table. `direction`: see `DIRECTIONS`."""

    direction: str
    B: int
    K: int
    precision: str


# What a first look wants, the cases of the table of floors first.
DEFAULT = {
    "cpu": (
        *(Case("forward", B, 5, precision) for B, precision in ((1, "fp32"), (256, "fp32"), (256, "bf16"))),
        *(Case("forward+backward", 256, 5, precision) for precision in PRECISIONS),
        *(Case("forward", B, K, "fp32") for B, K in ((16, 5), (2560, 5), (256, 15))),
    ),
    "cuda": (
        Case("forward", 256, 5, "bf16"),
        Case("forward", 65536, 5, "bf16"),
        Case("forward+backward", 256, 5, "bf16"),
        Case("forward", 256, 5, "fp32"),
        Case("forward+backward", 256, 5, "fp32"),
        Case("forward", 1, 5, "bf16"),
        Case("forward", 2560, 5, "bf16"),
        Case("forward+backward", 65536, 5, "bf16"),
        Case("forward", 65536, 5, "fp32"),
        Case("forward", 256, 15, "bf16"),
        Case("forward", 16, 5, "bf16"),
    ),
}


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for."""
    named = (arguments.directions, arguments.batches, arguments.steps, arguments.precisions)
    if arguments.full or any(part is not None for part in named):
        all_of_it = (
            (DIRECTIONS, BATCHES, STEPS, PRECISIONS) if arguments.full else (DIRECTIONS, (256,), (5,), PRECISIONS)
        )
        chosen = [part or whole for part, whole in zip(named, all_of_it, strict=True)]
        return [Case(*combination) for combination in itertools.product(*chosen)]
    if arguments.quick:
        return [Case(*words) for words in itertools.product(DIRECTIONS, (3,), (2,), PRECISIONS)]
    return list(DEFAULT[arguments.device])


def backends_of(device: torch.device) -> tuple[str, ...]:
    """The implementations that are measured on a device, by default."""
    return ("eager", "compile", "reference", "triton" if device.type == "cuda" else "cpp")


class Workload:
    """The calls of one case.

    Args:
        case: see `Case`. sizes: of the network. device: where it runs. compiler: for the compiled peer.
    """

    def __init__(self, case: Case, sizes: Sizes, device: torch.device, compiler: Compiler) -> None:
        self.case, self.sizes, self.device, self.compiler = case, sizes, device, compiler
        self.state = torch.randn(case.B, sizes.state, device=device)
        self.prompt = torch.randn(sizes.prompt, device=device)
        self.upstream = torch.randn(case.B, sizes.action, device=device)

    @property
    def flops(self) -> float:
        """Operations of a call."""
        count = chain_forward if self.case.direction == "forward" else chain_both
        return count(self.sizes, self.case.B, self.case.K)

    def make(self, backend: str) -> Call:
        """The call of an implementation, which runs the chain and, where asked for, every weight's gradient.

        Raises:
            NotHere: its activations would not fit into memory.
        """
        self._check_memory(backend)
        if backend in ("eager", "compile"):
            return self._peer(backend)
        net = NoiseMLP(self.sizes.state, self.sizes.action, self.sizes.prompt, self.sizes.hidden).to(self.device)
        plan = sampler_coefficients("ddpm", self.case.K)

        def sample() -> Tensor:
            return reverse_diffusion(
                net,
                self.state,
                self.prompt,
                plan,
                backend=cast("Backend", backend),
                precision=cast("Precision", self.case.precision),
            )

        return self._call(sample, net)

    def _peer(self, backend: str) -> Call:
        sizes, mixed = self.sizes, self.case.precision == "bf16"
        actor = Diffusion(sizes.state + sizes.prompt, sizes.action, sizes.hidden, self.case.K).to(self.device)
        condition = torch.cat([self.state, self.prompt.expand(self.case.B, -1)], dim=1)
        chain = compiled_sample(actor, self.compiler) if backend == "compile" else actor.sample

        def sample() -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
                return chain(condition)

        return self._call(sample, actor)

    def _call(self, sample: Callable[[], Tensor], network: nn.Module) -> Call:
        weights = [parameter for parameter in network.parameters() if parameter.requires_grad]

        def forward() -> Tensor:
            with torch.no_grad():
                return sample()

        def both() -> tuple[Tensor, ...]:
            actions = sample()
            return torch.autograd.grad(actions, weights, self.upstream.to(actions.dtype))

        return forward if self.case.direction == "forward" else both

    def _check_memory(self, backend: str) -> None:
        """PyTorch keeps every activation of every step for its backward; ours keep the chain alone."""
        if self.case.direction == "forward" or backend in ("cpp", "triton"):
            return
        sizes = self.sizes
        numbers = 7 * sizes.hidden + sizes.state + sizes.prompt + 16 + 12 * sizes.action
        needed = 4.0 * self.case.B * self.case.K * numbers
        free = free_memory(self.device)
        if needed > 0.6 * free:
            raise NotHere(f"its activations take about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            known = {line.split(":")[0]: line.split()[1] for line in lines}
        return float(known["MemAvailable"]) * 1024
    except OSError:
        return float("inf")  # not Linux: try, and see


def measure(bench: Bench, cases: Sequence[Case], sizes: Sizes, backends: Sequence[str], compiler: Compiler) -> None:
    """One group a case."""
    for case in cases:
        workload = Workload(case, sizes, bench.device, compiler)
        makers = {backend: partial(workload.make, backend) for backend in backends}
        columns = {"direction": case.direction, "B": case.B, "K": case.K, "precision": case.precision}
        compile_time = 40.0 if "compile" in backends and not bench.settings.get("quick") else 0.0
        estimate = compile_time + bench.budget.seconds * len(backends)
        bench.group(columns, workload.flops, makers, prepare=threads_for(makers, bench.threads), estimate=estimate)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(options)
    options.add_argument("--full", action="store_true", help="every combination; hours on a CPU")
    options.add_argument("--batches", type=int, nargs="+", help=f"B, of {BATCHES} or any")
    options.add_argument("--steps", type=int, nargs="+", help=f"K, of {STEPS} or any")
    options.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    options.add_argument("--directions", nargs="+", choices=DIRECTIONS, help="which way")
    options.add_argument("--backends", nargs="+", choices=("eager", "compile", "reference", "cpp", "triton"))
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0, or 1 where an implementation failed."""
    arguments = parser().parse_args(words)
    device, budget = start(arguments)
    compiler = Compiler(device, "eager" if arguments.quick else "inductor")
    bench = Bench("sampler", device, budget, settings_of(arguments), Deadline(arguments.within))
    measure(bench, cases_of(arguments), sizes_of(arguments), arguments.backends or backends_of(device), compiler)
    return finish(bench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
