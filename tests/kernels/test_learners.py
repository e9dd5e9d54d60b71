"""The chain of several learners in one launch, against each alone and against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdpd.ops.arguments import ChainArguments

TOLERANCES = {False: (2e-5, 1e-4), True: (2e-2, 5e-2)}
MakeCase = Callable[..., Any]


class Learners:
    """Networks of the same sizes whose weights lie in one tensor [L, P]."""

    def __init__(self, make_case: MakeCase, L: int, rng: np.random.Generator, **sizes: Any) -> None:
        first = make_case(**sizes)
        cases = [first, *(make_case(**sizes | {"plan": first.plan}) for _ in range(L - 1))]
        # One prompt for all states, which stands for the bias: learners read none.
        self.cases = [dataclasses.replace(case, prompt=case.prompt.detach()[0].clone()) for case in cases]
        self.keys = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, L)).to(first.device)
        self.alone = [case.call(key[None])[1] for case, key in zip(self.cases, self.keys, strict=True)]
        weights = torch.stack([torch.cat([p.detach().flatten() for p in case.net.parameters()]) for case in cases])
        self.chain = self._stacked(self._parts(weights))

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters [L, …], by name."""
        named = dict(self.cases[0].net.named_parameters())
        parts = flat.split([p.numel() for p in named.values()], dim=1)
        return {
            name: part.view(len(self.cases), *p.shape) for (name, p), part in zip(named.items(), parts, strict=True)
        }

    def _stacked(self, parts: dict[str, Tensor]) -> ChainArguments:
        W_a, W_s = self._first(parts)
        trunk = [parts[f"layers.{layer}.{part}"] for layer in (1, 2, 3) for part in ("weight", "bias")]
        u_z, tau, state = (torch.stack([getattr(one, name) for one in self.alone]) for name in ("u_z", "tau", "state"))
        return self.alone[0]._replace(state=state, W_s=W_s, u_z=u_z, tau=tau, W_a=W_a, trunk=trunk, key=self.keys)

    def _first(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """W_a and W_s, columns of the first layer's weight."""
        first, net = parts["layers.0.weight"], self.cases[0].net
        begin = net.action_dim + net.time_dim
        return first[..., : net.action_dim], first[..., begin : begin + net.state_dim]

    def gradients(self) -> tuple[dict[str, Tensor], Any]:
        """Memory for gradients that lie as the weights: by name, and as the kernels take them."""
        from llmdpd.kernels.learners import Gradients

        count = sum(p.numel() for p in self.cases[0].net.parameters())
        parts = self._parts(torch.full((len(self.cases), count), 7.0, device=self.keys.device))
        W_a, W_s = self._first(parts)
        trunk = [parts[f"layers.{layer}.{part}"] for layer in (1, 2, 3) for part in ("weight", "bias")]
        return parts, Gradients(W_s, parts["layers.0.bias"], torch.empty_like(self.chain.tau), W_a, trunk)


@pytest.mark.parametrize(
    ("L", "B", "A", "H", "bf16"),
    [(1, 37, 4, 50, False), (3, 5, 2, 33, False), (3, 5, 2, 33, True), (2, 20, 9, 70, True)],
)
def test_learners(
    make_case: MakeCase,
    close: Callable[..., None],
    rng: np.random.Generator,
    L: int,
    B: int,
    A: int,
    H: int,
    bf16: bool,
) -> None:
    from llmdpd.kernels import learners, reverse_diffusion

    made = Learners(make_case, L, rng, B=B, A=A, H=H, bf16=bf16, scale=1.0, clip=None if bf16 else 0.9)
    actions, tape, packed = learners.forward(made.chain, True)
    grad = torch.randn_like(actions)
    parts, into = made.gradients()
    learners.backward(grad, made.chain, tape, packed, into)
    W_a, W_s = made._first(parts)
    for number, (case, alone) in enumerate(zip(made.cases, made.alone, strict=True)):
        # Its noise, actions and tape are what they are alone, bit for bit.
        one, one_tape = reverse_diffusion.forward(alone, True)
        assert torch.equal(one, actions[number])
        assert torch.equal(one_tape, tape[number])
        found = {name: part[number] for name, part in parts.items()}
        wanted, sums = case.reference(case.noise(made.keys[number, None]), grad[number])
        close(actions[number], wanted, TOLERANCES[bf16][0])
        exact = {name: sums[name] for name in sums if name.startswith("layers") and name != "layers.0.weight"}
        first, begin = sums["layers.0.weight"], case.net.action_dim + case.net.time_dim
        for name, gradient in exact.items():
            close(found[name], gradient.value, TOLERANCES[bf16][1], name, gradient.size)
        for columns, part in ((slice(0, A), W_a), (slice(begin, begin + case.net.state_dim), W_s)):
            close(part[number], first.value[:, columns], TOLERANCES[bf16][1], "first layer", first.size)
        # Alone, gradients are summed by other products.
        u = torch.nn.functional.linear(alone.state, alone.W_s) + alone.u_z
        _, d_tau, *rest = reverse_diffusion.backward(grad[number], u, alone, one_tape)
        mine = [into.tau[number], into.W_a[number], *(part[number] for part in into.trunk)]
        trunk = [sums[f"layers.{layer}.{part}"].size for layer in (1, 2, 3) for part in ("weight", "bias")]
        for gradient, other, size in zip(mine, [d_tau, *rest], [0.0, first.size, *trunk], strict=True):
            close(gradient, other.cpu().double(), 2e-6 if not bf16 else 2e-3, size=size)
    # Nothing is written beside them: the time's columns and the prompt's are another's.
    net = made.cases[0].net
    assert (parts["layers.0.weight"][..., A : A + net.time_dim] == 7).all()
    assert (parts["layers.0.weight"][..., -net.prompt_dim :] == 7).all()


def test_tiles_of_many_rows(make_case: MakeCase, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows in all choose other tiles than few alone; tiles that go past a learner's rows stay its own."""
    from llmdpd.kernels import learners, reverse_diffusion, tiles

    made = Learners(make_case, 2, rng, B=20, H=20, bf16=True)
    few, _, _ = learners.forward(made.chain, False)
    monkeypatch.setattr(tiles, "SMS", 1)
    many, _, _ = learners.forward(made.chain, False)
    assert not torch.equal(few, many)
    for number, alone in enumerate(made.alone):
        assert torch.equal(reverse_diffusion.forward(alone, False)[0], many[number])


def test_what_does_not_fit(make_case: MakeCase, rng: np.random.Generator) -> None:
    from llmdpd.kernels import learners

    made = Learners(make_case, 2, rng, B=3, H=20)
    chain = made.chain
    for wrong in (
        {"W_a": chain.W_a.contiguous()},
        {"trunk": [part.transpose(-1, -2) for part in chain.trunk]},
        {"samples": 2},
        {"key": chain.key[:1]},
        {"u_z": torch.zeros(2, 3, 20)},
    ):
        with pytest.raises(ValueError, match=r"learners|contiguous"):
            learners.forward(chain._replace(**wrong), False)
