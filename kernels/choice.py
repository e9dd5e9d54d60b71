"""Which of N samples of a state acts, by a softmax over their values: one program a state.

`llmdpd.methods.llmdpd.network` defines it in PyTorch, where the one random number of a state takes some 390 launches.
Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .philox import box_muller, philox4x32


@triton.jit(do_not_specialize=["draw"])
def choice_kernel(
    values, actions, keys, chosen, draw,
    N: tl.constexpr, NP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """State program_id(0): its action [A] of N, by values [N]; its random number is that of its key and this draw."""
    state, sample, column = tl.program_id(0).to(tl.int64), tl.arange(0, NP), tl.arange(0, AP)
    there = sample < N
    value = tl.load(values + state * N + sample, mask=there, other=-float("inf")).to(tl.float64) / TEMPERATURE
    weight = tl.where(there, tl.exp(value - tl.max(value, 0)), 0.0)
    cumulative = tl.cumsum(weight / tl.sum(weight, 0), 0)
    key, zero = tl.load(keys + state), tl.zeros([1], tl.uint32)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, _, _ = philox4x32(zero, zero + draw.to(tl.uint32), zero, zero, zero + low, zero + high)
    normal, _ = box_muller(w0, w1)
    # The normal distribution's function.
    uniform = 0.5 + 0.5 * tl.erf(tl.sum(normal, 0).to(tl.float64) * 0.7071067811865476)
    below = tl.sum((there & (cumulative < uniform)).to(tl.int32), 0)
    choice = tl.minimum(below, N - 1)
    action = tl.load(actions + (state * N + choice) * A + column, mask=column < A, other=0.0)
    tl.store(chosen + state * A + column, action, mask=column < A)


def launch(values: Tensor, actions: Tensor, keys: Tensor, chosen: Tensor, draw: int, temperature: float) -> Launch:
    """The launch that fills chosen [B, A] from actions [B, N, A], by values [B, N] and keys int64 [B]."""
    B, N, A = actions.shape
    arguments = {"values": values, "actions": actions, "keys": keys, "chosen": chosen, "draw": draw}
    NP, AP = triton.next_power_of_2(N), triton.next_power_of_2(A)
    constants = {"N": N, "NP": NP, "A": A, "AP": AP, "TEMPERATURE": float(temperature)}
    return Launch(choice_kernel, B, arguments, constants, 1, 1)
