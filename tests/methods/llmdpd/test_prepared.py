"""Iterations that are prepared once: the same bits as by autograd, and autograd where nothing can be prepared."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmdpd.methods.base import Method
from llmdpd.methods.llmdpd.cloning import Iteration
from llmdpd.methods.llmdpd.method import LLMDPD
from llmdpd.methods.llmdpd.stack import Stack
from llmdpd.nn.context import Keep, RetrievalConfig
from llmdpd.nn.critic import DoubleQ
from llmdpd.ops import layers, native
from llmdpd.ops.parted import PreparedStep
from llmdpd.utils import ranks, sharding
from llmdpd.utils.sharding import share_of

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")

SIZES = RetrievalConfig(width=12, heads=2)
DEFAULT = {"eta": 0.0, "network.context.kind": "retrieval", "network.context.retrieval": SIZES}
PROMPTLESS = {"network.context.text": False, "network.context.trajectory": False}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    native.set_threads(None)


@pytest.fixture
def pair(make_method: Any) -> Callable[..., list[LLMDPD]]:
    """A learner and its copy, by changes of the configuration."""

    def make(**changes: Any) -> list[LLMDPD]:
        learner = make_method("llmdpd", iterations=12, **DEFAULT | changes)
        return [learner, copy.deepcopy(learner)]

    return make


@pytest.fixture
def runs(calls_of: Any) -> list[Any]:
    """The iterations that were prepared and run."""
    found: list[Any] = calls_of(Iteration, "backward")
    return found


@pytest.fixture
def promptless(make_method: Any) -> Callable[..., list[LLMDPD]]:
    """The same of a learner with critics and without prompts."""

    def make(name: str = "llmdpd", **changes: Any) -> list[LLMDPD]:
        learner = make_method(name, iterations=12, **PROMPTLESS | changes)
        return [learner, copy.deepcopy(learner)]

    return make


def long(make_batch: Any, **sizes: int) -> Any:
    """A batch with a demonstration that is long enough for the C++ code."""
    while (batch := make_batch(**sizes)).tokens.mask.shape[1] < layers.FEW_ROWS:
        pass
    return batch


def some(make_batch: Any, count: int, keep: bool = True) -> list[Any]:
    """Batches of several numbers of prompts, under some of which text or demonstration are left out."""
    batches = [make_batch(B=12, P=1 + number % 3) for number in range(count)]
    return [
        dataclasses.replace(
            batch,
            keep=Keep(*(torch.randint(2, (len(batch.text), 1)).float() for _ in range(2))) if keep else Keep(),
        )
        for batch in batches
    ]


def state_of(learner: Any) -> dict[str, torch.Tensor]:
    found = {f"{n}/{key}": t for n, module in learner.modules.items() for key, t in module.state_dict().items()}
    for name, optimizer in learner.optimizers.items():
        for number, fields in optimizer.state_dict()["state"].items():
            found |= {f"{name}/{number}/{key}": value for key, value in fields.items()}
    return found


def check(learners: list[LLMDPD], batches: list[Any], start: int = 0) -> None:
    """The first learner's iterations are, to the bit, what autograd makes of the second's."""
    for iteration, batch in enumerate(batches, start):
        found = []
        for update in (learners[0].update, lambda *given: Method.update(learners[1], *given)):
            torch.manual_seed(iteration)
            found.append((update(batch, iteration), torch.get_rng_state()))
        (metrics, generator), (expected, expected_generator) = found
        assert list(metrics) == list(expected)
        assert all(torch.equal(metrics[name], value) for name, value in expected.items()), (metrics, expected)
        assert torch.equal(generator, expected_generator)
        learned = ([*of.policy.parameters(), *of.critic.parameters()] for of in learners)
        for one, other in zip(*learned, strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
    states = [state_of(learner) for learner in learners]
    assert list(states[0]) == list(states[1])
    for key, value in states[1].items():
        assert torch.equal(states[0][key], value), key


@pytest.mark.parametrize(
    ("threads", "changes"),
    [
        (1, {}),
        (2, {"precision": "bf16", "grad_clip": 0.5, "lr_warmup": 3, "weight_decay": 0.01, "clone": "expert"}),
        (5, {"network.diffusion_steps": 3, "ema_every": 2, "ema_start": 3, "ema_decay": 0.9}),
        (2, {"network.context.text": False, "network.context.features": "raw"}),
        (5, {"network.context.retrieval": dataclasses.replace(SIZES, timestep_embedding=False, lookahead=(0, 1, 5))}),
        (2, {"network.context.retrieval": dataclasses.replace(SIZES, attention=False)}),
        (2, {"network.context.retrieval": dataclasses.replace(SIZES, waypoints=False, layers=1)}),
        (1, {"network.context.retrieval": dataclasses.replace(SIZES, geometric_similarity=False, heads=3)}),
    ],
)
def test_every_bit_is_that_of_autograd(
    threads: int, changes: dict[str, Any], pair: Any, make_batch: Any, runs: list[Any]
) -> None:
    learners, batches = pair(**changes), some(make_batch, 6) + some(make_batch, 3, keep=False)
    native.set_threads(threads)
    check(learners, batches)
    few = sum(batch.tokens.mask.shape[1] < layers.FEW_ROWS for batch in batches)
    assert len(runs) == len(batches) - few > 4


def replaced(parameter: nn.Parameter) -> nn.Parameter:
    parameter.data = parameter.data.clone()
    return parameter


CHANGES: dict[str, Callable[[Any], object]] = {
    "the optimiser's state is loaded": lambda of: of.optimizers["policy_optimizer"].load_state_dict(
        copy.deepcopy(of.optimizers["policy_optimizer"].state_dict())
    ),
    "a weight lies elsewhere": lambda of: replaced(of.policy.context.query.weight),
    "the average lies elsewhere": lambda of: [replaced(p) for p in of.ema_policy.parameters()],
    "the average is written": lambda of: [p.detach().mul_(0.5) for p in of.ema_policy.parameters()],
    "another layer": lambda of: of.policy.context.register_module("query", copy.deepcopy(of.policy.context.query)),
    "a frozen weight": lambda of: of.policy.context.nothing.requires_grad_(False),
    "other statistics": lambda of: of.policy.context.features.fit(torch.randn(30, 4)),
    "other settings": lambda of: of.optimizers["policy_optimizer"].param_groups[0].update(betas=(0.5, 0.9), eps=0.1),
    "amsgrad": lambda of: of.optimizers["policy_optimizer"].param_groups[0].update(amsgrad=True),
    "the gradients are gone": lambda of: of.policy.zero_grad(),
    "other threads": lambda of: native.set_threads(3),
    "another epsilon of a norm": lambda of: setattr(of.policy.context.norm, "eps", 0.1),
    "a policy that acts": lambda of: of.policy.eval(),
    "another configuration": lambda of: setattr(of, "config", dataclasses.replace(of.config, grad_clip=0.01)),
    "another optimiser": lambda of: of.optimizers.update(
        policy_optimizer=torch.optim.AdamW(
            [*of.policy.parameters()], torch.tensor(1e-3, dtype=torch.float64), fused=True
        )
    ),
}


OF_CONTEXTS = ("a weight lies elsewhere", "another layer", "a frozen weight", "another epsilon of a norm")


def check_around(change: str, learners: Any, batches: Any) -> None:
    """Iterations before a change and after it."""
    check(learners, batches[:3])
    if change == "amsgrad":
        for learner in learners:
            for fields in learner.optimizers["policy_optimizer"].state.values():
                fields["max_exp_avg_sq"] = fields["exp_avg_sq"].clone()
    for learner in learners:
        torch.manual_seed(9)
        CHANGES[change](learner)
    check(learners, batches[3:], 3)


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_changes_meanwhile_is_seen(change: str, pair: Any, make_batch: Any) -> None:
    learners, batches = pair(), some(make_batch, 6)
    check_around(change, learners, batches)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in OF_CONTEXTS])
def test_what_changes_meanwhile_is_seen_without_prompts(change: str, promptless: Any, make_batch: Any) -> None:
    learners, batches = promptless(), [make_batch(B=12 + 4 * (number > 4)) for number in range(6)]
    check_around(change, learners, batches)


@pytest.mark.parametrize(
    ("name", "threads", "changes"),
    [
        ("llmdpd", 1, {}),
        ("diffusion-ql", 2, {"grad_clip": 0.5, "lr_warmup": 3, "weight_decay": 0.01, "clone": "expert"}),
        ("llmdpd", 5, {"precision": "bf16", "ema_every": 2, "ema_start": 3, "reward_scale": 0.5}),
    ],
)
def test_every_bit_is_that_of_autograd_without_prompts(
    name: str, threads: int, changes: dict[str, Any], promptless: Any, make_batch: Any, calls_of: Any
) -> None:
    ran = calls_of(Stack, "update")
    native.set_threads(threads)
    check(promptless(name, **changes), [make_batch(B=7 if number < 5 else 9, P=1) for number in range(9)])
    assert len(ran) == 9


def test_what_could_not_be_prepared_is_tried_again_later(promptless: Any, make_batch: Any, calls_of: Any) -> None:
    ran, (learner, _), batch = calls_of(Stack, "update"), promptless(), make_batch(B=6)
    hook = learner.critic.register_forward_hook(lambda *_: None)
    learner.update(batch, 0)
    hook.remove()
    for iteration in range(1, 103):
        learner.update(batch, iteration)
    assert len(ran) == 2


def hooked(learner: LLMDPD, by: str) -> list[Any]:
    """Calls of a hook of this kind."""
    called: list[Any] = []
    weight = learner.policy.net.linears[0].weight
    if by == "gradient":
        weight.register_hook(called.append)
    elif by == "accumulated":
        weight.register_post_accumulate_grad_hook(called.append)
    elif by == "module":
        learner.policy.net.register_forward_hook(lambda *_: called.append(0))
    else:
        learner.optimizers["policy_optimizer"].register_step_post_hook(lambda *_: called.append(0))
    return called


@pytest.mark.parametrize("by", ["gradient", "accumulated", "module", "step"])
@pytest.mark.parametrize("before", [0, 2])
def test_hooks_are_called(by: str, before: int, pair: Any, make_batch: Any, runs: list[Any]) -> None:
    learner, batch = pair()[0], long(make_batch, B=12, P=3)
    for iteration in range(before):
        learner.update(batch, iteration)
    called = hooked(learner, by)
    learner.update(batch, before)
    assert called
    assert len(runs) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"eta": 1.0},
        {"network.context.kind": "pooled"},
        {"network.context.trajectory": False},
        {"network.context.encoder.dropout": 0.1},
        {"network.diffusion_steps": 13},
    ],
)
def test_other_learners_go_their_own_way(changes: dict[str, Any], pair: Any, make_batch: Any, runs: list[Any]) -> None:
    learners, batch = pair(**changes), make_batch(B=12, P=3)
    check(learners, [batch, batch])
    assert not runs


@pytest.mark.parametrize(("count", "prompts", "memory"), [(2, 4, True), (2, 1, True), (2, 4, False)])
def test_processes_that_share_batches_learn_the_same_bits(
    count: int,
    prompts: int,
    memory: bool,
    pair: Any,
    make_batch: Any,
    runs: list[Any],
    calls_of: Any,
    in_processes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learners, batches = pair(grad_clip=0.5), [make_batch(B=48, P=prompts) for _ in range(4)]
    steps = calls_of(PreparedStep, "run")

    def refused(*_: Any) -> None:
        raise OSError("no space left")

    if not memory:
        monkeypatch.setattr("os.memfd_create", refused)
    updates: list[Any] = [LLMDPD.update, Method.update]

    def work(number: int) -> None:
        with ranks.joined():
            share = share_of(number, count, 48, prompts)
            for name, learner, update in zip("ab", learners, updates, strict=True):
                torch.manual_seed(5)
                with sharding.active(share):
                    metrics = [update(learner, batch.part(share), k) for k, batch in enumerate(batches)]
                if number == 0:
                    found = {**state_of(learner), **{f"{k}/{m}": of[m] for k, of in enumerate(metrics) for m in of}}
                    torch.save(found, tmp_path / name)
            few = sum(batch.tokens.mask.shape[1] < layers.FEW_ROWS for batch in batches)
            assert len(runs) == len(batches) - few
            # From the second step on, when weights lie in memory that the processes share.
            assert len(steps) in ((len(runs) - 1, len(runs)) if memory else (0,))
            assert not memory or all(p.grad is None for learner in learners for p in learner.policy.parameters())

    assert in_processes(count, work) == [0] * count
    found, expected = (torch.load(tmp_path / name) for name in "ab")
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_loss_of_ones_own_is_called(make_method: Any, make_batch: Any, runs: list[Any]) -> None:
    class Other(LLMDPD):
        def actor_loss(self, *arguments: Any) -> Any:
            asked.append(arguments)
            return super().actor_loss(*arguments)

    asked: list[Any] = []
    learner = make_method("llmdpd", **DEFAULT)
    learner.__class__ = Other
    learner.update(make_batch(B=12, P=3), 0)
    assert asked
    assert not runs


@pytest.mark.parametrize("name", ["actor_loss", "track", "_lerp"])
def test_what_is_replaced_in_the_class_is_called(
    make_method: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    learner, asked, own = make_method("llmdpd", **PROMPTLESS), list[Any](), getattr(LLMDPD, name)

    def other(self: Any, *arguments: Any) -> Any:
        asked.append(arguments)
        return own(self, *arguments)

    learner.update(make_batch(B=12), 0)
    assert not asked
    monkeypatch.setattr(LLMDPD, name, other)
    learner.update(make_batch(B=12), 1)
    assert asked


def test_critics_of_another_class_are_asked(make_method: Any, make_batch: Any) -> None:
    class Other(DoubleQ):
        def minimum(self, *arguments: Any) -> Any:
            asked.append(arguments)
            return super().minimum(*arguments)

    asked: list[Any] = []
    learner = make_method("llmdpd", **PROMPTLESS)
    learner.target_critic.__class__ = Other
    learner.update(make_batch(B=12), 0)
    assert asked


def test_a_few_shapes_are_kept_and_go_with_the_learner(pair: Any, make_batch: Any, runs: list[Any]) -> None:
    learner, batches = pair()[0], [long(make_batch, B=12 * number, P=3) for number in range(1, 7)]
    tapes = set[Any]()
    for batch in [*batches, *batches]:
        learner.update(batch, 0)
        tapes.add(weakref.ref(runs[-1][0]))
        del runs[:]
    assert sum(tape() is not None for tape in tapes) <= 4
    gone = weakref.ref(learner)
    del learner
    assert gone() is None
    assert not any(tape() is not None for tape in tapes)
