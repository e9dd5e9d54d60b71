"""`learn` is work of the device alone: it reads nothing back, and has nothing of the host's in it.

Shown twice: on the CPU by forbidding the operations that read values, and on `meta`, a device whose values can't be
read at all, by forbidding tensors of the CPU. The tests at the end need a GPU and capture it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd import method as module
from llmdpd.nn.context import ContextConfig, Keep, RetrievalConfig
from llmdpd.nn.spaces import Spaces
from llmdpd.prompts.demonstration import TrajectoryEncoderConfig
from llmdpd.tasks.layout import Layout, Point
from llmdpd.training.batches import moved
from llmdpd.training.cuda_graph import GraphedUpdate, with_cuda_graph
from llmdpd.utils.capture import CaptureError, CudaGraphs
from tests.device_work import DeviceWork

SPACES = Spaces(4, 2, 6)  # as of the fixtures
DROPOUT = {"network.context.text_dropout": 0.2, "network.context.trajectory_dropout": 0.2}
# Of neighbouring columns a slice is taken, of these an index.
LAYOUT = Layout((Point("hand", (0, 2)), Point("thing", (1, 3))))
RETRIEVAL = ContextConfig(
    "retrieval",
    text_dim=5,
    text_hidden=16,
    trajectory_dim=3,
    features="relative",
    encoder=TrajectoryEncoderConfig(layers=1, width=16, inner=16, steps=8, dropout=0.0),
    retrieval=RetrievalConfig(layers=1, heads=2, width=8),
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("llmdpd", DROPOUT),
    "metaworld": ("llmdpd", {**DROPOUT, "critic_sees_prompts": True, "grad_clip": 1.0, "clone": "expert"}),
    "cloning": ("llmdpd", {**DROPOUT, "eta": 0.0}),
    "retrieval": ("llmdpd", {"network.context": RETRIEVAL, "spaces": dataclasses.replace(SPACES, layout=LAYOUT)}),
}
# Without CQL, which computes constants on the host.
OTHERS = {
    **{name: (name, {}) for name in ("trajectory-diffusion", "bc", "td3-bc", "rad", "s4rl", "dt")},
    **{name: (name, {"network.trajectory_dropout": 0.2}) for name in ("prompt-dt", "mtdiff")},
    "lamo": ("lamo", {"network.sequence.dropout": 0.1}),
}
CUDA = torch.device("cuda")
PROMPTS = pytest.mark.parametrize("P", [1, 3])


@pytest.fixture
def sampler_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the sampler, which has tests of its own: differentiable, and clean."""

    def draw(net: Any, state: Tensor, prompt: Tensor, plan: Any, noise: Tensor | None, precision: str) -> Tensor:
        assert noise is None, "it is given where several processes share the batch"
        noise = torch.randn(len(state), net.action_dim, device=state.device, dtype=state.dtype)
        first = torch.zeros(len(state), dtype=torch.int64, device=state.device)
        return net(noise, first, state, prompt).clamp(-1, 1)

    monkeypatch.setattr(module, "reverse_diffusion", draw)


def on(device: str, method: Any) -> Any:
    """The method with its networks on another device, and optimisers for it."""
    other = type(method)(copy.deepcopy(method.policy).to(device), method.config, method.iterations)
    if device != "meta":
        for name, network in method.modules.items():
            other.modules[name].load_state_dict(network.state_dict())
    return other


def assert_same(one: Any, other: Any) -> None:
    for name, network in one.modules.items():
        theirs = other.modules[name].state_dict()
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, theirs[key]), f"{name}.{key}"


class Descent:
    """An optimiser for `meta`, which torch's fused ones refuse; that those can be captured is torch's word."""

    def __init__(self, parameters: Iterable[Tensor], rate: Tensor, **options: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": rate}]

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad * self.param_groups[0]["lr"])


def on_meta(monkeypatch: pytest.MonkeyPatch, method: Any) -> Any:
    with monkeypatch.context() as patch:
        for name in ("Adam", "AdamW"):
            patch.setattr(torch.optim, name, Descent)
        return on("meta", method)


def tiny(variant: str, P: int, make_method: Any, make_batch: Any) -> tuple[Any, PromptedBatch]:
    """The method of this variant, and a batch with the windows that it learns from."""
    name, changes = (VARIANTS | OTHERS)[variant]
    method = make_method(name, **changes)
    window = method.policy.window
    batch = make_batch(6, P, H=window.horizon, before=window.before)
    prompts = Keep(torch.ones(P, 1), torch.ones(P, 1)) if variant not in VARIANTS else batch.keep
    return method, dataclasses.replace(batch, keep=prompts)


@PROMPTS
@pytest.mark.parametrize("variant", VARIANTS | OTHERS)
def test_learning_reads_no_value(
    make_method: Any, make_batch: Any, sampler_of_the_device: None, P: int, variant: str
) -> None:
    method, batch = tiny(variant, P, make_method, make_batch)
    method.choose_on_host = False
    method.update(batch, 0)  # what is made once, as the optimisers' state
    with DeviceWork(host=True) as mode:
        metrics = method.learn(batch)
    assert any("backward" in str(operation) for operation in mode.seen)
    assert all(torch.isfinite(m) for m in metrics.values())


