"""Acting from CUDA graphs against acting without, by a stand-in that records PyTorch's operations and does them again.

As a graph it knows nothing but the tensors that these operations had: what else a call depends on, it repeats.
"""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import reverse_diffusion
from llmdpd.errors import InputError
from llmdpd.methods import METHODS
from llmdpd.methods.llmdpd import network as network_module
from llmdpd.methods.llmdpd.network import DiffusionPolicy
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.spaces import Spaces
from llmdpd.policy import graphs as module
from llmdpd.policy.folder import text_key
from llmdpd.policy.graphs import ActingGraphs, rounded
from llmdpd.policy.policy import Policy
from llmdpd.utils.capture import CudaGraphs
from tests.methods.conftest import TINY, changed
from tests.policy.conftest import KNOWN, A, MakePolicy, S
from tests.policy.recorded_graphs import (
    BEST,
    CHUNKS,
    FEW,
    SOFTLY,
    Passed,
    Recorder,
    assert_same_episodes,
    by_itself,
    default_policy,
    pair,
    recorded,
)
from tests.recorded_device import Device


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies of the CPU sample as they do on a CUDA device, by PyTorch alone."""
    compute = ActingGraphs._compute

    def passed(self: ActingGraphs, parts: Any, prompts: Any) -> Tensor:
        with Passed():
            return compute(self, parts, prompts)

    monkeypatch.setattr(ActingGraphs, "_compute", passed)
    monkeypatch.setattr(ActingGraphs, "serves", lambda self: True)
    monkeypatch.setattr(DiffusionPolicy, "freeze", lambda *_: None)
    chain = partial(reverse_diffusion, backend="reference")
    monkeypatch.setattr(network_module, "reverse_diffusion", chain)


# The same actions


@pytest.mark.parametrize(
    "options",
    [FEW, FEW | {"acting": BEST}, FEW | {"acting": SOFTLY["max"]}, CHUNKS],
    ids=["one", "best of N", "greatest of N", "chunks"],
)
def test_episodes_with_graphs_are_those_without_bit_for_bit(
    make_policy: MakePolicy, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    plain, other, backend = pair(make_policy(**options))
    shown = [(rng.normal(size=(T, S)), rng.uniform(-1, 1, (T, A))) for T in (20, 20, 5)]
    assert_same_episodes(plain, other, shown, rng)
    assert backend.captures == other.graphs.captured == 2, "a prompt of other steps is pooled all the same"
    assert backend.warmed == 4
    assert backend.replays >= (4 if "chunk" in options["network"] else 20)


def test_episodes_of_the_default_policy(rng: np.random.Generator) -> None:
    policy, demonstration = default_policy(rng)
    plain, other, backend = pair(policy)
    shown = [demonstration(steps) for steps in (20, 20, 5)]
    assert_same_episodes(plain, other, shown, rng)
    assert backend.captures == 4, "of each number of rows, and of the steps that are read"
    assert_same_episodes(by_itself(policy), other, shown, rng, tolerance=1e-4)


def test_episodes_of_many_prompts(make_policy: MakePolicy, rng: np.random.Generator) -> None:
    """As an evaluation has them, fewer and fewer: and they are those that the network samples by itself."""
    shown = [(rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A))) for _ in range(3)]
    plain, other, backend = pair(make_policy(acting=BEST, **FEW))
    prompt_of, found = np.arange(12) % 3, []
    for policy in (plain, other):
        encoded = policy.encode_prompts([KNOWN] * 3, shown)
        found.append(policy.episodes(encoded, prompt_of))
    alone = plain.episodes(plain.encode_prompts([KNOWN] * 3, shown), prompt_of)
    alone._graphs = None
    for count in (12, 11, 9, 8, 8, 5, 8, 8, 3):
        who = rng.permutation(12)[:count]
        states, seeds = rng.normal(size=(count, S)).astype(np.float32), rng.integers(0, 2**62, count)
        steps = np.zeros(count, np.int64)
        one, two, three = (
            e.act(who, steps, states, None, lambda due, seeds=seeds: seeds[due]) for e in (*found, alone)
        )
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-5)
    assert (backend.captures, backend.replays) == (2, 4)


@pytest.mark.parametrize("name", ["dt", "mtdiff", "trajectory-diffusion", "td3-bc"])
def test_other_methods(rng: np.random.Generator, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(METHODS[name].Config(), TINY[name])
    network = METHODS[name].build_network(Spaces(S, A, 10), config.network)
    monkeypatch.setattr(type(network), "freeze", lambda *_: None)
    texts = {text_key(KNOWN): torch.randn(10)}
    plain, other, backend = pair(Policy(name, network, None, config.acting, texts=texts))
    shown = rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A))
    text, trajectory = KNOWN if network.reads.text else None, shown if network.reads.trajectory else None
    for policy in (plain, other):
        policy.prompt(text, trajectory, target_return=1.0)
    for _ in range(4):
        plain.reset()
        other.reset()
        for _ in range(4):
            seen = rng.normal(size=S)
            np.testing.assert_array_equal(other.act(seen), plain.act(seen))
    assert backend.replays > 3


# What a graph holds fast


def changed_in_place(policy: Policy) -> None:
    with torch.no_grad():
        policy.network.get_submodule("net.layers.1").weight.mul_(-1.5)  # type: ignore[union-attr]


def loaded(policy: Policy) -> None:
    policy.network.load_state_dict({name: 0.9 * t for name, t in policy.network.state_dict().items()})


def replaced(policy: Policy) -> None:
    layer: Any = policy.network.get_submodule("net.layers.2")
    layer.bias = torch.nn.Parameter(layer.bias + 1, requires_grad=False)


def moved(policy: Policy) -> None:
    policy.network.to(torch.float64).to(torch.float32)


def of_critics(policy: Policy) -> None:
    assert policy.critic is not None
    next(policy.critic.parameters()).data.neg_()
    torch.autograd.graph.increment_version(next(policy.critic.parameters()))


def statistics(policy: Policy) -> None:
    policy.network.context.features.mean.add_(0.5)


@pytest.mark.parametrize("change", [changed_in_place, loaded, replaced, moved, of_critics, statistics])
def test_weights_that_change_drop_the_graphs(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator, change: Callable[[Policy], None]
) -> None:
    plain, other, backend = pair(make_policy(acting=BEST, **FEW))
    for policy in (plain, other):
        policy.prompt(KNOWN, example)
    states = rng.normal(size=(12, S))
    for number, state in enumerate(states):
        if number == 6:
            assert (backend.captures, other.graphs.captured) == (1, 1)
            change(plain)
            change(other)
        np.testing.assert_array_equal(other.act(state), plain.act(state))
        assert other.graphs.captured == (0 if number in (0, 1, 6, 7) else 1)
    assert backend.captures == 2


def test_prompts_that_are_written_to_are_read_anew(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    plain, other, backend = pair(make_policy())
    states, found = rng.normal(size=(8, S)), []
    for policy in (plain, other):
        policy.prompt(KNOWN, example)
    for number in range(8):
        for policy in (plain, other):
            if number == 6:
                policy._session._episodes._prompts.pooled.add_(1.0)  # type: ignore[union-attr]
            policy.seed(1)
            found.append(policy.act(states))
        np.testing.assert_array_equal(*found[-2:])
    assert not np.array_equal(found[0], found[-1])
    assert (backend.captures, backend.replays) == (1, 6)


def test_prompts_whose_tensors_are_replaced_are_read_anew(rng: np.random.Generator) -> None:
    policy, demonstration = default_policy(rng)
    state, found = rng.normal(0, 0.3, policy.network.spaces.observed_dim), []
    recorded(policy)
    policy.prompt(KNOWN, demonstration(20))
    session = policy._session
    assert session is not None
    memory = session._episodes._prompts.memory
    for number in range(6):
        if number == 4:
            memory.update({name: -3.0 * tensor for name, tensor in memory.items() if name.startswith("value")})
        if number == 5:
            policy.graphs.mode = "off"
        policy.reset()
        policy.seed(1)
        found.append(policy.act(state))
    np.testing.assert_array_equal(found[2], found[3])
    assert not np.array_equal(found[3], found[4])
    np.testing.assert_array_equal(found[4], found[5])


def test_settings_of_products_have_graphs_of_their_own(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator
) -> None:
    policy = make_policy()
    backend = recorded(policy)
    policy.prompt(KNOWN, example)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium", "highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            for _ in range(3):
                policy.act(rng.normal(size=S))
    finally:
        torch.set_float32_matmul_precision(before)
    assert backend.captures == 2


def test_parts_that_were_replaced_are_those_that_act(policy: Policy, example: Any) -> None:
    def graphs() -> Any:
        return policy.episodes(policy.encode_prompts([KNOWN], [example]))._graphs

    before = graphs()
    assert before is policy.graphs
    policy.acting = BestOfN(samples=7)
    own = graphs()
    assert own is not before
    assert own._acting is policy.acting
    assert own is graphs() is policy.graphs, "all that act in the new way share them"
    policy.graphs.mode = "off"
    assert own.mode == graphs().mode == "off"


# How many


def test_rows_are_filled_up_to_few_kinds() -> None:
    counts = range(1, 2000)
    assert all(count <= rounded(count) <= max(count + 3, 1.5 * count, 16) for count in counts)
    assert all(rounded(count) % 8 == 0 for count in counts if count > 4), "what rows are rounded by in any case"
    assert len({rounded(count) for count in counts}) <= 20
    assert [rounded(count) for count in (1, 2, 3, 8, 9, 17, 24, 25, 33, 49)] == [1, 2, 4, 8, 16, 24, 24, 32, 48, 64]


def test_kinds_beyond_the_limit_act_without_and_idle_ones_give_way(
    make_policy: MakePolicy,
    example: Any,
    rng: np.random.Generator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, other, backend = pair(make_policy(acting=BEST, **FEW), limit=2)
    for policy in (plain, other):
        policy.prompt(KNOWN, example)

    def act(*counts: int) -> None:
        for count in counts:
            states = rng.normal(size=(count, S))
            np.testing.assert_array_equal(other.act(states), plain.act(states))

    with caplog.at_level(logging.INFO, "llmdpd"):
        act(*[1, 2, 4] * 4)
    assert [r.message for r in caplog.records] == ["more than 2 kinds of calls: the others act without a CUDA graph"]
    assert (backend.captures, backend.warmed, backend.replays) == (2, 4, 4)
    monkeypatch.setattr(module, "_IDLE", 3)
    act(2, 2, 2, 2, 4, 4, 4)
    assert (backend.captures, other.graphs.captured) == (3, 2)
    act(2)
    assert backend.captures == 3, "the one that is in use has stayed"


# Where a capture can't be


def test_what_cannot_be_captured_acts_without_for_a_reason_logged_once_or_is_refused(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    plain, other, backend = pair(make_policy(acting=BEST, **FEW), mode="auto")
    assert_same_episodes(plain, other, [example], rng, rows=(2,))
    assert other.graphs.captured == 1
    backend.refusal = "it waits for the moon"
    with caplog.at_level(logging.INFO, "llmdpd"):
        assert_same_episodes(plain, other, [example] * 2, rng)
    assert [r.message for r in caplog.records] == ["acting runs without CUDA graphs: it waits for the moon"]
    assert (other.graphs.captured, other.graphs.reason) == (0, "it waits for the moon")
    other.graphs.mode = "on"
    with pytest.raises(InputError) as error:
        assert_same_episodes(plain, other, [example], rng)
    assert (error.value.field, error.value.found) == ("cuda_graph", "it waits for the moon")
    backend.refusal = None
    other.graphs.mode = "auto"
    plain.seed(5)
    other.seed(5)
    assert_same_episodes(plain, other, [example], rng)
    assert other.graphs.captured == 2


def test_a_reason_is_forgotten_where_weights_change(
    make_policy: MakePolicy, example: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been of the moment, such as memory that was short; it is logged once all the same."""
    policy = make_policy()
    backend = recorded(policy, mode="auto")
    policy.prompt(KNOWN, example)
    with caplog.at_level(logging.INFO, "llmdpd"):
        for refusal, captured in (("out of memory", 0), ("out of memory", 0), (None, 1)):
            backend.refusal = refusal
            for _ in range(4):
                policy.act(np.zeros(S))
            assert (policy.graphs.reason, policy.graphs.captured) == (refusal, captured)
            changed_in_place(policy)
    assert [r.message for r in caplog.records] == ["acting runs without CUDA graphs: out of memory"]


