"""The operators' Triton implementation: what it computes around the kernels, on the device or interpreted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdpd.ops import triton


@pytest.mark.parametrize("own_prompts", [False, True])
@pytest.mark.parametrize("need_state", [False, True])
def test_forward_and_backward(
    make_case: Callable[..., Any], close: Callable[..., None], key: Tensor, own_prompts: bool, need_state: bool
) -> None:
    case = make_case(B=19, N=2, A=3, H=33, scale=1.0)
    if not own_prompts:
        case = dataclasses.replace(case, prompt=case.prompt.detach()[0].clone())
    net, (_, chain) = case.net, case.call(key)
    _, _, _, W_z, b1 = (part.detach() for part in net.first_layer())
    chain = chain._replace(u_z=torch.nn.functional.linear(case.prompt.detach(), W_z, b1))
    actions, tape = triton.chain_forward(chain, True)
    grad = torch.randn_like(actions)
    d_state, d_W_s, d_u_z, d_tau, d_W_a, *d_trunk = triton.chain_backward(grad, tape, chain, need_state)
    expected, sums = case.reference(case.noise(key), grad)
    wanted = {name: gradient.value for name, gradient in sums.items()}
    close(actions, expected, 2e-5, "actions")
    first, start, S, A = wanted["layers.0.weight"], net.action_dim + net.time_dim, net.state_dim, net.action_dim
    assert d_tau.shape == chain.tau.shape
    assert d_u_z.shape == chain.u_z.shape
    names = [f"layers.{layer}.{part}" for layer in (1, 2, 3) for part in ("weight", "bias")]
    found = dict(zip(names, d_trunk, strict=True)) | {"W_a": d_W_a, "W_s": d_W_s}
    wanted |= {"W_a": first[:, :A], "W_s": first[:, start : start + S]}
    found["layers.0.bias"] = d_u_z.sum(0) if own_prompts else d_u_z
    if need_state:
        found["state"] = d_state
    else:
        assert d_state.numel() == 0
    for name, gradient in found.items():
        close(gradient, wanted[name], 1e-4, name)
