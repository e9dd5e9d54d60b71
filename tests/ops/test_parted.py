"""Steps and averages by parts: those of one process down the sum of all gradients."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.ops import native, optimizer
from llmdpd.ops.parted import average, clipped_step
from llmdpd.utils import ranks, sharding
from llmdpd.utils.sharding import share_of

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")

SHAPES = [(300, 57), (5,), (1, 1), (16_385,), (0, 3), (33, 7)]
AdamW = torch.optim.AdamW


def made() -> tuple[list[Tensor], list[AdamW]]:
    """Weights of two optimisers, the first one with two groups."""
    torch.manual_seed(4)
    weights = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    rate = torch.tensor(3e-3, dtype=torch.float64)
    groups: list[dict[str, Any]] = [
        {"params": weights[:2]},
        {"params": weights[2:4], "weight_decay": 0.5, "betas": (0.8, 0.9)},
    ]
    return weights, [AdamW(groups, rate, weight_decay=0.1, fused=True), AdamW(weights[4:], rate.clone(), fused=True)]


def gradients(iteration: int, number: int) -> list[Tensor | None]:
    """Those of a process; a weight has none now and then."""
    generator = torch.Generator().manual_seed(100 * iteration + number)
    found: list[Tensor | None] = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if iteration % 3 == 1:
        found[1] = None
    return found


def give(weights: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.grad = value


def whole(iteration: int, count: int) -> list[Tensor | None]:
    parts = [gradients(iteration, number) for number in range(count)]
    return [None if of[0] is None else sum(of) for of in zip(*parts, strict=True)]


def state(weights: Sequence[Tensor], optimizers: Sequence[AdamW], mean: Sequence[Tensor]) -> list[Tensor]:
    moments = [m for each in optimizers for of in each.state_dict()["state"].values() for m in of.values()]
    return [part.detach().clone() for part in (*weights, *mean, *moments)]


def alone(count: int, iterations: range, limit: float) -> list[Tensor]:
    weights, optimizers = made()
    mean: list[Tensor] = [weight.detach() + 1 for weight in weights]
    kept: dict[str, Any] = {}
    for iteration in iterations:
        give(weights, whole(iteration, count))
        norm = optimizer.clipped_step(optimizers, limit)
        optimizer.average(mean, weights, 0.3, kept)
    return [*state(weights, optimizers, mean), norm]


def trained(weights: list[Tensor], optimizers: list[AdamW], mean: list[Tensor], limit: float = 0.5) -> list[Tensor]:
    """Five iterations of this process."""
    kept: dict[str, Any] = {}
    for iteration in range(5):
        give(weights, gradients(iteration, ranks.rank()))
        norm = clipped_step(optimizers, limit)
        average(mean, weights, 0.3, kept)
    return [*state(weights, optimizers, mean), norm]


@pytest.fixture
def shared(in_processes: Any) -> Callable[..., None]:
    """Calls a function in each of some processes that share a batch."""

    def call(count: int, work: Callable[[], None]) -> None:
        def own(number: int) -> None:
            with ranks.joined(), sharding.active(share_of(number, count, 12, 1)):
                work()

        assert in_processes(count, own) == [0] * count

    return call


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("count", "limit"), [(2, 0.5), (3, 0.0)])
def test_parts_are_the_step_of_one(count: int, limit: float, shared: Any, tmp_path: Path) -> None:
    def work() -> None:
        weights, optimizers = made()
        mean = [weight.detach() + 1 for weight in weights]
        before = list(weights)
        found = trained(weights, optimizers, mean, limit)
        assert all(map(ranks.shares_memory, ([tensor] for tensor in (*weights, *mean) if tensor.numel())))
        assert all(weight.grad is None for weight in weights), "a part of a gradient is none"
        assert all(one is other for one, other in zip(weights, before, strict=True))
        torch.save(found, tmp_path / f"{ranks.rank()}.pt")

    shared(count, work)
    first = [torch.load(tmp_path / f"{number}.pt") for number in range(count)]
    assert_close(first[0], alone(count, range(5), limit))
    assert all(torch.equal(one, other) for found in first[1:] for one, other in zip(found, first[0], strict=True))
    shared(count, work)
    assert all(map(torch.equal, torch.load(tmp_path / "0.pt"), first[0])), "the same bits again"


def test_weights_that_are_shared_are_not_stepped_by_one_alone(in_processes: Any) -> None:
    """Neither while the processes share no batch, nor when they have parted: each would step the same memory."""

    def own(number: int) -> None:
        weights, optimizers = made()
        mean = [weight.detach() + 1 for weight in weights]
        with ranks.joined():
            with sharding.active(share_of(number, 2, 12, 1)):
                trained(weights, optimizers, mean, 0.5)
            refused(weights, optimizers, mean)
        refused(weights, optimizers, mean)
        others, own_optimizers = made()
        gradients(others)
        clipped_step(own_optimizers, 0.5)

    def refused(weights: Any, optimizers: Any, mean: Any) -> None:
        gradients(weights)
        with pytest.raises(InputError, match="can't be stepped by one alone"):
            clipped_step(optimizers, 0.5)
        with pytest.raises(InputError, match="can't be stepped by one alone"):
            average(mean, weights, 0.3, {})

    def gradients(weights: Any) -> None:
        for weight in weights:
            weight.grad = torch.ones_like(weight)

    assert in_processes(2, own) == [0, 0]


@pytest.mark.parametrize("fault", ["memory", "optimiser"])
def test_where_there_are_no_parts_all_take_whole_steps(fault: str, shared: Any, monkeypatch: Any) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no space left")

    def work() -> None:
        weights, optimizers = made()
        if fault == "memory":
            monkeypatch.setattr(os, "memfd_create", refused)
        else:
            optimizers[1].register_step_pre_hook(lambda *_: None)
        mean = [weight.detach() + 1 for weight in weights]
        assert_close(trained(weights, optimizers, mean), alone(2, range(5), 0.5))
        assert not ranks.shares_memory(weights)

    shared(2, work)


def test_optimisers_that_are_loaded_go_on(shared: Any) -> None:
    def work() -> None:
        weights, optimizers = made()
        kept: dict[str, Any] = {}
        mean = [weight.detach() + 1 for weight in weights]
        for iteration in range(5):
            give(weights, gradients(iteration, ranks.rank()))
            clipped_step(optimizers, 0.5)
            average(mean, weights, 0.3, kept)
            for each in optimizers:
                each.load_state_dict(copy.deepcopy(each.state_dict()))
            weights[0].data = weights[0].data.clone()
            mean[3].data = mean[3].data.clone()
        assert_close(state(weights, optimizers, mean), alone(2, range(5), 0.5)[:-1])

    shared(2, work)


def test_optimisers_take_steps_together_and_alone(shared: Any) -> None:
    def work() -> None:
        weights, (first, second) = made()
        exact, (one, other) = made()
        both, same_both = [first, second], [one, other]
        turns = ((0, both, same_both), (2, [second], [other]), (3, [first], [one]), (5, both, same_both))
        for iteration, some, same in turns:
            for _ in range(2):
                give(weights, gradients(iteration, ranks.rank()))
                give(exact, whole(iteration, 2))
                assert_close([clipped_step(some, 0.0)], [optimizer.clipped_step(same, 0.0)])
        assert_close(weights, [weight.detach() for weight in exact])

    shared(2, work)


@pytest.mark.parametrize("written", ["weight", "average"])
def test_a_write_beside_is_refused(written: str, shared: Any) -> None:
    def work() -> None:
        weights, optimizers = made()
        mean = [weight.detach() + 1 for weight in weights]
        kept: dict[str, Any] = {}

        def iterate() -> None:
            give(weights, gradients(0, ranks.rank()))
            clipped_step(optimizers, 0.5)
            average(mean, weights, 0.3, kept)

        iterate()
        iterate()
        with torch.no_grad():
            (weights if written == "weight" else mean)[3].mul_(0.5)
        with pytest.raises(InputError, match="that processes share were written in place"):
            iterate()

    shared(2, work)


@pytest.mark.parametrize("fault", ["a hook", "another type"])
def test_what_is_shared_is_not_stepped_whole(fault: str, shared: Any) -> None:
    def work() -> None:
        weights, optimizers = made()
        mean = [weight.detach() + 1 for weight in weights]
        trained(weights, optimizers, mean)
        if fault == "a hook":
            optimizers[1].register_step_post_hook(lambda *_: None)
        give(weights, gradients(5, ranks.rank()))
        doubles = [weight.detach().double() for weight in weights]
        step: Callable[[], Any] = (
            partial(clipped_step, optimizers, 0.5) if fault == "a hook" else partial(average, mean, doubles, 0.3, {})
        )
        with pytest.raises(InputError, match="can't be stepped by parts any more"):
            step()

    shared(2, work)
