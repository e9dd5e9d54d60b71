"""Iterations from graphs against plain ones, by a stand-in for CUDA's graphs that does the recorded work again."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.methods.base import Learner
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.nn.context import ContextConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig, make_tokens
from llmdpd.training import cuda_graph
from llmdpd.training.cuda_graph import GraphedUpdate, describe_cuda_graph, with_cuda_graph
from llmdpd.utils.capture import CaptureError

S, A, D = 4, 2, 6
ENCODER = TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8, dropout=0.1)


def state_of(agent: Any) -> list[Tensor]:
    tensors = [t for module in agent.modules.values() for t in module.state_dict().values()]
    for optimizer in agent.optimizers.values():
        tensors += [t for fields in optimizer.state.values() for t in fields.values()]
    return tensors


class Replays:
    """Captures by doing the work once and undoing it; a replay does it again and writes where the capture wrote."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.reason: str | None = None
        self.refusal: str | None = None
        self.warmed = self.captures = self.replays = 0

    def warm_up(self, work: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], str | None]:
        self.warmed += 1
        return work(), self.reason

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.refusal is not None:
            raise CaptureError(self.refusal)
        self.captures += 1
        generator, state = torch.get_rng_state(), state_of(self.agent)
        before = [t.clone() for t in state]
        output = torch.full_like(work(), float("nan"))
        with torch.no_grad():
            for tensor, old in zip(state, before, strict=True):
                if not torch.equal(tensor, old):
                    tensor.copy_(old)
        torch.set_rng_state(generator)

        def replay() -> None:
            self.replays += 1
            output.copy_(work())

        return replay, output


class Sums:
    """Learns nothing: its metrics are the sums of all that it is given."""

    def __init__(self) -> None:
        self.modules = {"net": nn.Linear(1, 1)}
        self.optimizers = {"sgd": torch.optim.SGD(self.modules["net"].parameters(), 0.1)}
        self.calls: list[str] = []

    def update(self, batch: PromptedBatch, iteration: int) -> dict[str, Tensor]:
        raise AssertionError("the parts are called one by one")

    def schedule(self, iteration: int) -> None:
        self.calls.append(f"schedule {iteration}")

    def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
        self.calls.append("learn")
        return {name: tensor.double().sum().float() for name, tensor in batch.tensors().items()}

    def follow(self, iteration: int) -> None:
        self.calls.append(f"follow {iteration}")


MakeBatch = Callable[..., PromptedBatch]


@pytest.fixture
def make_batch(rng: np.random.Generator) -> MakeBatch:
    """B transitions under P prompts of `lengths` steps."""

    def make(lengths: tuple[int, ...] = (8,), B: int = 6, expert: bool = True, text: bool = True) -> PromptedBatch:
        P = len(lengths)
        pairs = [
            (rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)) for n in lengths
        ]
        return PromptedBatch(
            observations=torch.randn(B, S),
            actions=torch.rand(B, A) * 2 - 1,
            rewards=torch.randn(B),
            next_observations=torch.randn(B, S),
            terminals=(torch.rand(B) < 0.3).float(),
            expert_actions=torch.rand(B, A) * 2 - 1 if expert else None,
            timesteps=torch.from_numpy(rng.integers(0, 50, B)),
            text=torch.randn(P, D) if text else None,
            tokens=make_tokens(pairs, ENCODER),
        )

    return make


def make_agent(**changes: Any) -> LLMDPD:
    context = ContextConfig(text_dim=5, text_hidden=16, trajectory_dim=3, text_dropout=0.2, encoder=ENCODER)
    network = DiffusionPolicy(Spaces(S, A, D), DiffusionNetworkConfig(hidden_dim=16, time_dim=8, context=context))
    settings: dict[str, Any] = {"critic_hidden": 16, "lr_warmup": 5, "lr_final": 0.1, "ema_every": 2, "ema_start": 6}
    return LLMDPD(network, LLMDPDConfig(**settings | changes), 30)


