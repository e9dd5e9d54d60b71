"""The noise network in one node, against its definition in PyTorch in float64."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import NoiseMLP, noise_mlp, reverse_diffusion, sampler_coefficients
from llmdpd.ops import layers, native, operators

pytestmark = pytest.mark.skipif(not native.available()[0], reason="needs the C++ module")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    yield
    native.set_threads(None)


def made(S: int, A: int, Z: int, H: int, T: int) -> NoiseMLP:
    net = NoiseMLP(S, A, Z, H, T)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


SIZES = [(480, 12, 61, 4, 32, 64, 16), (70, 70, 1, 1, 1, 8, 2), (15, 3, 11, 7, 5, 33, 6), (77, 1, 5, 3, 0, 33, 4)]


# In bfloat16 with many rows alone: the sum of a few may be smaller than the rounding of each.
@pytest.mark.parametrize(
    ("B", "P", "S", "A", "Z", "H", "T", "bf16"), [*((*sizes, False) for sizes in SIZES), (*SIZES[0], True)]
)
def test_results_and_gradients(
    rng: np.random.Generator, isa: str, B: int, P: int, S: int, A: int, Z: int, H: int, T: int, bf16: bool
) -> None:
    net, actions, timesteps = made(S, A, Z, H, T), torch.randn(B, A), torch.from_numpy(rng.integers(0, 5, B))
    state, prompt, grad = torch.randn(B, S), torch.randn(P, Z), torch.randn(B, A)

    def run(dtype: torch.dtype, groups: int) -> tuple[Tensor, dict[str, Tensor]]:
        of, given = copy.deepcopy(net).to(dtype), [part.clone().to(dtype).requires_grad_() for part in (state, prompt)]
        prompts = given[1] if groups == P else given[1].repeat_interleave(B // P, 0)
        result = of(
            actions.to(dtype), timesteps, given[0], prompts, "bf16" if bf16 and dtype == torch.float32 else "fp32"
        )
        result.backward(grad.to(dtype))
        leaves = {"state": given[0], "prompt": given[1], **dict(of.named_parameters())}
        if not Z:
            del leaves["prompt"]
        return result.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one.double() - other).norm() / other.norm().clamp_min(1e-12))

    found = []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        found.append(run(torch.float32, P))
    expected, gradients = run(torch.float64, B)
    assert apart(found[0][0], expected) <= (2e-2 if bf16 else 2e-5)
    assert set(found[0][1]) == set(gradients)
    for name, gradient in gradients.items():
        assert apart(found[0][1][name], gradient) <= (5e-2 if bf16 else 1e-4), name
    for result, others in found[1:]:
        assert torch.equal(result, found[0][0])
        assert all(torch.equal(others[name], gradient) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("Z", [0, 5])
@pytest.mark.parametrize("own", [False, True])
def test_a_chain_has_the_same_bits_for_any_thread_count(isa: str, Z: int, own: bool) -> None:
    """Several row blocks, the last one odd; gradients of the states only where they are wanted."""
    B, N, S = 301, 2, 3
    net, state, prompt, plan = made(S, 2, Z, 33, 4), torch.randn(B, S), torch.randn(*([B] if own else []), Z), 5
    grad, found = torch.randn(B, N, 2), []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        for learns in (True, False):
            given = state.clone().requires_grad_(learns)
            net.zero_grad()
            actions = reverse_diffusion(net, given, prompt, sampler_coefficients("ddpm", plan), N, seed=7)
            actions.backward(grad)
            assert (given.grad is not None) == learns
            of_states = [] if given.grad is None else [given.grad]
            found.append([actions.detach(), *(parameter.grad for parameter in net.parameters()), *of_states])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=len(others) > len(found[1])))


def test_hidden_layers_that_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they would take too much memory until the pass backward."""
    net, given = made(3, 2, 4, 8, 4), (torch.randn(6, 2), torch.arange(6) % 5, torch.randn(6, 3), torch.randn(3, 4))
    found = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(operators, "TAPE_LIMIT", limit)
        net.zero_grad()
        out = net(*given)
        out.square().sum().backward()
        found.append([out.detach(), *(parameter.grad for parameter in net.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_where_the_node_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = noise_mlp.predict_noise
    monkeypatch.setattr(noise_mlp, "predict_noise", lambda *given: calls.append(given) or original(*given))
    net, actions, timesteps, state = made(3, 2, 4, 8, 4), torch.randn(6, 2), torch.arange(6) % 5, torch.randn(6, 3)
    prompts = torch.randn(3, 4)

    def alone(prompt: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(layers, "computes", lambda *_: False)
            return net(actions, timesteps, state, prompt)

    for number, prompt in enumerate((prompts, prompts[:1], prompts[0], prompts.repeat(2, 1)), start=1):
        found = net(actions, timesteps, state, prompt)
        assert len(calls) == number
        torch.testing.assert_close(found, alone(prompt), rtol=1e-4, atol=1e-5)
    promptless = made(3, 2, 0, 8, 4)
    found = promptless(actions, timesteps, state, torch.zeros(0))
    assert len(calls) == 5
    with torch.no_grad():
        torch.testing.assert_close(found.detach(), promptless(actions, timesteps, state, torch.zeros(0)))
        net(actions, timesteps, state, prompts)
    net(actions.clone().requires_grad_(), timesteps, state, prompts)
    net.double()(actions.double(), timesteps, state.double(), prompts.double())
    assert len(calls) == 5
    assert net(actions, timesteps, state, prompts).dtype is torch.float64  # float32 observations
    net.float().time_mlp.register_forward_hook(lambda *given: 2.0 * given[-1])
    with torch.no_grad():
        expected = net(actions, timesteps, state, prompts)
    torch.testing.assert_close(net(actions, timesteps, state, prompts).detach(), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 5
    empty = net(actions[:0], timesteps[:0], state[:0], prompts[:0])
    assert empty.shape == (0, 2)


def test_the_tape_goes_with_the_pass_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the loss lives on: losses kept in a list keep no tapes."""
    tapes: list[weakref.ref[Any]] = []
    pooled = native.module().pooled_buffer

    def noted(floats: int) -> Any:
        tape = pooled(floats)
        tapes.append(weakref.ref(tape))
        return tape

    monkeypatch.setattr(native.module(), "pooled_buffer", noted)
    net = made(3, 2, 4, 8, 4)
    loss = net(torch.randn(6, 2), torch.arange(6) % 5, torch.randn(6, 3), torch.randn(3, 4)).square().sum()
    assert tapes
    assert all(tape() is not None for tape in tapes)
    loss.backward()
    assert not any(tape() is not None for tape in tapes)
