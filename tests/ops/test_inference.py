"""Packed weights are used again exactly as long as the network has not changed: a stale pack is impossible."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmdpd.diffusion import NoiseMLP, reverse_diffusion, sampler_coefficients
from llmdpd.ops import inference


def step_optimizer(net: nn.Module, name: str, **options: Any) -> None:
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.1, **options)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def other_like(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    return other


def ema_by_data(net: nn.Module, times: int = 1) -> None:
    """As the public Diffusion-QL code does: a new tensor put under the parameter, the old one freed."""
    for _ in range(times):
        for parameter in net.parameters():
            parameter.data = parameter.data * 0.5 + 0.5 * torch.randn_like(parameter)


@torch.no_grad()
def lerp(net: nn.Module) -> None:
    torch._foreach_lerp_(list(net.parameters()), list(other_like(net).parameters()), 0.5)


@torch.no_grad()
def one_number(net: nn.Module) -> None:
    list(net.parameters())[5].view(-1)[3] += 1.0


def copy_by_data(net: nn.Module) -> None:
    for parameter, source in zip(net.parameters(), other_like(net).parameters(), strict=True):
        parameter.data.copy_(source)


def scale_by_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(1.01)


def all_but_the_first_column_by_data(net: nn.Module) -> None:
    _linear(net)[2].weight.data[:, 1:] = 0.0


def a_bias_by_data(net: nn.Module) -> None:
    _linear(net)[2].bias.data[5] += 2.0


def transpose_by_data(net: nn.Module) -> None:
    """The same bytes in the same memory, read in another order."""
    weight = _linear(net)[2].weight
    weight.data = weight.data.t()


def one_number_by_numpy(net: nn.Module) -> None:
    _linear(net)[2].weight.detach().numpy()[7, 11] += 2.0


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "SGD": lambda net: step_optimizer(net, "SGD"),
    "Adam, foreach": lambda net: step_optimizer(net, "Adam", foreach=True),
    "AdamW, fused": lambda net: step_optimizer(net, "AdamW", fused=True),
    "load_state_dict": lambda net: net.load_state_dict(other_like(net).state_dict()) and None,
    "load_state_dict, assigned": lambda net: net.load_state_dict(other_like(net).state_dict(), assign=True) and None,
    "an average in place": lerp,
    "an average under .data": ema_by_data,
    "two of them, so that memory comes back": lambda net: ema_by_data(net, 2),
    "a copy through .data": copy_by_data,
    "a scale through .data": scale_by_data,
    "one number": one_number,
    "all but a column through .data": all_but_the_first_column_by_data,
    "a bias through .data": a_bias_by_data,
    "a transposition under .data": transpose_by_data,
    "one number through NumPy": one_number_by_numpy,
    "another parameter": lambda net: _replace_parameter(net),
    "another layer": lambda net: _replace_layer(net),
    "there and back in dtype": lambda net: _through_double(net),
}


def _linear(net: nn.Module) -> tuple[nn.Module, str, nn.Linear]:
    layers = net.layers if isinstance(net, NoiseMLP) else net.q1
    return layers, "2", layers[2]


def _through_double(net: nn.Module) -> None:
    net.double()
    one_number(net)
    net.float()


def _replace_parameter(net: nn.Module) -> None:
    layer = _linear(net)[2]
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _replace_layer(net: nn.Module) -> None:
    owner, name, layer = _linear(net)
    setattr(owner, name, nn.Linear(layer.in_features, layer.out_features))


@torch.no_grad()
def sampled(net: NoiseMLP, precision: Any = "fp32") -> torch.Tensor:
    """Actions of two states, which show every change."""
    state, prompt = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.7, -1.1]]), torch.ones(4)
    return reverse_diffusion(net, state, prompt, sampler_coefficients(clip=None), seed=1, precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_network_is_packed_anew(rng: np.random.Generator, make_net: Any, name: str, precision: Any) -> None:
    torch.manual_seed(int(rng.integers(2**31)))
    net, plan = make_net(3, 2, 4), sampler_coefficients(clip=None)
    state, prompt = torch.randn(2, 3), torch.randn(4)

    @torch.no_grad()
    def draw(of: NoiseMLP) -> torch.Tensor:
        return reverse_diffusion(of, state, prompt, plan, seed=1, precision=precision)

    before = draw(net)
    assert torch.equal(draw(net), before)
    CHANGES[name](net)
    after = draw(net)
    assert not torch.equal(after, before)
    # A copy was never packed.
    assert torch.equal(after, draw(copy.deepcopy(net)))


def test_a_changed_buffer_is_seen(make_net: Any) -> None:
    net = make_net(3, 2, 4)
    before = sampled(net)
    net.time_mlp[0].frequencies.mul_(3.0)
    assert not torch.equal(sampled(net), before)
    assert torch.equal(sampled(net), sampled(copy.deepcopy(net)))


def test_a_child_that_is_none_hides_no_change(make_net: Any) -> None:
    net = make_net(3, 2, 4)
    net.register_module("absent", None)
    sampled(net)
    kept = inference._nets[False][net]
    sampled(net)
    assert inference._nets[False][net] is kept, "packed once all the same"
    net.linears[0].bias = None
    assert inference.watched(net, net.linears, lambda _: True) is None


def test_an_unchanged_network_is_packed_once(make_net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, plans = make_net(3, 2, 4), [sampler_coefficients(), sampler_coefficients("ddim", 3, train_steps=5)]
    made: list[int] = []
    create = inference.PackedNet.__init__

    def spy(self: inference.PackedNet, *arguments: Any) -> None:
        made.append(1)
        create(self, *arguments)

    monkeypatch.setattr(inference.PackedNet, "__init__", spy)
    with torch.no_grad():
        for _ in range(3):
            for plan in plans:
                reverse_diffusion(net, torch.randn(2, 3), torch.randn(4), plan)
    assert len(made) == 1


def test_inference_tensors_that_change_are_packed_anew(make_net: Any) -> None:
    with torch.inference_mode():
        net = make_net(3, 2, 4)
        first = sampled(net)
        for parameter in net.parameters():
            parameter.add_(0.3)
        assert not torch.equal(sampled(net), first)


def test_a_parametrised_network_is_never_kept(make_net: Any) -> None:
    net = make_net(3, 2, 4)
    nn.utils.parametrizations.weight_norm(net.layers[1])
    with torch.no_grad():
        assert not inference.packed(net, False).watch.lasting
        first = sampled(net)
        for parameter in net.parameters():
            parameter.add_(0.3)
        assert not torch.equal(sampled(net), first)


def test_the_time_embedding_through_data_is_seen(make_net: Any) -> None:
    net = make_net(3, 2, 4)
    before = sampled(net)
    for parameter in net.time_mlp.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    assert not torch.equal(sampled(net), before)
    assert torch.equal(sampled(net), sampled(copy.deepcopy(net)))


def test_a_network_that_is_gone_is_forgotten(make_net: Any) -> None:
    net = make_net(3, 2, 4)
    sampled(net)
    entry = weakref.ref(inference.packed(net, False))
    del net
    gc.collect()
    assert entry() is None


def test_another_prompt_is_not_the_last_one(make_net: Any) -> None:
    """The prompt's part of the first layer is kept from call to call."""
    net = make_net(3, 2, 4)
    state, prompts = torch.randn(2, 3), [torch.randn(4) for _ in range(3)]
    with torch.no_grad():
        alone = [
            reverse_diffusion(copy.deepcopy(net), state, prompt, sampler_coefficients(), seed=1) for prompt in prompts
        ]
        for which in (0, 1, 0, 2, 2, 1):
            assert torch.equal(
                reverse_diffusion(net, state, prompts[which], sampler_coefficients(), seed=1), alone[which]
            )
        prompt = prompts[0].clone()
        reverse_diffusion(net, state, prompt, sampler_coefficients(), seed=1)
        prompt.copy_(prompts[1])  # in the same memory
        assert torch.equal(reverse_diffusion(net, state, prompt, sampler_coefficients(), seed=1), alone[1])