def same_agent(agent: LLMDPD) -> LLMDPD:
    """Another with the same parameters; a deep copy's optimisers would hold the first one's."""
    other = LLMDPD(copy.deepcopy(agent.policy), agent.config, agent.iterations)
    for name, module in agent.modules.items():
        other.modules[name].load_state_dict(module.state_dict())
    return other


def graphed(agent: Any, **options: Any) -> tuple[GraphedUpdate, Replays]:
    backend = Replays(agent)
    return GraphedUpdate(agent, backend, **options), backend


def run(agent: Any, batches: list[PromptedBatch]) -> list[dict[str, Tensor]]:
    torch.manual_seed(17)
    return [agent.update(batch, iteration) for iteration, batch in enumerate(batches)]


def assert_the_same_run(plain: LLMDPD, other: Any, batches: list[PromptedBatch]) -> None:
    metrics = run(plain, batches)
    random = torch.get_rng_state()
    for one, two in zip(metrics, run(other, batches), strict=True):
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(one, two) for one, two in zip(state_of(plain), state_of(other), strict=True))


# Equal to plain iterations


@pytest.mark.parametrize("changes", [{}, {"eta": 0.0}, {"grad_clip": 0.5, "critic_sees_prompts": True}])
def test_a_run_with_graphs_is_the_run_without_bit_for_bit(
    rng: np.random.Generator, make_batch: MakeBatch, changes: dict[str, Any]
) -> None:
    kinds = [(8,), (8, 8), (8, 5, 3)]
    batches = [make_batch(kinds[number]) for number in rng.integers(0, 3, 24)]
    agent = make_agent(**changes)
    other, backend = graphed(same_agent(agent), warm_up=2)
    assert_the_same_run(agent, other, batches)
    assert backend.captures == other.captured >= 2
    assert backend.replays >= 24 - 3 * 2 - 2
    assert backend.warmed + backend.replays == 24, "every iteration is done once, by one or the other"


def test_the_first_iterations_of_a_kind_are_eager_and_count(make_batch: MakeBatch) -> None:
    agent = Sums()
    other, backend = graphed(agent, warm_up=3)
    run(other, [make_batch() for _ in range(5)])
    assert (backend.warmed, backend.captures, backend.replays) == (3, 1, 2)
    assert [call for call in agent.calls if call != "learn"] == [
        f"{w} {i}" for i in range(5) for w in ("schedule", "follow")
    ]
    run(other, [make_batch((8, 8)) for _ in range(4)])
    assert (backend.warmed, backend.captures, backend.replays) == (6, 2, 3)


# Inputs and outputs


def test_every_part_of_a_batch_reaches_the_replay(make_batch: MakeBatch) -> None:
    other, backend = graphed(Sums(), warm_up=1)
    kinds = [(8,), (8, 8), (8, 5)]
    for number in range(18):
        batch = make_batch(kinds[number % 3])
        metrics = other.update(batch, number)
        assert set(metrics) == set(batch.tensors()) >= {"observations", "tokens.states", "tokens.mask", "text"}
        for name, tensor in batch.tensors().items():
            assert float(metrics[name]) == float(tensor.double().sum().float()), name
    assert backend.replays == 15


def test_one_changed_part_is_seen(make_batch: MakeBatch) -> None:
    """A part at a time, so that no buffer can be one that is copied only when others change."""
    other, backend = graphed(Sums(), warm_up=1)
    batch = make_batch((8, 8))
    before = run(other, [batch, batch, batch])[-1]
    for name, tensor in batch.tensors().items():
        changed = tensor + 1 if tensor.dtype != torch.bool else ~tensor
        after = other.update(batch.with_tensors({**batch.tensors(), name: changed}), 0)
        assert {key for key in after if not torch.equal(after[key], before[key])} == {name}
    assert backend.captures == 1


