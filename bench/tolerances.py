"""The tolerances that every backend is held to, against the float64 reference; on whatever device is at hand.

Fresh random weights and inputs each run. Needs no test framework, so that it runs on a machine that has a GPU and
little else: `python bench/tolerances.py --device cuda`, with exit status 1 where one is not held.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from common import Deadline
from report import DASH, format_table
from torch import Tensor, nn

from llmdpd.diffusion import (
    BackendUnavailableError,
    NoiseMLP,
    SamplerCoefficients,
    philox_normal,
    reverse_diffusion,
    sampler_coefficients,
)
from llmdpd.diffusion.reference import walk_chain
from llmdpd.diffusion.sampler import Backend
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops.arguments import Precision

ACTIONS = {"fp32": 2e-5, "bf16": 2e-2}
GRADIENTS = {"fp32": 1e-4, "bf16": 5e-2}
NOISE = 2e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """A problem: hidden width, action and state size, prompt size, batch, samples, steps, sampler."""

    H: int = 256
    A: int = 4
    S: int = 39
    Z: int = 32
    B: int = 33
    N: int = 1
    K: int = 5
    sampler: str = "ddpm"
    prompt_per_state: bool = False

    def __str__(self) -> str:
        prompts = ", a prompt a state" if self.prompt_per_state else ""
        return f"{self.sampler} H={self.H} A={self.A} B={self.B} N={self.N} K={self.K}{prompts}"


# Ragged ones among them: no width, batch or action size that a tile would like.
SHAPES = (
    Shape(B=257),
    Shape(H=100, A=3, S=7, Z=5, B=211),
    Shape(B=51, N=3, prompt_per_state=True),
    Shape(B=129, K=15),
    Shape(B=300, sampler="ddim"),
    Shape(H=64, A=1, B=1, K=15, sampler="dpm++2m"),
)
QUICK_SHAPES = (Shape(H=24, A=3, S=5, Z=4, B=171, N=2, K=3, prompt_per_state=True),)
# Candidates for each row of a problem, see `Problem`.
CANDIDATES = 8


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: `error` against `tolerance`; `reason` where it could not be run."""

    what: str
    shape: str
    backend: str
    precision: str
    error: float | None
    tolerance: float
    reason: str | None = None

    @property
    def passed(self) -> bool | None:
        """None where it could not be run. A NaN does not pass."""
        return None if self.error is None else bool(self.error <= self.tolerance)

    def values(self) -> dict[str, Any]:
        """As JSON values (which know no NaN)."""
        error = self.error if self.error is None or np.isfinite(self.error) else str(self.error)
        return {**dataclasses.asdict(self), "error": error, "passed": self.passed}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    expected = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm().clamp_min(1e-300))


