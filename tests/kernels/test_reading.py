"""The retrieval context's reading of states in Triton, against PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn import device_features
from llmdpd.nn.context import ContextConfig, EncodedPrompts, Keep, RetrievalConfig, RetrievalContext
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import device_memory, device_reading, layers, triton
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.tasks.layout import Layout, Point
from llmdpd.training.batches import moved

TOLERANCES = {False: (2e-5, 1e-4), True: (5e-3, 5e-2)}
"""Whether operands are rounded to tf32 → of results, and of gradients."""
S, A, D = 6, 3, 5


class Case(NamedTuple):
    """A context, prompts that it has read, and states under them in equal groups."""

    context: RetrievalContext
    prompts: EncodedPrompts
    state: Tensor
    time: Tensor

    def leaves(self) -> list[Tensor]:
        """What there is a gradient of: vectors, memories, weights."""
        memory = [self.prompts.memory[name] for name in self.context._row_names]
        weights = dict(self.context.named_parameters())
        return [self.prompts.pooled, *memory, *(weights[name] for name in self.context._state_weights)]

    def read(self) -> Tensor:
        return self.context.condition(self.state, self.prompts, None, self.time).state

    def exact(self) -> Case:
        """The same in float64 on the CPU."""
        context = copy.deepcopy(self.context).cpu().double()
        pooled = self.prompts.pooled.detach().cpu().double().requires_grad_()
        memory = {name: part.detach().cpu().double() for name, part in self.prompts.memory.items()}
        for name in context._row_names:
            memory[name].requires_grad_()
        return Case(context, EncodedPrompts(pooled, memory), self.state.cpu().double(), self.time.cpu())


@pytest.fixture
def make(device: torch.device, rng: np.random.Generator) -> Callable[..., Case]:
    def case(P: int, M: int, lengths: tuple[int, ...], given: bool = True, **sizes: Any) -> Case:
        text, loose = sizes.pop("text", True), sizes.pop("loose", False)
        encoder = TrajectoryEncoderConfig(layers=1, width=8, inner=8, heads=2, steps=50, dropout=0.0)
        config = ContextConfig(
            "retrieval", text=text, text_dim=7, text_hidden=8, trajectory_dim=3, encoder=encoder,
            retrieval=RetrievalConfig(**sizes),
        )  # fmt: skip
        context = RetrievalContext(Spaces(S, A, D), config)
        with torch.no_grad():
            for parameter in context.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            if hasattr(context, "likeness"):
                context.likeness.sub_(3.0)  # random states lie far apart: heads would be sure of one step
        shown = [
            (rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in lengths
        ]
        keep = torch.ones(P, 1)
        keep[-1] = float(given)
        prompts = context.encode(torch.randn(P, D), make_tokens(shown, encoder), Keep(None, keep))
        pooled, names = prompts.pooled.detach().to(device).requires_grad_(), context._row_names
        memory = {name: part.detach().to(device) for name, part in prompts.memory.items()}
        for name in names:
            memory[name].requires_grad_()
        if loose:  # heads may choose the step that says nothing beside others, as no prompt lets them
            memory["waypoint_bias"][..., -1] = -0.3
        state, time = torch.randn(P * M, S, device=device), torch.randint(0, 90, (P * M,), device=device)
        return Case(context.to(device), EncodedPrompts(pooled, memory), state, time)

    return case


@pytest.fixture
def launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the kernels read states of the CPU where they are interpreted; names of what is launched."""
    from llmdpd.kernels.launch import Launch

    names: list[str] = []
    run = Launch.run

    def recorded(self: Launch) -> None:
        names.append(self.kernel.__name__)
        run(self)

    monkeypatch.setattr(Launch, "run", recorded)
    if device.type == "cpu":
        monkeypatch.setattr(layers, "computes", lambda *_: False)
        monkeypatch.setattr(device_reading, "may_read", lambda own: own.dtype is torch.float32)
        monkeypatch.setattr(triton, "unavailable", lambda: None)
    return names


CASES = {
    "default": dict(P=2, M=17, lengths=(7, 4), layers=2, heads=2, width=32),
    "odd": dict(P=3, M=3, lengths=(1, 17, 5), layers=1, heads=3, width=21, lookahead=(0, 2, 5), given=False),
    "no text": dict(P=1, M=5, lengths=(6,), layers=1, heads=1, width=16, text=False, timestep_embedding=False),
    "waypoints alone": dict(P=2, M=2, lengths=(3, 6), attention=False, heads=2, width=10, loose=True),
    "attention alone": dict(P=1, M=17, lengths=(5,), waypoints=False, layers=1, heads=2, width=70),
    "no similarity": dict(P=1, M=4, lengths=(5,), layers=1, heads=2, width=16, geometric_similarity=False),
}


