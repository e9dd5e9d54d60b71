"""How many launches there are of what a CUDA graph holds: an iteration, an action."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from llmdpd import kernels

if kernels.interpreted():
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)

from llmdpd.config.presets import find_preset
from llmdpd.diffusion import NoiseMLP
from llmdpd.kernels import mish_mlp as triton_kernels
from llmdpd.kernels import reverse_diffusion
from llmdpd.methods.batch import PromptedBatch
from llmdpd.methods.llmdpd import network as network_module
from llmdpd.methods.llmdpd.device_stack import DeviceStack
from llmdpd.methods.llmdpd.method import LLMDPD, LLMDPDConfig
from llmdpd.methods.llmdpd.network import DiffusionNetworkConfig, DiffusionPolicy
from llmdpd.methods.stacked import side_by_side
from llmdpd.nn import device_features
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import ContextConfig, Keep
from llmdpd.nn.policy_network import States
from llmdpd.nn.spaces import Spaces
from llmdpd.ops import device_choice, device_memory, device_reading, resident, triton
from llmdpd.prompts.demonstration import make_tokens
from llmdpd.tasks.metaworld.layout import LAYOUT
from tests.device_work import DeviceWork
from tests.kernels.stand_in import Operations, StandIn


@pytest.mark.parametrize("count", [1, 4])
def test_launches_of_a_training_iteration(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As a CUDA graph would capture it, at Diffusion-QL's design; but for random numbers alike for any learners."""
    for module in (triton_kernels, reverse_diffusion):
        monkeypatch.setattr(module, "capability_of", lambda device: 90)
    network = DiffusionNetworkConfig(hidden_dim=64, context=ContextConfig(text=False, trajectory=False))
    methods = [
        LLMDPD(DiffusionPolicy(Spaces(7, 3, 0), network), LLMDPDConfig(critic_hidden=64), 10) for _ in range(count)
    ]
    for method in methods:
        for optimizer in method.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].float()  # as on a CUDA device
    stack, generators = DeviceStack(methods), [torch.Generator() for _ in methods]
    state, action, number = torch.randn(16, 7), torch.randn(16, 3), torch.zeros(16)
    batch = PromptedBatch(
        observations=state, actions=action, expert_actions=None, rewards=number, next_observations=state,
        terminals=number, timesteps=number.long(), text=None, tokens=None,
    )  # fmt: skip
    batch = side_by_side([batch] * count)
    stack.learn(batch, generators)
    stand_in.launches()
    with Operations() as operations:
        stack.learn(batch, generators)
    launched = [name for name, *_ in stand_in.launches()]
    work = operations.work()
    sampled = 5 * count
    assert len([name for name in work if any(of in name for of in ("random_", "normal_", "uniform_"))]) == sampled
    assert len(launched) + len(work) - sampled <= 45, (launched, work)


@pytest.fixture
def default_method(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> LLMDPD:
    """The default preset's, smaller; the kernels' stand-in computes what they would on a device."""
    monkeypatch.setattr(triton_kernels, "capability_of", lambda device: 90)
    monkeypatch.setattr(triton, "computes_mlps", lambda x, members: True)
    by_kernels = ((device_reading, "may_read"), (device_reading, "reads_states"), (device_features, "reads"))
    for module, name in (*by_kernels, (device_memory, "reads")):
        monkeypatch.setattr(module, name, lambda *_: True)
    preset = find_preset("metaworld").method
    assert isinstance(preset, LLMDPDConfig)
    context = preset.network.context
    retrieval = dataclasses.replace(context.retrieval, width=32, heads=2)
    context = dataclasses.replace(context, text_dim=16, text_hidden=16, trajectory_dim=16, retrieval=retrieval)
    network = dataclasses.replace(preset.network, hidden_dim=64, context=context)
    return LLMDPD(DiffusionPolicy(Spaces(39, 4, 8, LAYOUT), network), dataclasses.replace(preset, network=network), 9)


def test_launches_of_the_default_presets_iteration(stand_in: StandIn, default_method: LLMDPD) -> None:
    """States are read in one launch, and backward in two; PyTorch puts weights and memories side by side before."""
    method, context = default_method, default_method.config.network.context
    method.choose_on_host = False
    P, rows = 2, 20
    shown = [(torch.randn(steps, 39).numpy(), torch.randn(steps, 4).numpy()) for steps in (9, 6)]
    state, action, number = torch.randn(P * rows, 39), torch.randn(P * rows, 4), torch.zeros(P * rows)
    batch = PromptedBatch(
        observations=state, actions=action, expert_actions=action, rewards=number, next_observations=state,
        terminals=number, timesteps=number.long(), text=torch.randn(P, 8), tokens=make_tokens(shown, context.encoder),
        keep=Keep(torch.ones(P, 1), torch.ones(P, 1)),
    )  # fmt: skip
    for optimizer in method.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].float()  # as on a CUDA device
    for _ in range(2):  # what is made once is made in the first
        stand_in.launches()
        with Operations() as operations:
            method.learn(batch)
    launched = [name for name, *_ in stand_in.launches()]
    reading = ["reading_kernel", "reading_backward_kernel", "reading_gradient_kernel"]
    assert [name for name in launched if name in reading] == reading
    assert launched.count("features_kernel") == 3  # of states, and of demonstrations twice
    work = operations.work()
    assert launched.count("memory_kernel") == 1
    assert len(launched) + len(work) <= 195, (launched, work)  # without these kernels 543


