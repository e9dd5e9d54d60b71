"""The fused reverse chain on a CUDA device: forward in one launch, backward in one launch and a few matrix products.

Everything is on one device, outputs come from `torch.empty`, and nothing waits for the device, so all of it can be
captured in a CUDA graph. Under TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from llmdpd import kernels

from .backward import backward_kernel
from .forward import forward_kernel
from .launch import Launch, Wide
from .pack import pack_kernel
from .products import gradients
from .tiles import Operands, Tile, backward_tile, forward_tile, padded_actions, padded_states, padded_width

if TYPE_CHECKING:
    from llmdpd.ops.arguments import ChainArguments

SCRATCH_BYTES = 512 << 20
"""Bound on what the backward pass keeps for the weight gradients at a time; larger batches go in several launches."""


PACKED_ROWS = 8
"""Rows of weights that a program packs; it divides every padded width."""


def compute_type(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def capability_of(device: torch.device) -> int:
    """Compute capability, 10 x major + minor; where kernels are interpreted any will do."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def operands_of(bf16: bool) -> Operands:
    return "bf16" if bf16 else kernels.fp32_products()


def precisions(bf16: bool) -> dict[str, Any]:
    """The operands of the trunk, and how the products of float32 ones, W_a a always among them, are computed."""
    return {"FP32": kernels.fp32_products(), "COMPUTE": tl.bfloat16 if bf16 else tl.float32}


class Packed(NamedTuple):
    """Weights as the kernels read them, and the launch that fills them."""

    launch: Launch
    trunk: Tensor
    """w2, w3, w4 in the compute precision: [2 HP + AP, HP]."""
    W_a: Tensor
    """W_a^T in float32: [AP, HP]."""
    W_s: Tensor
    """W_s^T in float32: [SP, HP]."""
    biases: Tensor | None = None
    """Of learners: u_z, b2, b3, b4, [L, 3 HP + AP]. Those of a single one are read where they are."""

    def arguments(self, chain: ChainArguments) -> dict[str, Tensor | None]:
        """The network's weights by the names of the kernels' arguments."""
        if self.biases is not None:  # the others are found from the first
            return {"W_a": self.W_a, "w2": self.trunk, "b2": self.biases} | dict.fromkeys(("w3", "b3", "w4", "b4"))
        HP = self.trunk.shape[1]
        _, b2, _, b3, _, b4 = chain.trunk
        return {
            "W_a": self.W_a, "w2": self.trunk, "b2": b2, "w3": self.trunk[HP:], "b3": b3,
            "w4": self.trunk[2 * HP :], "b4": b4,
        }  # fmt: skip


def several(chain: ChainArguments) -> list[int]:
    """[L] where the arguments are those of L learners (`learners.py`), else []."""
    return list(chain.W_a.shape[:-2])