@PROMPTS
@pytest.mark.parametrize("variant", VARIANTS | OTHERS)
def test_learning_has_nothing_of_the_host(
    make_method: Any,
    make_batch: Any,
    sampler_of_the_device: None,
    monkeypatch: pytest.MonkeyPatch,
    P: int,
    variant: str,
) -> None:
    method, batch = tiny(variant, P, make_method, make_batch)
    method, batch = on_meta(monkeypatch, method), moved(batch, torch.device("meta"))
    assert not getattr(method, "choose_on_host", False)
    before = torch.get_rng_state()
    with DeviceWork(host=False) as mode:
        metrics = method.learn(batch)
    assert any("backward" in str(operation) for operation in mode.seen)
    assert {m.device.type for m in metrics.values()} == {"meta"}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("wrong", "error", "why", "devices"),
    [
        (lambda x: x.sum().item(), AssertionError, "reads values", ("meta", "cpu")),
        (lambda x: bool((x > 0).all()), AssertionError, "reads values", ("meta", "cpu")),
        (lambda x: x[x > 0], AssertionError, "by a mask", ("meta", "cpu")),
        (lambda x: x[[1, 0]], AssertionError, "tensor of the host", ("cpu",)),
        (lambda x: torch.rand(()) < 0.5, AssertionError, "tensor of the host", ("meta",)),
        (lambda x: x + torch.tensor([1.0, 2.0]).to(x.device), AssertionError, "tensor of the host", ("meta",)),
        # The device itself refuses this one.
        (lambda x: x.cpu(), NotImplementedError, "copy out of meta", ("meta",)),
    ],
)
def test_the_check_finds_what_it_forbids(
    wrong: Callable[[Tensor], object], error: type[Exception], why: str, devices: tuple[str, ...]
) -> None:
    for device in devices:
        with pytest.raises(error, match=why), DeviceWork(host=device == "cpu"):
            wrong(torch.zeros(2, device=device))


@pytest.mark.parametrize("P", [1, 3])
def test_the_devices_choice_of_critic_is_the_hosts(make_method: Any, make_batch: Any, P: int) -> None:
    """Values and gradients: the critic that was not chosen adds exact zeros."""
    method, batches = make_method(), [make_batch(6, P) for _ in range(8)]
    other = on("cpu", method)
    other.choose_on_host = False
    results = []
    for one in (method, other):
        torch.manual_seed(5)
        results.append([one.update(batch, number) for number, batch in enumerate(batches)])
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert_same(method, other)


# On a GPU

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
# What it needs of the sampler: that it draws its key on the device, and keeps its tables there.


def run(method: Any, batches: list[PromptedBatch], first: int = 0) -> list[dict[str, Tensor]]:
    return [method.update(batch, first + number) for number, batch in enumerate(batches)]


@GPU
@PROMPTS
@pytest.mark.parametrize("variant", [*VARIANTS, "trajectory-diffusion"])
def test_on_a_gpu_captured_iterations_are_eager_ones_bit_for_bit(
    make_method: Any, make_batch: Any, P: int, variant: str
) -> None:
    name, changes = (VARIANTS | OTHERS)[variant]
    method = make_method(name, lr_warmup=4, ema_every=2, ema_start=6, **changes)
    batches = [moved(make_batch(6, P, H=5), CUDA) for _ in range(3)] * 6
    plain, other = on("cuda", method), on("cuda", method)
    graphed = with_cuda_graph(other, "on", CUDA)
    assert isinstance(graphed, GraphedUpdate)
    results, ends = [], []
    for one in (plain, graphed):
        torch.manual_seed(5)
        results.append(run(one, batches))
        ends.append(torch.cuda.get_rng_state())
    assert graphed.captured >= 1
    assert torch.equal(*ends)
    for number, (one, two) in enumerate(zip(*results, strict=True)):
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one), f"iteration {number}"
    assert len({float(metrics["loss/diffusion"]) for metrics in results[1]}) == len(batches), "the noise is new"
    assert_same(plain, graphed)


@GPU
def test_on_a_gpu_a_loaded_state_is_taken_up(make_method: Any, make_batch: Any) -> None:
    method, batches = on("cuda", make_method()), [moved(make_batch(), CUDA)] * 8
    graphed = with_cuda_graph(method, "on", CUDA)
    run(graphed, batches)
    plain = on("cuda", method)
    for name, optimizer in plain.optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(method.optimizers[name].state_dict()))
    for optimizer in method.optimizers.values():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (plain, graphed):
        torch.manual_seed(6)
        run(one, batches, 8)
    assert_same(plain, graphed)


@GPU
def test_on_a_gpu_what_waits_is_found_before_the_capture(make_method: Any, make_batch: Any) -> None:
    method, batch = on("cuda", make_method()), moved(make_batch(), CUDA)
    learn = method.learn

    def waits(batch: PromptedBatch) -> dict[str, Tensor]:
        metrics = learn(batch)
        float(metrics["loss/actor"])
        return metrics

    method.learn = waits  # type: ignore[method-assign]
    graphed = with_cuda_graph(method, "auto", CUDA)
    assert isinstance(graphed, GraphedUpdate)
    run(graphed, [batch] * 6)
    assert graphed.captured == 0
    assert graphed.reason is not None
    assert "waits for the device" in graphed.reason


@GPU
def test_on_a_gpu_a_capture_that_breaks_off_leaves_all_as_it_was() -> None:
    graphs = CudaGraphs(CUDA)
    value = torch.zeros((), device="cuda")
    stream, random = torch.cuda.current_stream(), torch.cuda.get_rng_state()

    def broken() -> Tensor:
        value.add_(torch.rand((), device="cuda"))
        value.item()
        return value

    with pytest.raises(CaptureError):
        graphs.capture(broken)
    assert torch.cuda.current_stream() == stream
    assert float(value) == 0
    assert torch.equal(torch.cuda.get_rng_state(), random)
    torch.rand((), device="cuda")
    replay, output = graphs.capture(lambda: value.add_(1).clone())
    replay()
    replay()
    assert float(output) == 2
