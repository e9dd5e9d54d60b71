"""The whole reverse chain of a tile of rows in one program. A row is one action of one state."""

# mypy: disable-error-code="no-untyped-def"
# (device code: triton has types of its own)
from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import fresh_zero, product, rounded
from .elementwise import bounded, mish
from .layers import columns, first_layer, narrow, of_learner, output_layer, transposed
from .philox import normals


@triton.jit
def epsilon_of(
    a, u, tau_k, W_a, w2, b2, w3, b3, w4, b4, exchange, state, live,
    H: tl.constexpr, A: tl.constexpr, TAKEN: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, FP32: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The network's outputs [BM, AP], A of them, for the actions a [BM, AP], of which it takes TAKEN numbers."""
    zero = fresh_zero()
    wide, column = zero + tl.arange(0, HP), tl.arange(0, AP)
    parts = columns(a, TAKEN, AP)
    z = tl.zeros([BM, HP], tl.float32) + tl.load(b2 + wide, mask=wide < H, other=0.0)[None, :]
    for begin in range(0, H, BK):
        inner = begin + tl.arange(0, BK)
        h = mish(first_layer(u, tau_k, W_a, state, live, a, parts, inner, H, TAKEN, HP, AP, FP32))
        z = product(rounded(h, COMPUTE), transposed(w2, inner, wide, HP), z, FP32)
    h2 = rounded(mish(z), COMPUTE)
    if not WHOLE:
        tl.debug_barrier()  # the last step's reads are done
        tl.store(exchange + tl.arange(0, BM)[:, None] * HP + wide[None, :], h2)
        tl.debug_barrier()
    epsilon = tl.zeros([AP, BM], tl.float32)
    zero = fresh_zero()
    for begin in range(0, H, BN):
        outer = zero + begin + tl.arange(0, BN)
        z3 = tl.zeros([BN, BM], tl.float32) + tl.load(b3 + outer, mask=outer < H, other=0.0)[:, None]
        h3 = mish(narrow(h2, exchange, w3, zero, outer, z3, False, H, HP, BM, BK, WHOLE, FP32))
        epsilon = output_layer(rounded(h3, COMPUTE), w4, outer, epsilon, HP, AP, FP32)
    return tl.trans(epsilon) + tl.load(b4 + column, mask=column < A, other=0.0)[None, :]


@triton.jit
def _xi(
    noise, key, seed, counter, state, live, number, place, held, count,
    BM: tl.constexpr, AP: tl.constexpr, KEYED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """xi number `number` of the chain, [BM, AP]: read where noise is given, else generated."""
    zero = fresh_zero()
    if GIVEN:
        return tl.load(noise + count * number + place + zero, mask=held, other=0.0)
    else:
        if key is None:
            word = seed.to(tl.int64) + tl.zeros([BM], tl.int64)
        elif KEYED:
            word = tl.load(key + state + zero, mask=live, other=0)
        else:
            word = tl.load(key + zero + tl.zeros([BM], tl.int32))
        k0, k1 = (word & 0xFFFFFFFF).to(tl.uint32), ((word >> 32) & 0xFFFFFFFF).to(tl.uint32)
        return normals((counter + zero).to(tl.uint32)[:, None], number, k0[:, None], k1[:, None], BM, AP)


@triton.jit
def context(
    states, W_s, u_z, contexts, state, live,
    S: tl.constexpr, SP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PROMPTS: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """Write the tile's u = W_s s + u_z, [BM, H], to `contexts`. W_s is packed: its transpose, [SP, HP]."""
    for begin in range(0, H, BN):
        outer = begin + tl.arange(0, BN)
        held = outer < H
        z = tl.zeros([BM, BN], tl.float32)
        if PROMPTS:
            z += tl.load(u_z + state[:, None] * H + outer[None, :], mask=live[:, None] & held[None, :], other=0.0)
        else:
            z += tl.load(u_z + outer, mask=held, other=0.0)[None, :]
        for first in range(0, SP, 16):
            feature = first + tl.arange(0, 16)
            there = live[:, None] & (feature < S)[None, :]
            s = tl.load(states + state[:, None] * S + feature[None, :], mask=there, other=0.0)
            z = product(s, tl.load(W_s + feature[:, None] * HP + outer[None, :]), z, FP32)
        tl.store(contexts + tl.arange(0, BM)[:, None] * H + outer[None, :], z, mask=held[None, :])
    tl.debug_barrier()


@triton.jit(do_not_specialize=["seed", "rows", "steps"])
def forward_kernel(
    states, W_s, u_z, tau, W_a, w2, b2, w3, b3, w4, b4, table, key, seed, noise, actions, chain, contexts, scratch,
    rows, steps, start, clip,
    SAMPLES: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    H: tl.constexpr, A: tl.constexpr, HP: tl.constexpr, AP: tl.constexpr,
    PROMPTS: tl.constexpr, KEYED: tl.constexpr, GIVEN: tl.constexpr, KEEP: tl.constexpr, LEARNERS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    FP32: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """a_0 of rows program_id * BM and on; chain: a_K … a_0, the last before its bound.

    The noise's key is `seed`, or where `key` is given read from there, one for all, or where KEYED one a state.
    PROMPTS: u_z is [B, H] and not [H]. contexts, scratch: room of the programs' own, [programs * BM, ·].

    LEARNERS: program_id(1) is a learner of several. Whatever is said above is each one's, and theirs follow one another
    but for the table, which is the same. Each has one key, and no noise is given. u_z is the first of the packed
    biases; what is not given is found from there and from w2, see `of_learner`.
    """
    begin, before = tl.program_id(0).to(tl.int64) * BM, 0
    if LEARNERS:
        learner = tl.program_id(1).to(tl.int64)
        before = tl.program_id(1) * steps
        W_a, w2, b2, w3, b3, w4, b4 = of_learner(learner, W_a, w2, u_z, HP, AP)
        W_s, u_z = W_s + learner * SP * HP, u_z + learner * (3 * HP + AP)
        key, states = key + learner, states + learner * (rows // SAMPLES) * S
        actions, chain = actions + learner * rows * A, chain + learner * rows * A * (steps + 1)
        own = learner * tl.num_programs(0) * BM
        contexts, scratch = contexts + own * H, scratch + own * HP
    local, column = tl.arange(0, BM), tl.arange(0, AP)
    live = local < rows - begin
    held = live[:, None] & (column < A)[None, :]
    # Pointers are a program's own begin plus a small offset: one register each, not two.
    place, count = local[:, None] * A + column[None, :], rows.to(tl.int64) * A
    noise, actions, chain = noise + begin * A if GIVEN else noise, actions + begin * A, chain + begin * A
    first, sample = begin // SAMPLES, (begin % SAMPLES).to(tl.int32) + local
    state, exchange, u = sample // SAMPLES, scratch + begin * HP, contexts + begin * H
    states, u_z = states + first * S, u_z + first * H if PROMPTS else u_z
    context(states, W_s, u_z, u, state, live, S, SP, H, HP, BM, BN, PROMPTS, FP32)
    key = key + first if KEYED else key
    counter = sample % SAMPLES if KEYED else begin.to(tl.int32) + local

    a = start * _xi(noise, key, seed, counter, state, live, 0, place, held, count, BM, AP, KEYED, GIVEN)
    tl.store(actions + place, tl.zeros([BM, AP], tl.float32), mask=held)
    if KEEP:
        tl.store(chain + place, a, mask=held)
    for step in range(steps):
        p_k, e_k = tl.load(table + step * 6), tl.load(table + step * 6 + 1)
        A_k, B_k = tl.load(table + step * 6 + 2), tl.load(table + step * 6 + 3)
        epsilon = epsilon_of(
            a, u, tau + (step + before) * H, W_a, w2, b2, w3, b3, w4, b4, exchange, local, live,
            H, A, A, HP, AP, BM, BK, BN, WHOLE, FP32, COMPUTE,
        )  # fmt: skip
        x0 = bounded(p_k * a + e_k * epsilon, clip)
        # The x0 before this one waits in memory: a tile of 64 rows has no register to spare meanwhile.
        tl.debug_barrier()
        x0_previous = tl.load(actions + fresh_zero() + place, mask=held, other=0.0)
        C_k = tl.load(table + step * 6 + 4)
        a = A_k * a + B_k * x0 + C_k * x0_previous
        tl.store(actions + fresh_zero() + place, x0, mask=held)
        S_k = tl.load(table + step * 6 + 5)
        if S_k != 0.0:
            xi = _xi(noise, key, seed, counter, state, live, step + 1, place, held, count, BM, AP, KEYED, GIVEN)
            a += S_k * xi
        if KEEP:
            tl.store(chain + count * (step + 1) + fresh_zero() + place, a, mask=held)
    tl.store(actions + place, bounded(a, clip), mask=held)
