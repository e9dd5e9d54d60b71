"""The reverse chain of several learners at once: what `reverse_diffusion` does for one, in the same number of launches.

Learners have the same sizes, a batch of their own each, and no prompts. The arguments are `ChainArguments` with a
leading dimension L: state [L, B, S], W_s [L, H, S], u_z [L, H], tau [L, K, H], W_a [L, H, A], trunk [L, …] each, key
int64 [L]; the table [K, 6] is the same for all, noise is None, and N = 1. A learner's weights are views into one tensor
[L, P]. Its noise is that of its key alone, and its actions have the bits that they have alone by the same tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .launch import Launch
from .members import Members
from .reverse_diffusion import Kept, Packed, backward_launches, forward_launch, pack, precisions
from .weight_gradients import weight_launch

if TYPE_CHECKING:
    from llmdpd.ops.arguments import ChainArguments


class Gradients(NamedTuple):
    """Where gradients go: views of any place whose columns are contiguous, shaped as the arguments."""

    W_s: Tensor
    """[L, H, S]."""
    u_z: Tensor
    """[L, H]: the bias's."""
    tau: Tensor
    """[L, K, H], contiguous."""
    W_a: Tensor
    """[L, H, A]."""
    trunk: Sequence[Tensor]
    """W2, b2, W3, b3, W4, b4, [L, …]."""


def forward(chain: ChainArguments, keep: bool) -> tuple[Tensor, Tensor, Packed]:
    """a_0 [L, B, 1, A]; where `keep`, also the tape, [L, K + 1, B, 1, A]; and the packed weights for the backward pass.

    Two launches.

    Raises:
        ValueError: arguments that are not as this module says.
    """
    chain = _checked(chain)
    packed, (L, B, _), K, A = pack(chain), chain.state.shape, chain.tau.shape[1], chain.W_a.shape[2]
    actions = chain.state.new_empty(L, B, 1, A)
    tape = chain.state.new_empty((L, K + 1, B, 1, A) if keep else (0,))
    packed.launch.run()
    forward_launch(packed, chain, actions, tape).run()
    return actions, tape, packed


def backward(grad_actions: Tensor, chain: ChainArguments, tape: Tensor, packed: Packed, into: Gradients) -> None:
    """Write the gradients of the weights from that of a_0 [L, B, 1, A], given what `forward` returned.

    Two launches and a product, u [L, B, H]. All rows of all learners are kept meanwhile: L B K (6 HP + 2 AP) numbers.
    """
    chain = _checked(chain)
    u = torch.baddbmm(chain.u_z[:, None], chain.state, chain.W_s.transpose(1, 2))
    for launch in launches_back(grad_actions.contiguous(), u, chain, tape, packed, into):
        launch.run()


def launches_back(
    grad_actions: Tensor,
    u: Tensor,
    chain: ChainArguments,
    tape: Tensor,
    packed: Packed,
    into: Gradients,
    capability: int | None = None,
) -> list[Launch]:
    """The launches of `backward`, in their order: the chain's, then the sums over its rows and steps."""
    launches, kept = backward_launches(grad_actions, u, packed, chain, tape, capability)
    ((_, launch),) = launches
    return [launch, _of_weights(kept, chain, into)]


def _of_weights(kept: Kept, chain: ChainArguments, into: Gradients) -> Launch:
    if not into.tau.is_contiguous():
        raise ValueError("tau's gradient is not contiguous")
    weights, rows = Members.stacked([into.W_a, into.u_z, *into.trunk]), chain.state.shape[1]
    of_states = chain.state, into.W_s
    how = precisions(chain.bf16)
    return weight_launch(kept.hidden, kept.slopes, kept.d_out, kept.taken, weights, rows, how, 1, of_states, into.tau)


def _checked(chain: ChainArguments) -> ChainArguments:
    """The arguments with what is read in place contiguous, after a look at what the kernels take for granted."""
    weights = [chain.W_a, chain.W_s, *chain.trunk]
    apart = [weight.stride(0) for weight in weights]
    if len(chain.state) > 1 and len(set(apart)) > 1:
        raise ValueError(f"learners' weights at different distances: {apart}")
    if any(weight.stride(-1) != 1 for weight in weights[2:]):
        raise ValueError("a row of a layer's weights that is not contiguous")
    L = len(chain.state)
    if chain.samples != 1 or chain.noise is not None or chain.key.shape != (L,) or chain.u_z.ndim != 2:
        raise ValueError("learners sample one action a state, each by a key of its own, and without prompts")
    state, tau, table, key = (x.contiguous() for x in (chain.state, chain.tau, chain.table, chain.key))
    return chain._replace(state=state, tau=tau, table=table, key=key)
