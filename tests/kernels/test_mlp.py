"""The three-layer net of one member and of several against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
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


class Flat:
    """Weights of M members in one tensor [M, P], as learners' lie, and inputs of G groups of them."""

    def __init__(
        self, groups: int, share: int, B: int, inputs: int, H: int, outputs: int, rows: bool, device: torch.device
    ) -> None:
        M = groups * share
        # W1 are columns of a larger matrix, as the noise network's.
        shapes = [(H, inputs + 3), (H,), (H, H), (H,), (H, H), (H,), (outputs, H), (outputs,)]
        sizes = [int(np.prod(shape)) for shape in shapes]
        parts = torch.randn(M, sum(sizes), device=device).split(sizes, dim=1)
        self.weights = [part.view(M, *shape) for part, shape in zip(parts, shapes, strict=True)]
        for part in self.weights:
            part /= part.shape[-1] ** 0.5
        self.weights[0] = self.weights[0][:, :, 3:]
        if rows:
            self.weights[1] = torch.randn(M, B, H, device=device)
        self.x, self.share = torch.randn(groups, B, inputs, device=device), share
        self.grad = torch.randn(M, B, outputs, device=device)

    def learner(self, number: int) -> list[list[Tensor]]:
        """The members of one group, in tensors of their own."""
        begin = number * self.share
        return [[part[m].clone() for part in self.weights] for m in range(begin, begin + self.share)]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("groups", "share", "B", "outputs", "rows"), [(1, 2, 37, 1, False), (3, 2, 5, 1, False), (3, 1, 37, 3, True)]
)
def test_members_of_learners(
    device: torch.device, close: Callable[..., None], monkeypatch: pytest.MonkeyPatch, groups: int, share: int, B: int,
    outputs: int, rows: bool, bf16: bool,
) -> None:  # fmt: skip
    from llmdpd.kernels import mish_mlp as kernel
    from llmdpd.kernels.members import Members

    flat = Flat(groups, share, B, int(torch.randint(1, 20, ())), int(torch.randint(17, 64, ())), outputs, rows, device)
    members, x = Members.stacked(flat.weights), flat.x
    out, packed = kernel.forward(x, members, bf16)
    d_x, found = kernel.backward(flat.grad, x, members, packed, bf16, True, True)
    monkeypatch.setattr(kernel, "FEW_ROWS", 0)
    by_products = kernel.backward(flat.grad, x, members, packed, bf16, True, True)
    monkeypatch.undo()
    for number in range(groups):
        own = slice(number * share, (number + 1) * share)
        # Alone it has the same bits, whatever the others are.
        alone, grad = Members.of(flat.learner(number)), flat.grad[own].clone()
        one, packed_one = kernel.forward(x[number], alone, bf16)
        assert torch.equal(one, out[own])
        d_one, gradients = kernel.backward(grad, x[number], alone, packed_one, bf16, True, True)
        assert torch.equal(d_one, d_x[number])
        assert all(torch.equal(g, all_of[own]) for g, all_of in zip(gradients, found, strict=True))
    exact_x, exact = flat.x.cpu().double().requires_grad_(), [w.cpu().double().requires_grad_() for w in flat.weights]
    wanted = torch.stack(
        [mish_mlp_reference(exact_x[m // share], w[0], w[1], w[2:]) for m, w in enumerate(zip(*exact, strict=True))]
    )
    close(out, wanted, TOLERANCES[bf16][0])
    wanted_d = torch.autograd.grad(wanted, [exact_x, *exact], flat.grad.cpu().double())
    for made in ([d_x, *found], [by_products[0], *by_products[1]]):
        for name, one, other in zip(("x", *map(str, range(8))), made, wanted_d, strict=True):
            close(one, other, TOLERANCES[bf16][1], name)


def test_gradients_go_where_they_are_wanted(device: torch.device) -> None:
    """Into columns of a larger tensor, beside which nothing is written; twice the same bits."""
    from llmdpd.kernels import mish_mlp as kernel
    from llmdpd.kernels.members import Members

    flat = Flat(2, 2, 5, 70, 40, 2, False, device)
    members = Members.stacked(flat.weights)
    _, packed = kernel.forward(flat.x, members, False)
    _, found = kernel.backward(flat.grad, flat.x, members, packed, False, False, True)
    sizes = [part[0].numel() for part in found]
    made = torch.full((4, sum(sizes) + 9), 7.0, device=device)
    into = [part.view_as(like) for part, like in zip(made[:, 4:-5].split(sizes, dim=1), found, strict=True)]
    assert kernel.backward_into(flat.grad, flat.x, members, packed, False, False, into)[0] is None
    assert all(torch.equal(one, other) for one, other in zip(into, found, strict=True))
    assert (made[:, :4] == 7).all()
    assert (made[:, -5:] == 7).all()


def test_members_that_do_not_fit(device: torch.device) -> None:
    from llmdpd.kernels import mish_mlp as kernel
    from llmdpd.kernels.members import Members

    flat = Flat(1, 3, 5, 4, 20, 2, False, device)
    with pytest.raises(ValueError, match="3 members in 2 groups"):
        kernel.forward(torch.zeros(2, 5, 4, device=device), Members.stacked(flat.weights), False)
    with pytest.raises(ValueError, match="w2 is not contiguous"):
        Members.stacked([part.transpose(-1, -2) if number == 2 else part for number, part in enumerate(flat.weights)])
    with pytest.raises(ValueError, match="b4 of 2 members, and w1 of 3"):
        Members.stacked([*flat.weights[:7], flat.weights[7][:2]])


def test_no_row(device: torch.device) -> None:
    member = weights(device, 3, 20, 2, None)
    out = triton.mish_mlps(torch.zeros(0, 3, device=device), [member], False)
    assert out.shape == (1, 0, 2)
    assert all((part == 0).all() for part in torch.autograd.grad(out.sum(), member))
