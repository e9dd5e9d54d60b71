"""The registered operators' CUDA implementation: what it makes of the kernels, on the device or interpreted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdpd.ops import operators

MakeCase = Callable[..., Any]
Close = Callable[..., None]


@pytest.mark.parametrize("own_prompts", [False, True])
@pytest.mark.parametrize("need_state", [False, True])
def test_forward_and_backward(
    make_case: MakeCase,
    close: Close,
    tolerances: dict[bool, tuple[float, float]],
    key: Tensor,
    own_prompts: bool,
    need_state: bool,
) -> None:
    case = make_case(B=19, N=2, A=3, H=33, scale=1.0)
    if not own_prompts:
        case = dataclasses.replace(case, prompt=case.prompt.detach()[0].clone())
    net, state = case.net, case.state.detach()
    action_weight, _, state_weight, prompt_weight, bias = (part.detach() for part in net.first_layer())
    init = torch.nn.functional.linear(case.prompt.detach(), prompt_weight, bias)
    time_rows = net.time_rows(torch.tensor(case.plan.timesteps, device=case.device)).detach()
    trunk = [part.detach() for layer in net.layers[1:] for part in (layer.weight, layer.bias)]
    inputs = (state, state_weight, init, time_rows, action_weight, trunk, case.table, key.to(case.device), None)
    constants = (case.plan.start, case.clip, case.samples, False)
    actions, chain = operators.chain_forward_cuda(*inputs, *constants, True)
    grad = torch.randn_like(actions)
    gradients = operators.chain_backward_cuda(grad, chain, *inputs, *constants, need_state)
    expected, sums = case.reference(case.noise(key), grad)
    wanted = {name: gradient.value for name, gradient in sums.items()}
    close(actions, expected, tolerances[False][0], "actions")
    d_state, d_state_weight, d_init, d_time_rows, d_action_weight, *d_trunk = gradients
    S, A = state.shape[1], net.action_dim
    first = wanted["layers.0.weight"]
    start = A + net.time_dim
    close(d_action_weight, first[:, :A], tolerances[False][1], "action weight")
    close(d_state_weight, first[:, start : start + S], tolerances[False][1], "state weight")
    assert d_time_rows.shape == time_rows.shape
    assert d_init.shape == init.shape
    close(d_init.sum(0) if own_prompts else d_init, wanted["layers.0.bias"], tolerances[False][1], "init")
    names = [f"layers.{layer}.{part}" for layer in (1, 2, 3) for part in ("weight", "bias")]
    for name, gradient in zip(names, d_trunk, strict=True):
        close(gradient, wanted[name], tolerances[False][1], name)
    if need_state:
        close(d_state, wanted["state"], tolerances[False][1], "state")
    else:
        assert d_state.numel() == 0
