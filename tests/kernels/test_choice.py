"""The soft choice among samples in Triton against PyTorch's in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.diffusion import sampler_coefficients
from llmdpd.methods.llmdpd import network as module
from llmdpd.nn.acting import BestOfN
from llmdpd.nn.context import Condition
from llmdpd.ops import device_choice, triton
from llmdpd.ops.philox import philox_normal

NEAR = 4e-6  # of a border, where float32's noise may fall to the other side


def borders(values: Tensor, temperature: float) -> Tensor:
    return (values.double() / temperature).softmax(1).cumsum(1)


@pytest.mark.parametrize(
    ("B", "N", "A", "temperature"), [(40, 50, 4, 1.0), (7, 2, 1, 0.3), (9, 33, 17, 5.0), (5, 64, 3, 1e-3)]
)
def test_the_choice(device: torch.device, rng: np.random.Generator, B: int, N: int, A: int, temperature: float) -> None:
    values, actions = torch.randn(B, N, device=device), torch.rand(B, N, A, device=device)
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, B)).to(device)
    found = device_choice.chosen(values, actions, seeds, 6, temperature)
    uniform = torch.special.ndtr(philox_normal(seeds, B, 1, 7, 1, device)[-1, :, 0, 0])[:, None]
    ends = borders(values, temperature)
    wanted = (ends < uniform).sum(1).clamp_max(N - 1)
    sure = ((ends - uniform).abs() > NEAR).all(1)
    assert sure.float().mean() > 0.9
    expected = actions[torch.arange(B, device=device), wanted]
    assert torch.equal(found[sure], expected[sure])
    assert len({*wanted.tolist()}) > 1 or temperature < 0.01


def test_values_that_are_far_apart_or_none(device: torch.device) -> None:
    values = torch.full((3, 5), -1e30, device=device)
    values[0, 3], values[1, 4], values[2] = 1e30, 0.0, float("nan")
    actions = torch.arange(15.0, device=device).view(3, 5, 1)
    found = device_choice.chosen(values, actions, torch.arange(3, device=device), 6, 1.0)
    assert found[:2, 0].tolist() == [3.0, 9.0]
    assert found[2, 0] in actions[2]
    assert device_choice.chosen(values[:0], actions[:0], torch.arange(0, device=device), 6, 1.0).shape == (0, 1)


def test_policies_choose_by_it(
    device: torch.device, make_net: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """`sample_actions` with the kernel and without, by critics of their own."""
    B, N = 24, 8
    found = torch.rand(B, N, 3, device=device)
    monkeypatch.setattr(module, "reverse_diffusion", lambda *_, **__: found)

    class Critic:
        def minimum(self, states: Tensor, actions: Tensor, prompts: Tensor, precision: str) -> Tensor:
            return 3 * actions.sum(-1)

    condition = Condition(torch.zeros(B, 2, device=device), torch.zeros(2, device=device))
    seeds = torch.from_numpy(rng.integers(0, 2**62, B)).to(device)
    arguments: Any = (None, Critic(), condition, sampler_coefficients("ddpm", steps=5), BestOfN(samples=N), seeds)
    monkeypatch.setattr(device_choice, "may_choose", lambda values: False)
    wanted = module.sample_actions(*arguments)
    monkeypatch.setattr(device_choice, "may_choose", lambda values: True)
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    by_kernel: list[int] = []
    chosen = device_choice.chosen
    monkeypatch.setattr(device_choice, "chosen", lambda *a: by_kernel.append(1) or chosen(*a))
    same = (module.sample_actions(*arguments) == wanted).all(1)
    assert by_kernel == [1]
    assert same.float().mean() > 0.9