@pytest.mark.parametrize("broken", ["on", "interrupted"])
def test_after_a_capture_that_broke_off_no_earlier_graph_is_replayed(
    make_policy: MakePolicy, example: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    policy = make_policy()
    backend = recorded(policy)
    policy.prompt(KNOWN, example)
    for _ in range(4):
        policy.act(np.zeros(S))
    assert (policy.graphs.captured, backend.replays) == (1, 2)

    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend, *(("refusal", "broken") if broken == "on" else ("capture", interrupted)))
        policy.reset()
        for _ in range(2):
            policy.act(np.zeros((2, S)))
        with pytest.raises(InputError if broken == "on" else KeyboardInterrupt):
            policy.act(np.zeros((2, S)))
    assert policy.graphs.captured == 0
    policy.reset()
    policy.act(np.zeros(S))
    assert (policy.graphs.captured, backend.captures) == (1, 2)


def test_weights_whose_changes_nobody_counts_act_without(
    make_policy: MakePolicy, example: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode():
        policy = make_policy()
    backend = recorded(policy, mode="auto")
    policy.prompt(KNOWN, example)
    with caplog.at_level(logging.INFO, "llmdpd"):
        for _ in range(5):
            assert np.isfinite(policy.act(np.zeros(S))).all()
    assert backend.warmed == 0
    assert ["whether its weights change is not seen" in r.message for r in caplog.records] == [True]


def test_modes(make_policy: MakePolicy, example: Any, tmp_path: Any) -> None:
    policy = make_policy()
    assert policy.graphs.mode == "auto"
    policy.save(tmp_path / "policy")
    other = Policy.load(tmp_path / "policy", cuda_graph="off")
    assert other.graphs.mode == other.with_acting(samples=1).graphs.mode == "off"
    for wrong in (
        lambda: setattr(policy.graphs, "mode", "never"),
        lambda: Policy.load(tmp_path / "policy", cuda_graph="?"),
    ):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="no such mode"):
            wrong()
    backend = recorded(policy, mode="off")
    policy.prompt(KNOWN, example)
    for _ in range(5):
        policy.act(np.zeros(S))
    assert backend.warmed == backend.captures == 0


