"""Where the kernels' own tests run: on a CUDA device, or on CPU tensors under triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, and would change it for the whole process, so on a machine
without a device these tests are skipped here and `test_interpreter.py` runs them in a process of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd import kernels
from llmdpd.diffusion import NoiseMLP, SamplerPlan, sampler_plan
from llmdpd.diffusion.reference import reverse_diffusion_reference, walk_chain
from llmdpd.ops.philox import philox_normal

TOLERANCES = {False: (2e-5, 1e-4), True: (2e-2, 5e-2)}
"""bf16 → relative L2 of the actions, and of each gradient."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels can run on here."""
    available, why = kernels.availability()
    if not available:
        pytest.skip(f"{why}; test_interpreter.py runs these")
    return torch.device("cpu" if kernels.interpreted() else "cuda")


def random_plan(rng: np.random.Generator, steps: int = 3, clip: float | None = 0.9) -> SamplerPlan:
    """A table in which no coefficient is zero or one, so that each of them has to be used, and rightly."""
    names = ["p", "e", "A", "B", "C", "S"]
    table = {name: rng.uniform(0.2, 0.8, steps) * rng.choice([-1, 1], steps) for name in names}
    table["S"] = np.abs(table["S"])
    start = float(rng.uniform(0.5, 1.5))
    return dataclasses.replace(sampler_plan("ddpm", steps=steps), clip=clip, start=start, **table)


class Gradient(NamedTuple):
    """A sum over rows, and the root of the sum of their squared norms.

    Each row is rounded by itself, so that the error of the sum is in proportion to that size, even where rows cancel.
    """

    value: Tensor
    size: float


