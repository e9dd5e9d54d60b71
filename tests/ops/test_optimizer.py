"""Steps of AdamW and averages in C++ against PyTorch's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.ops import native
from llmdpd.ops.memory import Memory
from llmdpd.ops.optimizer import average, clipped_step

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")

SHAPES = [(300, 257), (5,), (1, 1), (16_385,), (0, 3), (33, 7)]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    native.set_threads(None)


def made(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], torch.optim.AdamW]:
    weights = [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]
    rate = torch.tensor(3e-3, dtype=torch.float64)
    return weights, torch.optim.AdamW(weights, rate, weight_decay=0.1, fused=True)


def twin(weights: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], torch.optim.AdamW]:
    others, optimizer = made(dtype)
    for other, weight in zip(others, weights, strict=True):
        other.data.copy_(weight.detach())
    return others, optimizer


def give(weights: list[Tensor], seed: int, scale: float = 1.0) -> None:
    """Random gradients; one has none now and then."""
    generator = torch.Generator().manual_seed(seed)
    for place, weight in enumerate(weights):
        gradient = scale * torch.randn(weight.shape, generator=generator)
        weight.grad = None if place == 1 and seed % 3 == 1 else gradient.to(weight.dtype)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_steps_are_those_of_adamw(isa: str, limit: float) -> None:
    weights, optimizer = made()
    exact, reference = twin(weights, torch.float64)
    for seed in range(7):
        give(weights, seed)
        give(exact, seed)
        norm = clipped_step([optimizer], limit)
        gradients = [p.grad for p in exact if p.grad is not None]
        wanted = torch.nn.utils.clip_grad_norm_(exact, limit) if limit else torch.nn.utils.get_total_norm(gradients)
        reference.step()
        torch.testing.assert_close(norm.double(), wanted.double(), rtol=1e-6, atol=0)
    for one, other in zip(weights, exact, strict=True):
        torch.testing.assert_close(one.detach().double(), other.detach(), rtol=1e-5, atol=1e-6)
        for name, moment in reference.state[other].items():
            torch.testing.assert_close(optimizer.state[one][name].double(), moment.double(), rtol=1e-4, atol=1e-6)
    # A step of PyTorch's own goes on from the same state.
    give(weights, 9)
    give(exact, 9)
    optimizer.step()
    reference.step()
    for one, other in zip(weights, exact, strict=True):
        torch.testing.assert_close(one.detach().double(), other.detach(), rtol=1e-5, atol=1e-6)


def test_the_norm_is_of_all_optimisers_together() -> None:
    (some, first), (others, second) = made(), made()
    give(some, 3)
    give(others, 5)
    squares = sum(float(p.grad.double().square().sum()) for p in [*some, *others] if p.grad is not None)
    assert float(clipped_step([first, second], 1.0)) == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_the_same_bits_on_any_number_of_threads() -> None:
    weights, _ = made()
    results = []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        own, other = twin(weights, torch.float32)
        give(own, 3)
        norm = clipped_step([other], 0.5)
        mean = [torch.zeros_like(p) for p in own]
        average(mean, own, 0.25, {})
        results.append([norm, *own, *mean])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    weights, optimizer = made()
    give(weights, 3)
    assert weights[0].grad is not None
    weights[0].grad[4, 4] = math.nan
    assert math.isnan(float(clipped_step([optimizer], 1.0)))
    assert not all(bool(p.isfinite().all()) for p in weights)


def test_weights_that_move_are_followed() -> None:
    """`load_state_dict` and `.data =` put other tensors in the place of those that were stepped before."""
    weights, optimizer = made()
    for seed in (2, 3):
        give(weights, seed)
        clipped_step([optimizer], 1.0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    exact, reference = twin(weights, torch.float64)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights[0].data = weights[0].data.clone()
    give(weights, 5)
    give(exact, 5)
    clipped_step([optimizer], 0.0)
    reference.step()
    torch.testing.assert_close(weights[0].detach().double(), exact[0].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages(rng: np.random.Generator, dtype: torch.dtype) -> None:
    sources = [torch.randn(shape).to(dtype) for shape in SHAPES]
    targets, kept = [torch.randn(shape).to(dtype) for shape in SHAPES], {}
    expected = [target.double() for target in targets]
    for rate in (1.0, *rng.random(3)):
        expected = [torch.lerp(one, other.double(), float(rate)) for one, other in zip(expected, sources, strict=True)]
        average(targets, sources, float(rate), kept)
        assert rate < 1 or all(map(torch.equal, targets, sources)), "a copy"
        sources = [source + 1 for source in sources]
    for one, other in zip(targets, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_what_is_not_for_cpp_is_stepped_by_torch() -> None:
    for dtype, kind in ((torch.float64, torch.optim.AdamW), (torch.float32, torch.optim.SGD)):
        weight = torch.ones(3, dtype=dtype, requires_grad=True)
        weight.grad = torch.full((3,), 2.0, dtype=dtype)
        before = weight.detach().clone()
        assert float(clipped_step([kind([weight], 0.1)], 0.0)) == pytest.approx(12**0.5)
        assert not torch.equal(weight.detach(), before)


def test_weights_that_were_stepped_are_refused_by_a_graph_of_before() -> None:
    weights, optimizer = made()
    loss = weights[0].square().sum()
    give(weights, 3)
    clipped_step([optimizer], 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_moments_and_hooks_that_cpp_does_not_know_are_torchs() -> None:
    weights, optimizer = made()
    give(weights, 3)
    clipped_step([optimizer], 0.0)
    moment = optimizer.state[weights[0]]["exp_avg"]
    optimizer.state[weights[0]]["exp_avg"] = moment.t().contiguous().t()
    seen: list[object] = []
    give(weights, 3)
    clipped_step([optimizer], 0.0)
    optimizer.register_step_post_hook(lambda *arguments: seen.append(arguments))
    clipped_step([optimizer], 0.0)
    assert len(seen) == 1


def test_tensors_that_take_the_place_of_others_are_looked_at() -> None:
    """What the C++ code can't write into is not held, so that other tensors may come to lie where it was."""
    memory, buffer = Memory(), torch.zeros(4)
    assert memory.of([buffer.view(torch.int32)]) is None
    arrays = memory.of([buffer])
    assert arrays is not None
    assert arrays[0].ctypes.data == buffer.data_ptr()