def test_each_kind_of_batch_has_a_graph_of_its_own(make_batch: MakeBatch) -> None:
    other, backend = graphed(Sums(), warm_up=1, limit=100)
    batch = make_batch()
    kinds = [{"B": 8}, {"lengths": (7,)}, {"lengths": (8, 8)}, {"expert": False}, {"text": False}]
    assert batch.tokens is not None
    changes = [
        {"tokens": None},
        {"tokens": dataclasses.replace(batch.tokens, padded=True)},
        {"observations": batch.observations.double()},
    ]
    variants = [batch, *(make_batch(**kind) for kind in kinds), *(dataclasses.replace(batch, **c) for c in changes)]
    for number, variant in enumerate(variants):
        for _ in range(3):
            other.update(variant, 0)
        assert backend.captures == number + 1
    assert backend.warmed == backend.captures == 9


def test_beyond_the_limit_kinds_stay_eager(make_batch: MakeBatch, caplog: pytest.LogCaptureFixture) -> None:
    agent = make_agent()
    batches = [make_batch((length,)) for length in (8, 7, 6, 5)] * 4
    other, backend = graphed(same_agent(agent), warm_up=1, limit=2)
    with caplog.at_level(logging.INFO, "llmdpd"):
        assert_the_same_run(agent, other, batches)
    assert backend.captures == 2
    assert [r.message for r in caplog.records] == ["more than 2 kinds of batch: the others run without a CUDA graph"]


def test_metrics_outlive_the_next_replay_and_strided_parts_are_read(make_batch: MakeBatch) -> None:
    other, _ = graphed(Sums(), warm_up=1)
    batches = [dataclasses.replace(make_batch(), observations=torch.randn(6, 2 * S)[:, ::2]) for _ in range(6)]
    for batch, metrics in zip(batches, run(other, batches), strict=True):
        for name in ("rewards", "observations"):
            assert float(metrics[name]) == float(getattr(batch, name).double().sum().float())


# What depends on addresses and versions


def test_a_loaded_state_drops_the_graphs(make_batch: MakeBatch) -> None:
    """`load_state_dict` of an optimiser puts other tensors in place of those whose addresses a graph holds."""
    agent = make_agent()
    other, backend = graphed(same_agent(agent), warm_up=1)
    batches = [make_batch() for _ in range(8)]
    run(agent, batches[:4])
    run(other, batches[:4])
    for one in (agent, other):
        for optimizer in one.optimizers.values():
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.captured == 0
    assert_the_same_run(agent, other, batches[4:])
    assert backend.captures == 2


def test_a_replay_raises_the_versions_of_what_it_writes(make_batch: MakeBatch) -> None:
    """A real replay goes round autograd; whoever keeps something by a tensor's version must still see it."""

    class Writer(Sums):
        def __init__(self) -> None:
            super().__init__()
            self.modules["held"] = nn.Linear(1, 1)

        def learn(self, batch: PromptedBatch) -> dict[str, Tensor]:
            with torch.no_grad():
                self.modules["net"].weight.add_(1)
            return super().learn(batch)

    class Silent(Replays):
        def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            return lambda: None, work()

    agent = Writer()
    other = GraphedUpdate(agent, Silent(agent), warm_up=0)
    other.update(make_batch(), 0)
    before = agent.modules["net"].weight._version, agent.modules["held"].weight._version
    other.update(make_batch(), 1)
    assert agent.modules["net"].weight._version > before[0]
    assert agent.modules["held"].weight._version == before[1]


# Where a capture can't be


@pytest.mark.parametrize("broken", [CaptureError("broken"), KeyboardInterrupt()])
def test_after_a_capture_that_broke_off_no_earlier_graph_is_replayed(
    make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, broken: BaseException
) -> None:
    other, backend = graphed(make_agent(), required=True, warm_up=1)

    def breaks(_: object) -> None:
        raise broken

    for number in range(2):
        other.update(make_batch((8,)), number)
    assert (other.captured, backend.replays) == (1, 1)
    other.update(make_batch((8, 8)), 2)
    monkeypatch.setattr(backend, "capture", breaks)
    with pytest.raises(InputError if isinstance(broken, CaptureError) else KeyboardInterrupt):
        other.update(make_batch((8, 8)), 3)
    assert other.captured == 0