@pytest.fixture
def chain_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `reverse_diffusion` does on a CUDA device."""

    def chain(net: NoiseMLP, state: Tensor, prompt: Tensor, plan: Any, N: int, seed: Tensor, precision: str) -> Tensor:
        return resident.sample(net, plan, state, prompt, N, seed, precision == "bf16")

    monkeypatch.setattr(network_module, "reverse_diffusion", chain)


def counted(stand_in: StandIn, act: Callable[[], Tensor]) -> tuple[list[str], list[str]]:
    """Launches of kernels and operations of PyTorch, none of which waits."""
    act()  # what is made once
    stand_in.launches()
    with DeviceWork(host=True), Operations() as operations:
        act()
    return [name for name, *_ in stand_in.launches()], operations.work()


@pytest.mark.parametrize("rows", [1, 8])
def test_launches_of_the_default_presets_action(
    stand_in: StandIn, default_method: LLMDPD, chain_in_one_launch: None, rows: int
) -> None:
    """Everything between the copy there and the copy back, as a CUDA graph holds it."""
    policy, acting = default_method.policy.eval().requires_grad_(False), default_method.config.acting
    shown = [(torch.randn(9, 39).numpy(), torch.randn(9, 4).numpy())]
    with torch.no_grad():
        prompts = policy.encode(torch.randn(1, 8), make_tokens(shown, default_method.config.network.context.encoder))
        states, seeds = States(torch.randn(rows, 39), None, torch.arange(rows)), torch.arange(rows)
        launched, work = counted(stand_in, lambda: policy.sample(states, prompts, acting, seeds))
    assert launched == ["features_kernel", "reading_kernel", "forward_kernel"]
    # Weights and memories side by side, and the prompt's part of the first layer; fewer rows are filled up to eight.
    assert len(work) <= (2 if rows % 8 == 0 else 4), work


def test_launches_of_a_best_of_many_action(
    stand_in: StandIn, default_method: LLMDPD, chain_in_one_launch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 50 by two critics, of the paper's design: by PyTorch the choice alone is some 390."""
    monkeypatch.setattr(device_choice, "chooses", lambda *_: True)
    context = ContextConfig(text_dim=16, text_hidden=16, trajectory=False)
    policy = DiffusionPolicy(Spaces(39, 4, 8), DiffusionNetworkConfig(hidden_dim=64, context=context)).eval()
    critic = policy.requires_grad_(False).make_critic(64)
    states, seeds = States(torch.randn(8, 39), None, torch.arange(8)), torch.arange(8)
    with torch.no_grad():
        prompts = policy.encode(torch.randn(1, 8), None)
        launched, work = counted(stand_in, lambda: policy.sample(states, prompts, BestOfN(), seeds, critic))
    assert launched == [
        *("features_kernel", "forward_kernel"),
        *("mlp_pack_kernel", "mlp_forward_kernel", "choice_kernel"),
    ]
    assert len(work) <= 3, work  # the prompt's part, the critics' inputs side by side, the lesser value