# Several users


def test_sessions_share_graphs(make_policy: MakePolicy, rng: np.random.Generator) -> None:
    """In threads, each under a prompt of its own."""
    policy, states = make_policy(acting=BEST), rng.normal(size=(3, 10, S))
    shown = [(rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A))) for _ in range(3)]
    policy.graphs.mode = "off"

    def play(n: int) -> np.ndarray:
        session = policy.session(KNOWN, shown[n], seed=n)
        return np.stack([session.act(state) for state in states[n]])

    alone = [play(n) for n in range(3)]
    backend, found = recorded(policy), {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: play(n)})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(3):
        np.testing.assert_array_equal(found[n], alone[n])
    assert (backend.captures, backend.replays) == (1, 28)


@pytest.mark.filterwarnings("ignore:called a synchronizing CUDA operation")
def test_policies_on_one_network_in_threads_beside_one_that_trains(
    make_policy: MakePolicy, example: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has graphs of its own, of the real `CudaGraphs`; what the others do is no reason against them."""
    one, states = make_policy(acting=BEST, **FEW), rng.normal(size=(6, S))
    policies = [one, one.with_acting()]
    one.graphs.mode = "off"
    one.prompt(KNOWN, example)
    alone = [one.act(state) for state in states]
    device = Device(monkeypatch)
    filters, show, found, ended = warnings.filters, warnings.showwarning, {}, threading.Event()
    for policy in policies:
        policy.graphs = ActingGraphs(policy.network, policy.acting, policy.critic, "on")
        policy.graphs._backend = CudaGraphs(policy.device, beside="thread_local")
        policy.prompt(KNOWN, example)
        policy.seed(0)

    def act(n: int) -> None:
        found[n] = [policies[n].act(state) for state in states]

    def train() -> None:
        trained = CudaGraphs(torch.device("cpu"))
        while not ended.is_set():
            torch.rand(())
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            trained.warm_up(lambda: ended.wait(0.001))

    threads, trainer = [threading.Thread(target=act, args=[n]) for n in range(2)], threading.Thread(target=train)
    for thread in (trainer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    trainer.join()
    for n in range(2):
        np.testing.assert_array_equal(found[n], alone)
        assert (policies[n].graphs.captured, policies[n].graphs.reason) == (1, None)
    assert device.log[::2] == ["begin"] * (len(device.log) // 2), "one after another"
    assert device.log[1::2] == ["end"] * (len(device.log) // 2)
    assert warnings.filters is filters
    assert warnings.showwarning is show


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_has_graphs_of_its_own(
    make_policy: MakePolicy, example: Any, copied: Callable[[Policy], Policy]
) -> None:
    policy = make_policy()
    recorded(policy)
    policy.prompt(KNOWN, example)
    for _ in range(4):
        policy.act(np.zeros(S))
    other = copied(policy)
    assert (policy.graphs.captured, other.graphs.captured) == (1, 0)
    assert other.graphs.mode == "on"
    assert other.graphs._network is other.network
    assert other._session is not None
    assert other._session._episodes._graphs is other.graphs
    other.graphs._backend = Recorder()  # type: ignore[assignment]
    np.testing.assert_array_equal(other.act(np.ones(S)), policy.act(np.ones(S)))