@dataclasses.dataclass
class Case:
    """A network in float32 and its like in float64, inputs, and what the reference makes of them."""

    net: NoiseMLP
    plan: SamplerPlan
    state: Tensor
    prompt: Tensor
    samples: int
    bf16: bool
    device: torch.device

    def parts(self) -> dict[str, Tensor]:
        """The operation's inputs from the network's, in torch: what is differentiated here comes before the kernels."""
        net, layers = self.net, self.net.layers
        parts = {
            "context": net.context(self.state, self.prompt),
            "time_rows": net.time_rows(torch.tensor(self.plan.timesteps, device=self.device)),
            "action_weight": net.first_layer()[0],
        }
        for number in (1, 2, 3):
            parts |= {f"w{number + 1}": layers[number].weight, f"b{number + 1}": layers[number].bias}
        return parts

    @property
    def table(self) -> Tensor:
        rows = np.stack([getattr(self.plan, name) for name in "peABCS"], axis=1)
        return torch.from_numpy(rows).float().to(self.device)

    @property
    def clip(self) -> float:
        return float("inf") if self.plan.clip is None else self.plan.clip

    def forward(self, key: Tensor, noise: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor]:
        from llmdpd.kernels import reverse_diffusion as operation

        with torch.no_grad():
            return operation.forward(
                **self.parts(), table=self.table, key=key.to(self.device), noise=noise, start=self.plan.start,
                clip=self.clip, samples=self.samples, bf16=self.bf16, keep=keep,
            )  # fmt: skip

    def gradients(self, chain: Tensor, grad_actions: Tensor) -> dict[str, Tensor]:
        """Of the network's parameters, the state and the prompt."""
        from llmdpd.kernels import reverse_diffusion as operation

        parts = self.parts()
        found = operation.backward(
            grad_actions, **{name: part.detach() for name, part in parts.items()}, table=self.table, chain=chain,
            clip=self.clip, samples=self.samples, bf16=self.bf16,
        )  # fmt: skip
        for part, gradient in zip(parts.values(), found, strict=True):
            assert gradient.shape == part.shape
            assert gradient.dtype == torch.float32
        targets = {**dict(self.net.named_parameters()), "state": self.state, "prompt": self.prompt}
        made = torch.autograd.grad(list(parts.values()), list(targets.values()), list(found))
        return dict(zip(targets, made, strict=True))

    def noise(self, key: Tensor) -> Tensor:
        """float64, from the definition."""
        seed = int(key[0]) if key.shape[0] == 1 else key.cpu()
        shape = (self.state.shape[0], self.samples, self.plan.steps + 1, self.net.action_dim)
        return philox_normal(seed, *shape)

    def exact_net(self) -> NoiseMLP:
        """The network in float64 on the CPU."""
        net = NoiseMLP(
            self.net.state_dim, self.net.action_dim, self.net.prompt_dim, self.net.hidden_dim, self.net.time_dim
        )
        net.load_state_dict({name: value.cpu() for name, value in self.net.state_dict().items()})
        return net.double()

    def distance_from_the_edge(self, noise: Tensor) -> Tensor:
        """How far from ± the clip the nearest of a row's estimates and actions lies, float64 [B, N]."""
        net, plan = self.exact_net(), self.plan
        clip = float("inf") if plan.clip is None else plan.clip
        nearest = torch.full(noise.shape[1:3], float("inf"), dtype=torch.float64)

        def look(x: Tensor) -> None:
            # A plan whose last row has A = 0 and B = 1 ends on the edge where its last estimate was clipped.
            distance = (x.abs() - clip).abs()
            nearest.copy_(torch.minimum(nearest, distance.where(distance > 1e-6, float("inf")).amin(-1)))

        with torch.no_grad():
            context = net.context(self.state.cpu().double(), self.prompt.cpu().double())[:, None, :]
            rows = net.time_rows(torch.tensor(plan.timesteps))

            def epsilon(x: Tensor, k: int) -> Tensor:
                predicted = net.denoise(x, context, rows[k])
                look(plan.p[k] * x + plan.e[k] * predicted)
                return predicted

            # What is held last is the end of the chain before it is clipped.
            held: list[Tensor] = []

            def hold(x: Tensor) -> Tensor:
                held.append(x)
                return x

            walk_chain(plan, noise.cpu().double(), epsilon, hold)
            look(held[-1])
        return nearest

    def reference(self, noise: Tensor, grad_actions: Tensor | None = None) -> tuple[Tensor, dict[str, Gradient]]:
        """Actions, and the gradients where there is one to pull back, in float64 on the CPU."""
        net = self.exact_net()
        state, prompt = (x.detach().cpu().double().requires_grad_() for x in (self.state, self.prompt))
        actions = reverse_diffusion_reference(net, state, prompt, self.plan, noise.cpu().double())
        if grad_actions is None:
            return actions.detach(), {}
        targets = {**dict(net.named_parameters()), "state": state, "prompt": prompt}
        back = grad_actions.cpu().double()
        made = torch.autograd.grad(actions, list(targets.values()), back, retain_graph=True)
        squares = [0.0] * len(targets)
        for row, own in enumerate(back):
            alone = torch.zeros_like(back)
            alone[row] = own
            parts = torch.autograd.grad(actions, list(targets.values()), alone, retain_graph=True)
            squares = [square + float(part.norm()) ** 2 for square, part in zip(squares, parts, strict=True)]
        gradients = (Gradient(value, square**0.5) for value, square in zip(made, squares, strict=True))
        return actions.detach(), dict(zip(targets, gradients, strict=True))


@pytest.fixture
def make_case(rng: np.random.Generator, device: torch.device) -> Callable[..., Case]:
    def make(
        *, B: int = 5, N: int = 1, A: int = 4, H: int = 33, K: int = 3, bf16: bool = False,
        plan: SamplerPlan | None = None,
        clip: float | None = 0.9, scale: float = 1.5,
    ) -> Case:  # fmt: skip
        net = NoiseMLP(7, A, 6, H, 8).to(device)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape) * scale / parameter.shape[-1] ** 0.5)
        state, prompt = (torch.randn(B, n, device=device).requires_grad_() for n in (7, 6))
        return Case(net, plan or random_plan(rng, K, clip), state, prompt, N, bf16, device)

    return make


@pytest.fixture
def close() -> Callable[..., None]:
    """Asserts a tensor's L2 distance to what it should be, relative to that or to a size that is greater."""

    def check(found: Any, expected: Tensor, tolerance: float, name: str = "", size: float = 0.0) -> None:
        found = found.detach().cpu().double()
        assert found.shape == expected.shape
        scale = max(float(expected.norm()), size)
        assert scale or not found.any(), f"{name}: all of it should be 0"
        error = float((found - expected).norm()) / (scale or 1.0)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"

    return check


@pytest.fixture
def tolerances() -> dict[bool, tuple[float, float]]:
    return TOLERANCES


@pytest.fixture
def key(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 1))
