"""Where the kernels' own tests run: on a CUDA device, or on CPU tensors under triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, and would change it for the whole process, so on a machine
without a device these tests are skipped here and `test_interpreter.py` runs them in a process of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd import kernels
from llmdpd.diffusion import NoiseMLP, SamplerCoefficients, philox_normal
from llmdpd.diffusion.reference import reverse_diffusion_reference, walk_chain
from llmdpd.ops.arguments import ChainArguments
from tests.kernels.stand_in import library as library
from tests.kernels.stand_in import stand_in as stand_in

TOLERANCES = {False: (2e-5, 1e-4), True: (2e-2, 5e-2)}
"""bf16 → relative L2 of the actions, and of each gradient."""
EDGE = 0.1
"""bf16 rounds an estimate that lies this near to the bound to the other side of it now and then, and its whole gradient
appears or vanishes. Rows that have such an estimate get no gradient, so that they add nothing."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels can run on here."""
    available, why = kernels.availability()
    if not available:
        pytest.skip(f"{why}; test_interpreter.py runs these")
    return torch.device("cpu" if kernels.interpreted() else "cuda")


@pytest.fixture(scope="session", autouse=True)
def language_patched_once() -> Iterator[None]:
    """Under the interpreter a kernel's launch puts its own functions in the place of triton.language's.

    So does every call of another function within the kernel, by a search through all names of the modules, although
    nothing is left to replace: a third of all time.
    """
    if not kernels.interpreted():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_what_is_not(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        done = not any(tl.core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if modules and done else patch_lang(fn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_what_is_not)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_thrown_away_checks() -> Iterator[None]:
    """The interpreter looks for overflows of integers, and forgets what it found: a third of what is left of the time.

    With its debug option it would tell, and then this changes nothing.
    """
    if not kernels.interpreted():
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        if not builder.options.debug:
            patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


class Gradient(NamedTuple):
    """A sum over rows and steps of the chain, and the root of the sum of their squared norms.

    Each is rounded by itself, so that the error of the sum is in proportion to that size, even where they cancel.
    """

    value: Tensor
    size: float


@dataclasses.dataclass
class Case:
    """A network in float32 and its like in float64, inputs, and what the reference makes of them."""

    net: NoiseMLP
    plan: SamplerCoefficients
    state: Tensor
    prompt: Tensor
    samples: int
    bf16: bool
    device: torch.device

    def parts(self) -> list[Tensor]:
        """u, tau, W_a and the trunk, computed in torch from the network's inputs: differentiated before the kernels."""
        tau = self.net.time_rows(torch.tensor(self.plan.timesteps, device=self.device))
        trunk = [part for layer in self.net.linears[1:] for part in (layer.weight, layer.bias)]
        return [self.net.context(self.state, self.prompt), tau, self.net.first_layer()[0], *trunk]

    def call(self, key: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, ChainArguments]:
        """u, which the backward pass takes, and the kernels' other arguments."""
        u, tau, W_a, *trunk = (part.detach() for part in self.parts())
        table = torch.from_numpy(self.plan.table()).to(self.device)
        key = torch.zeros(1, dtype=torch.int64) if key is None else key
        _, _, W_s, W_z, bias = (part.detach() for part in self.net.first_layer())
        u_z = torch.nn.functional.linear(self.prompt.detach(), W_z, bias)
        return u, ChainArguments(
            self.state.detach(), W_s, u_z, tau, W_a, trunk, table, key.to(self.device), noise, self.plan.start,
            self.plan.bound, self.samples, self.bf16,
        )  # fmt: skip

    def forward(self, key: Tensor, noise: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor]:
        from llmdpd.kernels import reverse_diffusion as operation

        with torch.no_grad():
            return operation.forward(self.call(key, noise)[1], keep)

    def check_actions(self, key: Tensor) -> Tensor:
        """The actions, after a comparison with the reference."""
        actions, tape = self.forward(key)
        assert tape.numel() == 0
        close(actions, self.reference(self.noise(key))[0], TOLERANCES[self.bf16][0])
        return actions

    def gradients(self, tape: Tensor, grad_actions: Tensor) -> dict[str, Tensor]:
        """Of the network's parameters, the state and the prompt."""
        from llmdpd.kernels import reverse_diffusion as operation

        parts = self.parts()
        found = operation.backward(grad_actions, *self.call(), tape)
        for part, gradient in zip(parts, found, strict=True):
            assert gradient.shape == part.shape
            assert gradient.dtype == torch.float32
        targets = {**dict(self.net.named_parameters()), "state": self.state, "prompt": self.prompt}
        made = torch.autograd.grad(parts, list(targets.values()), found)
        return dict(zip(targets, made, strict=True))

    def check_gradients(self, key: Tensor) -> dict[str, Tensor]:
        """The gradients, after a comparison with the reference's."""
        _, tape = self.forward(key, keep=True)
        grad_actions, noise = torch.randn(tape.shape[1:], device=self.device), self.noise(key)
        if self.bf16:
            away = self.distance_from_the_edge(noise).to(self.device) > EDGE  # [B, N]
            assert away.any()
            grad_actions *= away[..., None]
        _, expected = self.reference(noise, grad_actions)
        found = self.gradients(tape, grad_actions)
        for name, gradient in expected.items():
            close(found[name], gradient.value, TOLERANCES[self.bf16][1], name, gradient.size)
        return found

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
        nearest = torch.full(noise.shape[1:3], float("inf"), dtype=torch.float64)

        def look(x: Tensor) -> None:
            # A plan whose last row has A = 0 and B = 1 ends on the edge where its last estimate was clipped.
            distance = (x.abs() - plan.bound).abs()
            nearest.copy_(torch.minimum(nearest, distance.where(distance > 1e-6, float("inf")).amin(-1)))

        with torch.no_grad():
            u = net.context(self.state.cpu().double(), self.prompt.cpu().double())[:, None, :]
            tau = net.time_rows(torch.tensor(plan.timesteps))

            def epsilon(x: Tensor, k: int) -> Tensor:
                predicted = net.denoise(x, u, tau[k])
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
        # A network, a state and a prompt of its own for each step, so that the steps' gradients stand apart.
        nets = [self.exact_net() for _ in range(self.plan.steps)]
        inputs = [[x.detach().clone().requires_grad_() for x in (state, prompt)] for _ in nets]

        def epsilon(x: Tensor, k: int) -> Tensor:
            u = nets[k].context(*inputs[k])[:, None, :]
            return nets[k].denoise(x, u, nets[k].time_rows(torch.tensor(self.plan.timesteps))[k])

        again = walk_chain(self.plan, noise.cpu().double(), epsilon)
        torch.testing.assert_close(again, actions)
        names = [*dict(net.named_parameters()), "state", "prompt"]
        leaves = [leaf for net, own in zip(nets, inputs, strict=True) for leaf in (*net.parameters(), *own)]

        def of_steps(back: Tensor) -> list[list[Tensor]]:
            made = torch.autograd.grad(again, leaves, back, retain_graph=True)
            return [list(made[place :: len(names)]) for place in range(len(names))]

        back = grad_actions.cpu().double()
        values, squares = [sum(parts, torch.zeros(())) for parts in of_steps(back)], [0.0] * len(names)
        for row, own in enumerate(back):
            alone = torch.zeros_like(back)
            alone[row] = own
            for place, parts in enumerate(of_steps(alone)):
                squares[place] += sum(float(part.norm()) ** 2 for part in parts)
        gradients = (Gradient(value, square**0.5) for value, square in zip(values, squares, strict=True))
        return actions.detach(), dict(zip(names, gradients, strict=True))


@pytest.fixture
def make_case(random_coefficients: Any, device: torch.device) -> Callable[..., Case]:
    def make(
        *, B: int = 5, N: int = 1, A: int = 4, H: int = 33, K: int = 2, bf16: bool = False,
        plan: SamplerCoefficients | None = None, clip: float | None = 0.9, scale: float = 1.5,
    ) -> Case:  # fmt: skip
        net = NoiseMLP(7, A, 6, H, 8).to(device)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape) * scale / parameter.shape[-1] ** 0.5)
        state, prompt = (torch.randn(B, n, device=device).requires_grad_() for n in (7, 6))
        return Case(net, plan or random_coefficients(K, clip), state, prompt, N, bf16, device)

    return make


def close(found: Tensor, expected: Tensor, tolerance: float, name: str = "", size: float = 0.0) -> None:
    """Assert a tensor's L2 distance to what it should be, relative to that or to a size that is greater."""
    found = found.detach().cpu().double()
    assert found.shape == expected.shape
    scale = max(float(expected.norm()), size)
    assert scale or not found.any(), f"{name}: all of it should be 0"
    error = float((found - expected).norm()) / (scale or 1.0)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture(name="close")
def close_fixture() -> Callable[..., None]:
    return close


@pytest.fixture
def key(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 1))
