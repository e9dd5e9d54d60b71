"""An action, between the copy to a device and the copy back, is work of the device alone: a CUDA graph can hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import reverse_diffusion
from llmdpd.methods.llmdpd import network as network_module
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import EncodedPrompts
from llmdpd.nn.policy_network import States
from llmdpd.ops.philox import philox_normal
from llmdpd.policy.policy import Policy
from llmdpd.utils.capture import CudaGraphs
from tests.device_work import DeviceWork
from tests.policy.conftest import KNOWN, SINGLE, A, MakePolicy, S
from tests.policy.recorded_graphs import (
    BEST,
    SOFTLY,
    assert_same_episodes,
    by_itself,
    default_policy,
)


def plain_policy(make_policy: MakePolicy, rng: np.random.Generator, acting: BestOfN) -> tuple[Policy, Any]:
    return make_policy(acting=acting), lambda steps: (rng.normal(size=(steps, S)), rng.uniform(-1, 1, (steps, A)))


@pytest.fixture(params=["default", "one", "soft", "max"])
def sampled(request: pytest.FixtureRequest, make_policy: MakePolicy, rng: np.random.Generator) -> Callable[..., Any]:
    """Everything between the copies of a call of B rows under P prompts, on a device."""
    if request.param == "default":
        policy, demonstration = default_policy(rng)
    else:
        policy, demonstration = plain_policy(make_policy, rng, SOFTLY.get(request.param, SINGLE))
    network, critic = policy.network, policy.critic

    def call(device: str, B: int, P: int) -> Callable[[], Tensor]:
        encoded = policy.encode_prompts([KNOWN] * P, [demonstration(20 - n) for n in range(P)])
        prompts = EncodedPrompts(encoded.pooled.to(device), {n: t.to(device) for n, t in encoded.memory.items()})
        own, judge = copy.deepcopy(network).to(device), copy.deepcopy(critic)
        judge = None if judge is None else judge.to(device)
        index = (torch.arange(B) % P).to(device) if P > 1 else None
        states = States(torch.randn(B, network.spaces.state_dim).to(device), index, torch.arange(B).to(device))
        seeds = torch.arange(B).to(device)
        return lambda: own.sample(states, prompts, policy.acting, seeds, judge)

    return call


@pytest.mark.parametrize(("B", "P"), [(1, 1), (5, 1), (8, 3)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_call_waits_for_nothing_and_has_nothing_of_the_host(
    sampled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, device: str, B: int, P: int
) -> None:
    chain = chain_of_the_device if device == "meta" else partial(reverse_diffusion, backend="reference")
    monkeypatch.setattr(network_module, "reverse_diffusion", chain)
    work = sampled(device, B, P)
    before = torch.get_rng_state()
    with torch.no_grad():
        work()  # what is made once and kept
        with DeviceWork(host=device == "cpu") as mode:
            found = work()
    assert found.device.type == device
    assert len(mode.seen) > 10
    assert torch.equal(before, torch.get_rng_state())


def chain_of_the_device(
    net: Any, state: Tensor, prompt: Tensor, plan: Any, samples: int, seed: Tensor, precision: str
) -> Tensor:
    """A stand-in for the sampler, which has tests of its own and checks for what `meta` has no answer."""
    noise = philox_normal(seed, len(state), samples, 1, net.action_dim, state.device)[0].float()
    first = torch.zeros(len(state), dtype=torch.int64, device=state.device)
    actions = torch.stack([net(one, first, state, prompt).clamp(-1, 1) for one in noise.unbind(1)], dim=1)
    return actions if samples > 1 else actions[:, 0]


def test_a_call_that_waits_or_has_something_of_the_host_is_found(
    make_policy: MakePolicy, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above, of a policy that does what none may."""
    policy = make_policy()
    states = States(torch.randn(3, S), None, torch.arange(3))
    encoded = policy.encode_prompts([KNOWN], [(rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A)))])
    for wrong in (lambda x: x * float(x.sum()), lambda x: x[[0, 2, 1]], lambda x: x[x[:, 0] > 9]):
        monkeypatch.setattr(policy.network.context.features, "forward", wrong)
        with pytest.raises(AssertionError), DeviceWork(host=True):
            policy.network.sample(states, encoded, policy.acting, torch.arange(3))


# On a GPU

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@GPU
@pytest.mark.parametrize("acting", [SINGLE, BEST])
def test_on_a_gpu_episodes_with_graphs_are_those_without(
    make_policy: MakePolicy, rng: np.random.Generator, acting: BestOfN
) -> None:
    policy = make_policy(acting=acting)
    policy.network.to("cuda")
    if policy.critic is not None:
        policy.critic.to("cuda")
    plain = policy.with_acting()
    plain.graphs.mode, policy.graphs.mode = "off", "on"
    shown = [(rng.normal(size=(20, S)), rng.uniform(-1, 1, (20, A))) for _ in range(2)]
    assert_same_episodes(plain, policy, [shown[n] for n in (0, 1, 0)], rng)
    assert policy.graphs.captured == 2
    assert_same_episodes(by_itself(policy), policy, shown, rng, tolerance=1e-3)
    assert isinstance(policy.graphs._backend, CudaGraphs)


@GPU
def test_on_a_gpu_the_default_policy(rng: np.random.Generator) -> None:
    policy, demonstration = default_policy(rng)
    policy.network.to("cuda")
    plain = policy.with_acting()
    plain.graphs.mode, policy.graphs.mode = "off", "on"
    shown = [demonstration(20) for _ in range(2)]
    assert_same_episodes(plain, policy, [shown[n] for n in (0, 1, 0)], rng)
    with torch.no_grad():
        next(policy.network.parameters()).mul_(1.5)
    assert_same_episodes(plain, policy, shown, rng)
    assert_same_episodes(by_itself(policy), policy, shown, rng, tolerance=1e-3)
    assert policy.graphs.captured == 2