def pack(chain: ChainArguments) -> Packed:
    """Memory for the packed weights, of learners one after another: [L, …]."""
    W_a, W_s, (w2, b2, w3, b3, w4, b4) = chain.W_a, chain.W_s, chain.trunk
    (H, A), S, each = W_a.shape[-2:], W_s.shape[-1], several(chain)
    HP, AP, SP, like = padded_width(H), padded_actions(A), padded_states(S), w2
    trunk = like.new_empty(*each, 2 * HP + AP, HP, dtype=compute_type(chain.bf16))
    packed_actions, packed_states = like.new_empty(*each, AP, HP), like.new_empty(*each, SP, HP)
    biases = like.new_empty(*each, 3 * HP + AP) if each else None
    read = {"u_z": chain.u_z, "b2": b2, "b3": b3, "b4": b4} if each else dict.fromkeys(("u_z", "b2", "b3", "b4"))
    if not each:
        w2, w3, w4 = (w if w.stride(1) == 1 else w.contiguous() for w in (w2, w3, w4))
    arguments = {
        "W_a": W_a, "W_s": W_s, "w2": w2, "w3": w3, "w4": w4, **read,
        "packed": trunk, "packed_actions": packed_actions, "packed_states": packed_states, "biases": biases,
        "wa_rows": W_a.stride(-2), "wa_columns": W_a.stride(-1),
        "ws_rows": W_s.stride(-2), "ws_columns": W_s.stride(-1),
        "w2_rows": w2.stride(-2), "w3_rows": w3.stride(-2), "w4_rows": w4.stride(-2),
        "weights_next": Wide(W_a.stride(0)) if each else None, "u_z_next": Wide(chain.u_z.stride(0)) if each else None,
    }  # fmt: skip
    constants, programs = {"S": S, "SP": SP, "H": H, "A": A, "HP": HP, "AP": AP, "BM": PACKED_ROWS}, max(HP, AP)
    launch = Launch(pack_kernel, programs // PACKED_ROWS, arguments, constants, 4, 1, members=math.prod(each))
    return Packed(launch, trunk, packed_actions, packed_states, biases)


def _contiguous(chain: ChainArguments) -> ChainArguments:
    """All that the kernels read in place; weights are packed."""
    trunk = [part if part.ndim == 2 else part.contiguous() for part in chain.trunk]
    noise = None if chain.noise is None else chain.noise.contiguous()
    state, u_z, tau, table, key = (x.contiguous() for x in (chain.state, chain.u_z, chain.tau, chain.table, chain.key))
    return chain._replace(state=state, u_z=u_z, tau=tau, trunk=trunk, table=table, key=key, noise=noise)


def workspace_floats(rows: int, H: int, A: int, bf16: bool, capability: int, learners: int = 1) -> tuple[int, int]:
    """Floats that the programs of a forward launch write to and read again: contexts, and h2 where it passes through.

    The second is 0 where it does not. rows: of each of so many learners.
    """
    # By one learner's rows: its bits don't depend on how many learners there are.
    tile = forward_tile(rows, H, A, operands_of(bf16), capability)
    padded = -(-rows // tile.BM) * tile.BM * learners
    return padded * H, 0 if tile.WHOLE else padded * padded_width(H) * compute_type(bf16).itemsize // 4


def forward_launch(
    packed: Packed,
    chain: ChainArguments,
    actions: Tensor,
    tape: Tensor,
    seed: int | None = None,
    work: Sequence[Tensor] | None = None,
    capability: int | None = None,
) -> Launch:
    """The forward launch, which fills actions [B, N, A] and the tape [K + 1, B, N, A] (or none, where it is empty).

    seed: the noise's key by value, instead of what is in memory as chain.key. work: contexts and scratch
    (`workspace_floats`), by default new ones.
    """
    state, K, (H, A), samples, bf16 = chain.state, chain.tau.shape[-2], chain.W_a.shape[-2:], chain.samples, chain.bf16
    (B, S), capability, learners = state.shape[-2:], capability or capability_of(state.device), several(chain)
    rows, count = B * samples, math.prod(learners)
    tile = forward_tile(rows, H, A, operands_of(bf16), capability)
    if work is None:
        work = [state.new_empty(floats) for floats in workspace_floats(rows, H, A, bf16, capability, count)]
    contexts, scratch = work[0], work[1].view(compute_type(bf16))
    arguments = {
        "states": state, "W_s": packed.W_s, "u_z": packed.biases if learners else chain.u_z, "tau": chain.tau,
        **packed.arguments(chain),
        "table": chain.table, "key": chain.key if seed is None else None, "seed": Wide(seed or 0),
        "noise": chain.noise, "actions": actions, "chain": tape, "contexts": contexts, "scratch": scratch,
        "rows": rows, "steps": K, "start": float(chain.start), "clip": float(chain.clip),
    }  # fmt: skip
    constants = {
        "SAMPLES": samples, "S": S, "SP": padded_states(S), "H": H, "A": A,
        "HP": padded_width(H), "AP": padded_actions(A), "PROMPTS": not learners and chain.u_z.ndim == 2,
        "KEYED": seed is None and not learners and (chain.key.shape[0] != 1 or B == 1),
        "GIVEN": chain.noise is not None, "KEEP": tape.numel() > 0, "LEARNERS": bool(learners),
        "BM": tile.BM, "BK": tile.BK, "BN": tile.BN, "WHOLE": tile.WHOLE,
        **precisions(bf16),
    }  # fmt: skip
    programs = -(-rows // tile.BM)
    return Launch(forward_kernel, programs, arguments, constants, tile.warps, tile.stages, members=count)


def forward(chain: ChainArguments, keep: bool) -> tuple[Tensor, Tensor]:
    """a_0 [B, N, A]; where `keep`, also the tape: a_K … a_0 before its bound, [K + 1, B, N, A]."""
    chain, packed = _contiguous(chain), pack(chain)
    state, K, A = chain.state, chain.tau.shape[0], chain.W_a.shape[1]
    shape = (state.shape[0], chain.samples, A)
    actions, tape = state.new_empty(shape), state.new_empty((K + 1, *shape) if keep else (0,))
    packed.launch.run()
    forward_launch(packed, chain, actions, tape).run()
    return actions, tape


@dataclass
class Kept:
    """What one backward launch writes, in the compute precision. R: its rows, padded to whole tiles.

    Where there are L learners a dimension [L] stands before K's.
    """

    hidden: Tensor
    """h1, h2, h3: [3, K, R, HP]."""
    slopes: Tensor
    """dz1, dz2, dz3, alike."""
    taken: Tensor
    """The actions [K, R, AP]."""
    d_out: Tensor
    """d epsilon [K, R, AP]."""


def _kept(
    rows: int, K: int, H: int, A: int, tile: Tile, bf16: bool, device: torch.device, learners: Sequence[int]
) -> Kept:
    """Room for a launch's rows: in equal launches, as few as `SCRATCH_BYTES` allows; of learners, for all at once."""
    HP, AP, kind = padded_width(H), padded_actions(A), compute_type(bf16)
    tiles = -(-rows // tile.BM)
    tile_bytes = tile.BM * K * (6 * HP + 2 * AP) * kind.itemsize
    launches = 1 if learners else -(-tiles // max(1, SCRATCH_BYTES // tile_bytes))
    padded = -(-tiles // launches) * tile.BM

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    wide, narrow = (3, *learners, K, padded, HP), (*learners, K, padded, AP)
    return Kept(new(*wide), new(*wide), new(*narrow), new(*narrow))


def backward_launches(
    grad_actions: Tensor, u: Tensor, packed: Packed, chain: ChainArguments, tape: Tensor, capability: int | None = None
) -> tuple[Iterator[tuple[int, Launch]], Kept]:
    """The backward launches with their first rows, one after another on the same buffers, and the buffers.

    Of learners it is one launch, whose buffers are as large as they must be.
    """
    (B, H), K, A, samples, bf16 = u.shape[-2:], chain.tau.shape[-2], chain.W_a.shape[-1], chain.samples, chain.bf16
    HP, AP, rows, learners = padded_width(H), padded_actions(A), B * samples, several(chain)
    count = math.prod(learners)
    tile = backward_tile(rows, H, operands_of(bf16), capability or capability_of(u.device))
    kept = _kept(rows, K, H, A, tile, bf16, u.device, learners)
    padded = kept.taken.shape[-2]
    constants = {
        "SAMPLES": samples, "H": H, "A": A, "HP": HP, "AP": AP, "LEARNERS": bool(learners),
        "BM": tile.BM, "BK": tile.BK, "BN": tile.BN, "WHOLE": tile.WHOLE, **precisions(bf16),
    }  # fmt: skip

    def launch(begin: int) -> Launch:
        arguments = {
            "grad_actions": grad_actions, "u": u, "tau": chain.tau, **packed.arguments(chain), "table": chain.table,
            "chain": tape, **vars(kept), "rows": rows, "begin": begin,
            "padded": padded, "steps": K, "clip": float(chain.clip),
        }  # fmt: skip
        # A launch's last tiles may have no row: they write zeros, so that every row of the buffers is a number.
        programs = padded // tile.BM
        return Launch(backward_kernel, programs, arguments, constants, tile.warps, tile.stages, members=count)

    return ((begin, launch(begin)) for begin in range(0, rows, padded)), kept


def backward(grad_actions: Tensor, u: Tensor, chain: ChainArguments, tape: Tensor) -> list[Tensor]:
    """The gradients of u [B, H], tau, W_a, W2, b2, W3, b3, W4, b4 from that of a_0 [B, N, A]."""
    (H, A), B, samples = chain.W_a.shape, u.shape[0], chain.samples
    if B == 0:
        return [u.new_zeros(0, H), *(torch.zeros_like(part) for part in (chain.tau, chain.W_a, *chain.trunk))]
    chain, packed = _contiguous(chain), pack(chain)
    packed.launch.run()
    grad_actions, u, tape = (x.contiguous() for x in (grad_actions, u, tape))
    launches, kept = backward_launches(grad_actions, u, packed, chain, tape)
    total: list[Tensor] = []
    slopes = []
    for begin, launch in launches:
        launch.run()
        slopes.append(kept.slopes[0, :, : B * samples - begin, :H].sum(0, dtype=torch.float32))
        part = gradients(kept.hidden, kept.slopes, kept.taken, kept.d_out, H, A)
        total = [x + y for x, y in zip(total, part, strict=True)] if total else part
    d_u = slopes[0] if len(slopes) == 1 else torch.cat(slopes)
    if samples > 1:
        d_u = d_u.view(B, samples, H).sum(1)
    return [d_u, *total]
