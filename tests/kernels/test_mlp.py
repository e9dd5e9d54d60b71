"""The three-layer net of one or two members against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmdpd.ops import triton
from llmdpd.ops.mish_mlp import mish_mlp_reference

TOLERANCES = {False: (2e-5, 1e-4), True: (2e-2, 5e-2)}


def weights(device: torch.device, inputs: int, H: int, outputs: int, init_rows: int | None) -> list[Tensor]:
    shapes = [(H, inputs), (H,) if init_rows is None else (init_rows, H), (H, H), (H,), (H, H), (H,)]
    shapes += [(outputs, H), (outputs,)]
    parts = [torch.randn(shape, device=device) / max(1, shape[-1]) ** 0.5 for shape in shapes]
    # A slice of the columns of a larger matrix, as the noise network's.
    parts[0] = torch.cat([torch.randn(H, 2, device=device), parts[0]], dim=1)[:, 2:]
    return [part.requires_grad_() for part in parts]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("members", "B", "inputs", "H", "outputs", "per_row"),
    [(2, 19, 11, 33, 1, False), (1, 17, 40, 33, 4, True), (2, 3, 1, 130, 17, False)],
)
def test_forward_and_backward(
    device: torch.device, close: Callable[..., None], members: int, B: int, inputs: int, H: int, outputs: int,
    per_row: bool, bf16: bool,
) -> None:  # fmt: skip
    x = torch.randn(B, inputs, device=device, requires_grad=True)
    all_weights = [weights(device, inputs, H, outputs, B if per_row else None) for _ in range(members)]
    flat = [part for member in all_weights for part in member]
    out = triton.mish_mlps(x, all_weights, bf16)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *flat], grad, retain_graph=True)
    exact_x = x.detach().cpu().double().requires_grad_()
    exact = [[part.detach().cpu().double().requires_grad_() for part in member] for member in all_weights]
    wanted_out = torch.stack([mish_mlp_reference(exact_x, m[0], m[1], m[2:]) for m in exact])
    wanted = torch.autograd.grad(wanted_out, [exact_x, *(p for m in exact for p in m)], grad.cpu().double())
    close(out, wanted_out, TOLERANCES[bf16][0])
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        close(one, other, TOLERANCES[bf16][1], str(number))
    # A critic that does not learn: the inputs' gradient alone, and the same.
    (alone,) = torch.autograd.grad(triton.mish_mlps(x, [[p.detach() for p in m] for m in all_weights], bf16), x, grad)
    assert torch.equal(alone, found[0])


def test_no_row(device: torch.device) -> None:
    member = weights(device, 3, 20, 2, None)
    out = triton.mish_mlps(torch.zeros(0, 3, device=device), [member], False)
    assert out.shape == (1, 0, 2)
    assert all((part == 0).all() for part in torch.autograd.grad(out.sum(), member))