def row_sizes(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[float]:
    """Of each leaf the root of the sum of its rows' squared gradients: each is rounded by itself, and they cancel."""
    squares = [0.0] * len(leaves)
    for row in range(len(out)):
        found = torch.autograd.grad(out[row], leaves, grad[row], retain_graph=True, allow_unused=True)
        squares = [s + (0.0 if g is None else float(g.norm()) ** 2) for s, g in zip(squares, found, strict=True)]
    return [square**0.5 for square in squares]


@pytest.mark.parametrize(("name", "short"), [*((name, False) for name in CASES), ("default", True), ("odd", True)])
def test_forward_and_backward(
    make: Callable[..., Case], close: Callable[..., None], launches: list[str], name: str, short: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(device_reading, "bfloat16_products", lambda: short)
    case = make(**CASES[name])
    exact = case.exact()
    wanted = exact.context.condition(exact.state, exact.prompts, None, exact.time).state
    out = case.read()
    assert launches == ["reading_kernel"]
    close(out, wanted, TOLERANCES[short][0])
    grad = torch.randn(wanted.shape)
    found = torch.autograd.grad(out, case.leaves(), grad.to(out.device))
    expected = torch.autograd.grad(wanted, exact.leaves(), grad.double(), retain_graph=True, allow_unused=True)
    sizes = row_sizes(wanted, exact.leaves(), grad.double()) if short else [0.0] * len(expected)
    names = ["pooled", *case.context._row_names, *case.context._state_weights]
    for which, one, other, size in zip(names, found, expected, sizes, strict=True):
        # Without text nothing depends on the prompts' vectors.
        other = torch.zeros_like(one, device="cpu", dtype=torch.float64) if other is None else other
        close(one, other, TOLERANCES[short][1], which, size)
    assert launches[1:] == ["reading_backward_kernel", "reading_gradient_kernel"]


def test_the_same_bits_each_time(make: Callable[..., Case], launches: list[str]) -> None:
    case, made = make(**CASES["no similarity"]), []
    for _ in range(2):
        out = case.read()
        made.append([out, *torch.autograd.grad(out.square().sum(), case.leaves())])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert len(launches) == 6


def test_what_the_kernels_are_not_made_for_is_left_to_pytorch(
    make: Callable[..., Case], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(**CASES["no similarity"])
    context, prompts, state, time = case
    context.condition(state, prompts, torch.zeros(len(state), dtype=torch.int64, device=state.device), time)
    assert launches == ["reading_kernel"]  # one prompt: one group
    context.condition(state.requires_grad_(), prompts, None, time)  # the kernels have no gradient of it
    for name in ("MOST_WIDTH", "MOST_STEPS", "MOST_NUMBERS", "MOST_STATES"):
        with monkeypatch.context() as patch:
            patch.setattr(device_reading, name, 3)
            context.condition(state.detach(), prompts, None, time)
    case = make(**CASES["waypoints alone"])
    context, prompts, state, time = case
    context.condition(state, prompts, torch.tensor([1, 0, 0, 1], device=state.device), time)
    assert launches == ["reading_kernel"]
    hook = context.waypoint_query.register_forward_hook(lambda *_: None)
    context.condition(state, prompts, None, time)
    hook.remove()
    assert launches == ["reading_kernel"]
    context.condition(state, prompts, None, time)
    assert launches == 2 * ["reading_kernel"]


def test_weights_of_other_sizes_are_refused(make: Callable[..., Case]) -> None:
    case = make(**CASES["no similarity"])
    tensors = case.leaves()[1:]
    given = case.context.given(*case.context._seen(case.state, case.time), case.prompts)
    with pytest.raises(ValueError, match="numbers of weights, and"):
        device_reading.read_states(case.context._shape, given, tensors[:3], tensors[3:-1])


def test_an_iterations_gradients_are_pytorchs(
    device: torch.device, rng: np.random.Generator, close: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Through all of it: prompts read by PyTorch, features and states by the kernels, and the diffusion loss."""
    encoder = TrajectoryEncoderConfig(layers=1, width=8, inner=8, heads=2, steps=9, dropout=0.0)
    sizes = {"text_dim": 5, "text_hidden": 8, "trajectory_dim": 3, "encoder": encoder, "features": "relative"}
    context = ContextConfig("retrieval", **sizes, retrieval=RetrievalConfig(layers=1, heads=2, width=12))
    network = DiffusionNetworkConfig(hidden_dim=16, context=context)
    layout = Layout((Point("hand", (0, 2)), Point("thing", (1, 3))), scalars=(5,))
    method = LLMDPD(DiffusionPolicy(Spaces(S, A, D, layout), network).to(device), LLMDPDConfig(eta=0.0), 9)
    with torch.no_grad():
        for parameter in method.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    P, rows = 2, 5
    shown = [tuple(rng.normal(size=(n, size)).astype(np.float32) for size in (S, A)) for n in (4, 7)]
    state, action, number = torch.randn(P * rows, S), torch.randn(P * rows, A), torch.zeros(P * rows)
    batch = PromptedBatch(
        observations=state, actions=action, expert_actions=action, rewards=number, next_observations=state,
        terminals=number, timesteps=torch.randint(0, 90, (P * rows,)), text=torch.randn(P, D),
        tokens=make_tokens(shown, encoder), keep=Keep(torch.tensor([[1.0], [0.0]]), torch.ones(P, 1)),
    )  # fmt: skip
    batch = moved(batch, device)

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        loss, _ = method.actor_loss(batch, method.condition(batch, method.encode(batch)))
        return loss, *torch.autograd.grad(loss, list(method.policy.parameters()))

    with monkeypatch.context() as patch:
        for module in (device_reading, device_features, device_memory):
            patch.setattr(module, "may_read", lambda *_: False)
        patch.setattr(layers, "computes", lambda *_: False)
        wanted = gradients()
    launches = request.getfixturevalue("launches")
    for other in (device_features, device_memory):
        monkeypatch.setattr(other, "may_read", lambda state: True)
    found = gradients()
    assert {"features_kernel", "memory_kernel", "reading_kernel", "reading_gradient_kernel"} <= {*launches}
    names = ["loss", *(name for name, _ in method.policy.named_parameters())]
    largest = max(float(gradient.norm()) for gradient in wanted[1:])
    for name, one, other in zip(names, found, wanted, strict=True):
        # A number that is added to all keys changes nothing: what is left of its gradient is rounding.
        close(one, other.detach().cpu().double(), 2e-4, name, 0.05 * largest)
