"""Fused against eager: the forward reverse chain, alternating in one process.

    python bench/sampler.py --json bench/results/sampler-NAME.json

`eager` is what users of public Diffusion-QL code run today: at every step [a, t, s, z] is concatenated, the time
embedding computed anew and noise drawn by torch.randn. `reference` is this project's PyTorch sampler (context once,
counter-based noise), `cpp` its C++ kernel, weights packed at every call. Medians over the repetitions, with 20th and
80th percentile.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.table import Table

from llmdpd.build import build_info
from llmdpd.diffusion import NoiseMLP, SamplerPlan, reverse_diffusion, sampler_plan
from llmdpd.files import atomic_write_json
from llmdpd.progress import console


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    batches: tuple[int, ...] = (1, 16, 256, 2560)
    """States a call, B."""
    steps: tuple[int, ...] = (5, 15)
    """Denoising steps, K."""
    hidden: int = 256
    """Width of the network, H."""
    state: int = 39
    """Size of the state, S."""
    prompt: int = 256
    """Size of the prompt vector, Z; one prompt for the whole batch."""
    action: int = 4
    """Size of the action, A."""
    threads: int = 2
    """CPU threads of torch and of the C++ sampler."""
    repetitions: int = 30
    """Counted repetitions of every implementation, after 3 that are not."""
    json: Path | None = None
    """File for the figures."""


def eager_chain(net: NoiseMLP, state: torch.Tensor, prompt: torch.Tensor, plan: SamplerPlan) -> torch.Tensor:
    """The chain as the common public implementation walks it."""
    batch = state.shape[0]
    condition = torch.cat([state, prompt.expand(batch, -1)], dim=1)
    actions = torch.randn(batch, net.action_dim)
    for k, timestep in enumerate(plan.timesteps.tolist()):
        time_index = torch.full((batch,), timestep, dtype=torch.long)
        hidden = torch.cat([actions, net.time_embedding(time_index), condition], dim=1)
        for layer in net.layers[:-1]:
            hidden = torch.nn.functional.mish(layer(hidden))
        x0 = plan.p[k] * actions + plan.e[k] * net.layers[-1](hidden)
        x0 = x0.clamp(-1.0, 1.0)
        actions = plan.A[k] * actions + plan.B[k] * x0 + plan.S[k] * torch.randn_like(actions)
    return actions.clamp(-1.0, 1.0)


def time_alternating(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every call, the implementations in turn, so that a drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(-3, repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def chain_flops(settings: Settings, batch: int, steps: int) -> float:
    """Operations that the split chain needs: the context once, then K times two hidden layers and the action's part."""
    h, a = settings.hidden, settings.action
    return 2.0 * (batch * settings.state * h + settings.prompt * h + batch * steps * (2 * h * h + 2 * h * a))


def measure(settings: Settings) -> list[dict[str, float | int | str]]:
    """One row an implementation and shape."""
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    net = NoiseMLP(settings.state, settings.action, settings.prompt, settings.hidden)
    rows: list[dict[str, float | int | str]] = []
    for steps in settings.steps:
        plan = sampler_plan("ddpm", steps)
        for batch in settings.batches:
            state, prompt = torch.randn(batch, settings.state), torch.randn(settings.prompt)
            calls: dict[str, Callable[[], object]] = {
                "eager": lambda s=state, z=prompt, p=plan: eager_chain(net, s, z, p),
                "reference": lambda s=state, z=prompt, p=plan: reverse_diffusion(net, s, z, p, backend="reference"),
                "cpp": lambda s=state, z=prompt, p=plan: reverse_diffusion(net, s, z, p, backend="cpp"),
            }
            with torch.no_grad():
                seconds = time_alternating(calls, settings.repetitions)
            eager = statistics.median(seconds["eager"])
            for name, values in seconds.items():
                low, middle, high = np.percentile(values, [20, 50, 80])
                rows.append(
                    {
                        "backend": name,
                        "B": batch,
                        "K": steps,
                        "ms_median": middle * 1e3,
                        "ms_p20": low * 1e3,
                        "ms_p80": high * 1e3,
                        "against_eager": eager / middle,
                        "gflops": chain_flops(settings, batch, steps) / middle / 1e9,
                    }
                )
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    settings = tyro.cli(Settings, description=__doc__)
    rows = measure(settings)
    table = Table("B", "K", "backend", "ms median", "p20 – p80", "× eager", "GFLOP/s")
    for row in rows:
        spread = f"{row['ms_p20']:.3f} – {row['ms_p80']:.3f}"
        ratio, speed = f"{row['against_eager']:.1f}", f"{row['gflops']:.0f}"
        table.add_row(
            str(row["B"]), str(row["K"]), str(row["backend"]), f"{row['ms_median']:.3f}", spread, ratio, speed
        )
    console.print(table)
    if settings.json is not None:
        shown = {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"}
        machine = {"system": platform.platform(), "build": build_info()}
        atomic_write_json(settings.json, {"settings": shown, "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