class Problem:
    """Random weights and inputs of a shape on the device, and the same in float64 on the CPU.

    A clipped x0 sends no gradient back, so one that rounding moves over the bound changes the gradient by a step: by
    tens of per cent where it is one of the few that the first steps of a chain leave unclipped, and no arithmetic would
    do better. So of several candidates those states are taken whose x0 keep the furthest from the bound.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.net = NoiseMLP(shape.S, shape.A, shape.Z, shape.H).to(device)
        self.exact_net = copy.deepcopy(self.net).double().cpu()
        self.plan = sampler_coefficients(cast("Any", shape.sampler), shape.K)
        drawn = CANDIDATES * shape.B
        state, noise = torch.randn(drawn, shape.S), torch.randn(shape.K + 1, drawn, shape.N, shape.A)
        prompt = torch.randn(drawn, shape.Z) if shape.prompt_per_state else torch.randn(shape.Z)
        margin = clip_margin(self.exact_net, self.plan, state.double(), prompt.double(), noise.double())
        taken = margin.argsort(descending=True)[: shape.B]
        self.state, self.noise = state[taken], noise[:, taken]
        self.prompt = prompt[taken] if shape.prompt_per_state else prompt
        self.upstream = torch.randn((shape.B, shape.A) if shape.N == 1 else (shape.B, shape.N, shape.A))

    def run(self, backend: Backend, precision: Precision, gradient: bool) -> dict[str, Tensor]:
        """`actions`, and with gradient `d …` of every weight, of state and prompt."""
        state, prompt = (part.to(self.device).requires_grad_(gradient) for part in (self.state, self.prompt))
        return self._run(self.net, state, prompt, self.noise.to(self.device), backend, precision, gradient)

    def exact(self, gradient: bool) -> dict[str, Tensor]:
        """The same by the reference in float64."""
        state, prompt = (part.double().requires_grad_(gradient) for part in (self.state, self.prompt))
        return self._run(self.exact_net, state, prompt, self.noise.double(), "reference", "fp32", gradient)

    def _run(
        self,
        net: NoiseMLP,
        state: Tensor,
        prompt: Tensor,
        noise: Tensor,
        backend: Backend,
        precision: Precision,
        gradient: bool,
    ) -> dict[str, Tensor]:
        with torch.set_grad_enabled(gradient):
            actions = reverse_diffusion(
                net, state, prompt, self.plan, self.shape.N, noise=noise, backend=backend, precision=precision
            )
        found = {"actions": actions}
        if gradient:
            leaves = {"state": state, "prompt": prompt, **dict(net.named_parameters())}
            gradients = torch.autograd.grad(actions, list(leaves.values()), self.upstream.to(actions))
            found |= {f"d {name}": value for name, value in zip(leaves, gradients, strict=True)}
        return found


@torch.no_grad()
def clip_margin(net: NoiseMLP, plan: SamplerCoefficients, state: Tensor, prompt: Tensor, noise: Tensor) -> Tensor:
    """How far every state's x0 keep from the bound at the closest, in multiples of what the network's error can move
    them by: [B]."""
    u, tau = net.context(state, prompt)[:, None, :], net.time_rows(torch.tensor(plan.timesteps))
    margins = []

    def epsilon(a: Tensor, k: int) -> Tensor:
        predicted = net.denoise(a, u, tau[k])
        x0 = plan.p[k] * a + plan.e[k] * predicted
        margins.append(((x0.abs() - plan.bound).abs() / max(1.0, abs(plan.e[k]))).flatten(1).amin(1))
        return predicted

    walk_chain(plan, noise, epsilon)
    return torch.stack(margins).amin(0)


def check_chain(shape: Shape, device: torch.device, backend: Backend, precision: Precision) -> Iterator[Check]:
    """Actions, without gradient kept and with, and the gradient of each tensor."""
    problem = Problem(shape, device)

    def check(what: str, tolerance: float, error: float | None, reason: str | None = None) -> Check:
        return Check(what, str(shape), backend, precision, error, tolerance, reason)

    try:
        actions = problem.run(backend, precision, gradient=False)["actions"]
        yield check("actions", ACTIONS[precision], relative_error(actions, problem.exact(False)["actions"]))
    except BackendUnavailableError as reason:
        yield check("actions", ACTIONS[precision], None, str(reason))
    try:
        found = problem.run(backend, precision, gradient=True)
    except BackendUnavailableError as reason:
        yield check("gradients", GRADIENTS[precision], None, str(reason))
        return
    for name, expected in problem.exact(True).items():
        tolerance = ACTIONS[precision] if name == "actions" else GRADIENTS[precision]
        label = "actions, gradient kept" if name == "actions" else name
        yield check(label, tolerance, relative_error(found[name], expected))


def noise_plan(draw: int, steps: int) -> SamplerCoefficients:
    """A chain whose result is its draw number `draw` (0: the start), whatever the network says."""
    zero, one = np.zeros(steps), np.ones(steps)
    noise = zero.copy()
    if draw > 0:
        noise[draw - 1] = 1.0
    plain = sampler_coefficients("ddpm", steps)
    start = 1.0 if draw == 0 else 0.0
    return dataclasses.replace(plain, clip=None, start=start, p=zero, e=zero, A=one, B=zero, C=zero, S=noise)


def check_noise(
    device: torch.device, backend: Backend, precision: Precision, batch: int = 9, samples: int = 3, action: int = 6
) -> Iterator[Check]:
    """Every draw of a chain, under one key and under a key a state, against the oracle in float64."""
    steps = 4
    net = NoiseMLP(5, action, 3, 64).to(device)
    state, prompt = torch.randn(batch, 5, device=device), torch.randn(3, device=device)
    key = secrets.randbits(62)
    keys = torch.randint(2**62, (batch,), device=device)
    for name, seed in (("one key", key), ("a key a state", keys)):
        expected = philox_normal(seed, batch, samples, steps + 1, action, device)
        error: float | None = 0.0
        reason = None
        try:
            for draw in range(steps + 1):
                with torch.no_grad():
                    found = reverse_diffusion(
                        net, state, prompt, noise_plan(draw, steps), samples, seed, None, backend, precision
                    )
                error = max(cast("float", error), float((found.double() - expected[draw]).abs().max()))
        except BackendUnavailableError as unavailable:
            error, reason = None, str(unavailable)
        yield Check(f"noise, {name}", f"A={action} B={batch} N={samples}", backend, precision, error, NOISE, reason)


def check_critic(device: torch.device, hidden: int, batch: int) -> Iterator[Check]:
    """Both critics and the gradients of their weights and of the actions, in fp32."""
    critic = DoubleQ(39, 4, 0, hidden).to(device)
    exact = copy.deepcopy(critic).double().cpu()
    parts = [torch.randn(batch, width) for width in (39, 4)]
    upstream = torch.rand(2, batch) + 0.5  # of one sign: else the last bias's gradient is a sum that cancels

    def run(network: DoubleQ, dtype: torch.dtype, place: torch.device) -> dict[str, Tensor]:
        state, action = (part.to(place, dtype).requires_grad_() for part in parts)
        values = torch.stack(network(state, action, torch.zeros(batch, 0, dtype=dtype, device=place)))
        leaves = {"action": action, **dict(cast("nn.Module", network).named_parameters())}
        gradients = torch.autograd.grad(values, list(leaves.values()), upstream.to(place, dtype))
        return {"values": values, **{f"d {n}": g for n, g in zip(leaves, gradients, strict=True)}}

    found, expected = run(critic, torch.float32, device), run(exact, torch.float64, torch.device("cpu"))
    for name, value in expected.items():
        tolerance = (ACTIONS if name == "values" else GRADIENTS)["fp32"]
        shape = f"H={hidden} B={batch}"
        yield Check(f"critics: {name}", shape, "training", "fp32", relative_error(found[name], value), tolerance)


def check_all(
    device: torch.device, backends: Sequence[Backend], quick: bool = False, deadline: Deadline | None = None
) -> list[Check]:
    """Every check that fits before the deadline."""
    deadline = deadline or Deadline()
    checks: list[Check] = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    # Precisions innermost: where the time is up early, both have been looked at.
    for backend, shape, precision in itertools.product(backends, QUICK_SHAPES if quick else SHAPES, precisions):
        if deadline.allows(5.0):
            checks += check_chain(shape, device, backend, precision)
        else:
            checks.append(Check("actions", str(shape), backend, precision, None, ACTIONS[precision], "the time was up"))
    for backend, precision in itertools.product(backends, precisions):
        checks += check_noise(device, backend, precision)
    checks += check_critic(device, *((16, 5) if quick else (256, 256)))
    return checks


def print_checks(checks: Sequence[Check]) -> None:
    """The worst of each kind; every one that is not held."""
    worst: dict[tuple[str, str, str], Check] = {}
    for check in checks:
        kind = "gradients" if check.what.startswith("d ") else check.what.split(":")[0]
        key = (check.backend, check.precision, kind)
        if key not in worst or _badness(check) > _badness(worst[key]):
            worst[key] = check
    rows = []
    for (backend, precision, kind), check in worst.items():
        error = DASH if check.error is None else f"{check.error:.1e}"
        verdict = {None: "not run", True: "held", False: "NOT HELD"}[check.passed]
        rows.append([backend, precision, kind, error, f"{check.tolerance:.0e}", verdict, f"{check.what} {check.shape}"])
    print(format_table(["backend", "precision", "what", "worst", "tolerance", "", "where"], rows))
    for check in checks:
        if check.passed is False:
            print(f"NOT HELD: {check.backend} {check.precision} {check.what} {check.shape}: {check.error:.2e}")
    for reason in dict.fromkeys(check.reason for check in checks if check.reason):
        print(f"{DASH} {reason}")


def _badness(check: Check) -> float:
    return -1.0 if check.error is None else float("inf") if np.isnan(check.error) else check.error / check.tolerance


def main(words: Sequence[str] | None = None) -> int:
    """Check and print; 0, or 1 where a tolerance is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backends", nargs="+", choices=("reference", "cpp", "triton"))
    parser.add_argument("--seed", type=int, help="repeat a run")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    arguments = parser.parse_args(words)
    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    torch.manual_seed(seed)
    backends = arguments.backends or ["triton" if arguments.device == "cuda" else "cpp"]
    checks = check_all(torch.device(arguments.device), backends, arguments.quick)
    print_checks(checks)
    return 1 if any(check.passed is False for check in checks) else 0


if __name__ == "__main__":
    raise SystemExit(main())
