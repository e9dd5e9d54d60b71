"""Learners of several seeds at once: the same bits as each alone, in weights, optimisers, averages and metrics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llmdpd.methods import METHODS
from llmdpd.methods.base import Method
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.methods.llmdpd.stack import Stack, stackable
from llmdpd.ops import native
from llmdpd.training.together import Generators

CPU = torch.device("cpu")
PROMPTLESS = {"network.context.text": False, "network.context.trajectory": False}


def state_of(learner: Any) -> dict[str, torch.Tensor]:
    found = {f"{n}/{key}": t for n, module in learner.modules.items() for key, t in module.state_dict().items()}
    for name, optimizer in learner.optimizers.items():
        for number, fields in optimizer.state_dict()["state"].items():
            found |= {f"{name}/{number}/{key}": value for key, value in fields.items()}
    return {key: value.clone() for key, value in found.items()}


def alone(learner: Any, batches: Any, start: int, generators: Generators) -> list[dict[str, torch.Tensor]]:
    metrics = []
    for iteration, batch in enumerate(batches, start):
        with generators.active():
            metrics.append(learner.update(batch, iteration))
    return metrics


def by_autograd(learner: Any, batches: Any, start: int, generators: Generators) -> list[dict[str, torch.Tensor]]:
    """As `alone`, by what the losses are defined as: a learner alone is a stack of one."""
    metrics = []
    for iteration, batch in enumerate(batches, start):
        with generators.active():
            metrics.append(Method.update(learner, batch, iteration))
    return metrics


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), (key, (found[key] - value).abs().max())


@pytest.mark.parametrize(
    ("name", "count", "threads", "changes"),
    [
        ("llmdpd", 3, 1, {}),
        ("diffusion-ql", 3, 2, {"grad_clip": 0.5, "lr_warmup": 3, "weight_decay": 0.01, "clone": "expert"}),
        ("llmdpd", 2, 3, {"precision": "bf16", "network.context.features": "raw", "reward_scale": 0.5}),
        ("llmdpd", 5, 2, {"network.diffusion_steps": 3, "ema_every": 2, "ema_start": 3, "ema_decay": 0.9}),
        ("diffusion-ql", 1, 2, {"network.hidden_dim": 48, "critic_hidden": 33}),
    ],
)
def test_each_learns_what_it_learns_alone(
    name: str, count: int, threads: int, changes: dict[str, Any], make_method: Any, make_batch: Any
) -> None:
    options = PROMPTLESS | {"network.context.encoder.dropout": 0.0} | changes
    learners = [make_method(name, iterations=12, **options) for _ in range(count)]
    for learner in learners[1:]:
        learner.policy.context.features.load_state_dict(learners[0].policy.context.features.state_dict())
    copies = copy.deepcopy(learners)
    batches = [[make_batch(B=7, P=1) for _ in range(9)] for _ in learners]
    generators, others = ([Generators(CPU) for _ in learners] for _ in range(2))
    for number, pair in enumerate(zip(generators, others, strict=True)):
        for each in pair:
            each.cpu.manual_seed(number)
    # Alone before and after: the stack takes learners as they are, and leaves them whole.
    native.set_threads(threads)
    try:
        for number, learner in enumerate(learners):
            alone(learner, batches[number][:2], 0, generators[number])
        assert stackable(learners)
        stack = Stack(learners)
        together = [
            stack.update([own[iteration] for own in batches], iteration, [each.cpu for each in generators])
            for iteration in range(2, 7)
        ]
        for number, learner in enumerate(learners):
            alone(learner, batches[number][7:], 7, generators[number])
    finally:
        native.set_threads(None)
    for number, learner in enumerate(copies):
        expected = by_autograd(learner, batches[number], 0, others[number])
        for found, metrics in zip(together, expected[2:7], strict=True):
            assert_same(found[number], metrics)
        assert_same(state_of(learners[number]), state_of(learner))
        assert torch.equal(generators[number].cpu.get_state(), others[number].cpu.get_state())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"network.context.trajectory": False},
        PROMPTLESS | {"eta": 0.0},
        PROMPTLESS | {"network.context.kind": "retrieval"},
    ],
)
def test_what_reads_prompts_or_learns_no_critics_takes_turns(changes: dict[str, Any], make_method: Any) -> None:
    assert not stackable([make_method("llmdpd", **changes) for _ in range(2)])


def test_a_method_with_other_losses_takes_turns(make_method: Any) -> None:
    class Other(LLMDPD):
        def critic_loss(self, *arguments: Any) -> Any:
            return super().critic_loss(*arguments)

    own = make_method("llmdpd", **PROMPTLESS)
    assert stackable([own, own])
    own.__class__ = Other
    assert not stackable([own, own])
    assert METHODS["bc"].stacked([make_method("bc"), make_method("bc")]) is None
