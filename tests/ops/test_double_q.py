"""The critics' losses in one node, against their definition in PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.nn.critic import DoubleQ
from llmdpd.ops import double_q, native, operators

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")
SIZES = [(256, 39, 4, 0, 256), (61, 5, 3, 7, 33), (1, 1, 1, 1, 1)]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    native.set_threads(None)


def made(S: int, A: int, Z: int, H: int) -> DoubleQ:
    critic = DoubleQ(S, A, Z, H)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return critic


def apart(one: Tensor, other: Tensor) -> float:
    """A mean value may lie near 0, where no relative error holds."""
    return float((one.double() - other).norm() / other.norm().clamp_min(1e-2 if other.ndim else 0.3))


def regression(critic: DoubleQ, given: Any, precision: Any) -> list[Tensor]:
    """Results and gradients; the loss is weighted, as a gradient that comes from elsewhere is.

    Errors are of one sign: nowhere do the terms of a sum cancel, of which bfloat16 would leave nothing.
    """
    loss, mean = critic.regression(*given, torch.linspace(3, 4, len(given[0])).to(given[0].dtype), precision)
    assert not mean.requires_grad
    return [loss.detach(), mean, *torch.autograd.grad(0.7 * loss, list(critic.parameters()))]


def objective(first: bool, critic: DoubleQ, given: Any, precision: Any) -> list[Tensor]:
    critic.requires_grad_(False)
    action = given[1].clone().requires_grad_()
    value, scale = critic.objective(given[0], action, given[2], first, precision)
    assert not scale.requires_grad
    return [value.detach(), scale, *torch.autograd.grad(0.7 * value, action)]


def lesser(critic: DoubleQ, given: Any, precision: Any) -> list[Tensor]:
    with torch.no_grad():
        return [critic.minimum(*given, precision)]


LOSSES: dict[str, Callable[..., list[Tensor]]] = {
    "regression": regression,
    "first": lambda *given: objective(True, *given),
    "minimum": lesser,
    "second": lambda *given: objective(False, *given),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("size", "precision"), [*((size, "fp32") for size in SIZES), (SIZES[0], "bf16")])
def test_results_and_gradients(
    isa: str, monkeypatch: pytest.MonkeyPatch, loss: str, size: tuple[int, ...], precision: Any
) -> None:
    B, S, A, Z, H = size
    critic, given = made(S, A, Z, H), (torch.randn(B, S), torch.randn(B, A), torch.randn(B, Z))
    found = []
    for threads, limit in ((1, 1 << 30), (2, 1 << 30), (5, 1 << 30), (2, 0)):
        native.set_threads(threads)
        monkeypatch.setattr(operators, "TAPE_LIMIT", limit)
        found.append(LOSSES[loss](copy.deepcopy(critic), given, precision))
    wanted = LOSSES[loss](copy.deepcopy(critic).double(), tuple(part.double() for part in given), "fp32")
    assert len(found[0]) == len(wanted)
    for number, (one, other) in enumerate(zip(found[0], wanted, strict=True)):
        assert one.shape == other.shape
        assert apart(one, other) <= (5e-2 if precision == "bf16" else 1e-4), number
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_where_the_nodes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name in ("regression", "objective", "minimum"):
        real = getattr(double_q, name)
        monkeypatch.setattr(double_q, name, lambda *given, name=name, real=real: calls.append(name) or real(*given))
    critic = made(3, 2, 4, 8)
    given: Any = [torch.randn(6, 3), torch.randn(6, 2), torch.randn(6, 4)]
    frozen = copy.deepcopy(critic).requires_grad_(False)
    critic.regression(*given, torch.zeros(6))
    frozen.objective(*given, True)
    with torch.no_grad():
        alone = critic.minimum(*given)
    assert calls == ["regression", "objective", "minimum"]
    torch.testing.assert_close(critic.minimum(*given), alone)
    # Gradients of the critics that the objective's node would not have, and none that the other's would.
    critic.objective(*given, True)[0].backward()
    assert all((p.grad is not None) == name.startswith("q1") for name, p in critic.named_parameters())
    frozen.regression(*given, torch.zeros(6))
    with torch.no_grad():
        critic.regression(*given, torch.zeros(6))
    double = copy.deepcopy(critic).double()
    wider: Any = [part.double() for part in (*given, torch.zeros(6))]
    double.regression(*wider)
    critic.q1.get_submodule("2").register_forward_hook(lambda *given: 2.0 * given[-1])
    critic.regression(*given, torch.zeros(6))
    assert calls == ["regression", "objective", "minimum"]


def test_weights_that_were_written_meanwhile_are_refused(rng: np.random.Generator) -> None:
    critic = made(3, 2, 0, 8)
    given: Any = [torch.randn(6, 3), torch.randn(6, 2), torch.randn(6, 0)]
    loss, _ = critic.regression(*given, torch.zeros(6))
    critic.requires_grad_(False)
    value, _ = critic.objective(given[0], given[1].requires_grad_(), given[2], False)
    with torch.no_grad():
        critic.q2.get_parameter("4.weight").mul_(2.0)
    for result in (loss, value):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()