@pytest.mark.parametrize("which", ["reason", "refusal"])
def test_what_cannot_be_captured_runs_without_for_a_reason_logged_once_or_is_refused(
    make_batch: MakeBatch, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    agent = make_agent()
    other, backend = graphed(same_agent(agent), warm_up=2)
    setattr(backend, which, "it waits for the moon")
    with caplog.at_level(logging.INFO, "llmdpd"):
        assert_the_same_run(agent, other, [make_batch((8,) * (1 + i % 2)) for i in range(12)])
    assert backend.replays == 0
    assert [r.message for r in caplog.records] == ["training runs without a CUDA graph: it waits for the moon"]
    assert describe_cuda_graph(other) == "not used: it waits for the moon"
    required, backend = graphed(make_agent(), required=True, warm_up=2)
    setattr(backend, which, "it waits for the moon")
    with pytest.raises(InputError) as error:
        run(required, [make_batch() for _ in range(12)])
    assert (error.value.field, error.value.found) == ("training.cuda_graph", "it waits for the moon")


def test_reasons_of_the_first_iterations_do_not_count(make_batch: MakeBatch) -> None:
    """What is made once and kept may wait for the device while it is made."""
    other, backend = graphed(Sums(), required=True, warm_up=3)
    backend.reason = "compiling"
    for number in range(6):
        other.update(make_batch(), number)
        backend.reason = "compiling" if number == 0 else None
    assert other.captured == 1


# The setting


def test_the_mode_and_the_device_decide() -> None:
    agent = make_agent()
    assert with_cuda_graph(agent, "auto", torch.device("cpu")) is agent
    assert with_cuda_graph(agent, "off", torch.device("cuda")) is agent
    assert describe_cuda_graph(agent) == "not used"
    other, _ = graphed(agent)
    assert describe_cuda_graph(other) == "captured 0"
    assert (other.modules, other.optimizers) == (agent.modules, agent.optimizers)


def test_a_method_that_no_graph_can_hold() -> None:
    agent = make_agent()
    agent.same_work = False  # type: ignore[misc]
    assert with_cuda_graph(agent, "auto", torch.device("cuda")) is agent
    with pytest.raises(InputError, match="no CUDA graph") as error:
        with_cuda_graph(agent, "on", torch.device("cuda"))
    assert (error.value.field, "LLMDPD" in str(error.value.found)) == ("training.cuda_graph", True)


class Stack:
    """Of several `Sums`: their metrics side by side."""

    def __init__(self, methods: list[Any]) -> None:
        self.methods = methods
        self.given: list[Any] = []

    def with_generators(self, generators: Any) -> Any:
        self.given.append(list(generators))
        whole = Sums()
        whole.learn = lambda batch: {"sum": batch.rewards.sum(1)}  # type: ignore[method-assign]
        return whole


def test_learners_at_once_are_replayed_from_one_graph(make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[Any] = []

    class Backend(Replays):
        def __init__(self, device: torch.device, generators: Any = ()) -> None:
            super().__init__(Sums())
            self.device, self.generators = device, generators
            backends.append(self)

    @Learner.register
    class Stackable(Sums):
        stacked = classmethod(lambda cls, methods: Stack(methods))

    monkeypatch.setattr(cuda_graph, "CudaGraphs", Backend)
    device = torch.device("cuda")
    learners = [GraphedUpdate(Stackable(), Backend(device), required=True, warm_up=0) for _ in range(2)]
    for learner in learners:
        learner.update(make_batch(), 0)
        assert learner.captured == 1
    stack = cuda_graph.stacked(learners)
    assert [learner.captured for learner in learners] == [0, 0], "their weights lie elsewhere now"
    assert stack is not None
    generators = [torch.Generator() for _ in learners]
    for iteration in range(6):
        batches = [make_batch(), make_batch()]
        found = stack.update(batches, iteration, generators)
        assert [float(one["sum"]) for one in found] == [float(batch.rewards.sum()) for batch in batches]
    assert backends[-1].generators == generators
    assert backends[-1].captures == 1
    assert backends[-1].replays > 0
    assert cuda_graph.stacked([Sums(), Sums()]) is None
