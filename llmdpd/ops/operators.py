"""The fused operations as PyTorch operators: `torch.ops.llmdpd.reverse_diffusion` and `.mish_mlp`.

Each has a fake implementation and a gradient, so that `torch.compile`, CUDA graphs and `torch.library.opcheck` work
with it. They are registered through `torch.library.Library` directly: a call costs a third of what one of `custom_op`'s
does. C++ computes them on the CPU, Triton computes the chain on CUDA. They check nothing: callers use
`llmdpd.diffusion.reverse_diffusion` and `llmdpd.ops.mish_mlp.mish_mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llmdpd.ops import native, triton
from llmdpd.ops.arguments import ChainArguments
from llmdpd.ops.compiling import constant_when_compiled

# Where a tape would be larger, the backward pass computes the forward pass again, one block of rows after another.
TAPE_LIMIT = 1 << 30  # bytes

_library = torch.library.Library("llmdpd", "DEF")
# `ChainArguments`, field by field.
_CHAIN = (
    "Tensor state, Tensor W_s, Tensor u_z, Tensor tau, Tensor W_a, Tensor[] trunk, "
    "Tensor table, Tensor key, Tensor? noise, float start, float clip, int samples, bool bf16"
)
_MLP = "Tensor x, Tensor input_weight, Tensor init, Tensor[] trunk, bool bf16"
_library.define(f"reverse_diffusion({_CHAIN}, bool keep) -> (Tensor, Tensor)")
_library.define(f"reverse_diffusion_backward(Tensor grad, Tensor tape, {_CHAIN}, bool need_state) -> Tensor[]")
_library.define(f"mish_mlp({_MLP}, bool keep) -> (Tensor, Tensor)")
_library.define(f"mish_mlp_backward(Tensor grad, Tensor tape, {_MLP}, bool need_x, bool need_weights) -> Tensor[]")


# The tape: what the C++ forward pass keeps for the backward pass.


@constant_when_compiled
def _tape_sizes(
    hidden: int, outputs: int, action_dim: int, samples: int, steps: int, bf16: bool
) -> tuple[int, int, int]:
    """Rows of a row block, floats for each row, further floats for each row block."""
    sizes: tuple[int, int, int] = tuple(native.module().tape_sizes(hidden, outputs, action_dim, samples, steps, bf16))
    return sizes


def tape_floats(rows: int, hidden: int, outputs: int, action_dim: int, samples: int, steps: int, bf16: bool) -> int:
    """Number of floats of the tape for `rows` (states times samples, or a symbol)."""
    block_rows, row_floats, block_floats = _tape_sizes(hidden, outputs, action_dim, samples, steps, bf16)
    blocks = (rows + block_rows - 1) // block_rows
    return (rows + blocks) * row_floats + blocks * block_floats


def chain_tape_floats(chain: ChainArguments) -> int:
    (hidden, action_dim), steps, samples = chain.W_a.shape, chain.tau.shape[0], chain.samples
    return tape_floats(chain.state.shape[0] * samples, hidden, action_dim, action_dim, samples, steps, chain.bf16)


def mlp_tape_floats(x: Tensor, trunk: Sequence[Tensor], bf16: bool) -> int:
    outputs, hidden = trunk[4].shape
    return tape_floats(x.shape[0], hidden, outputs, 0, 1, 1, bf16)


def keeps_tape(floats: int) -> bool:
    """Whether a tape of that size is kept."""
    return 4 * floats <= TAPE_LIMIT


def _new_tape(like: Tensor, floats: int) -> Tensor:
    """Memory for a tape; on the CPU from a pool, since the system takes pages of megabytes back when they are freed."""
    if isinstance(like, FakeTensor) or like.device.type == "meta":
        return like.new_empty(floats, dtype=torch.float32)
    return torch.from_numpy(native.module().pooled_buffer(floats))


# The chain. Its fake implementations are also where its outputs are allocated.


def _chain_outputs(chain: ChainArguments, keep: bool) -> tuple[Tensor, Tensor]:
    """a_0 [B, N, A], and the tape (on CUDA: a_K … a_0, [K + 1, B, N, A])."""
    state, samples, action_dim = chain.state, chain.samples, chain.W_a.shape[1]
    actions = state.new_empty(state.shape[0], samples, action_dim, dtype=torch.float32)
    if not keep:
        return actions, state.new_empty(0, dtype=torch.float32)
    if state.device.type == "cuda":
        shape = (chain.tau.shape[0] + 1, state.shape[0], samples, action_dim)
        return actions, state.new_empty(shape, dtype=torch.float32)
    return actions, _new_tape(state, chain_tape_floats(chain))


def _chain_gradients(chain: ChainArguments, need_state: bool) -> list[Tensor]:
    """Memory for the gradients of the first six arguments, the trunk last; empty for the state where not needed."""
    state = chain.state.new_empty(chain.state.shape if need_state else (0,))
    return [state, *(tensor.new_empty(tensor.shape) for tensor in (*chain[1:5], *chain.trunk))]


def chain_forward_cpu(chain: ChainArguments, keep: bool) -> tuple[Tensor, Tensor]:
    """The outputs, computed in C++."""
    actions, tape = _chain_outputs(chain, keep)
    native.chain_forward(chain, actions, tape)
    return actions, tape


def chain_backward_cpu(grad: Tensor, tape: Tensor, chain: ChainArguments, need_state: bool) -> list[Tensor]:
    """The gradients, computed in C++."""
    gradients = _chain_gradients(chain, need_state)
    native.chain_backward(chain, grad, tape, gradients, need_state)
    return gradients


def _chain_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, trunk, table, key, noise, start, clip, samples, bf16, _ = inputs
    ctx.constants = (start, clip, samples, bf16)
    ctx.has_noise = noise is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the tape would get a gradient of megabytes of zeros
    ctx.save_for_backward(output[1], *tensors, *trunk, table, key, *([noise] if noise is not None else []))


def _chain_autograd(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (*[None] * 5, [None] * 6, *[None] * 8)
    tape, *saved = ctx.saved_tensors
    tensors, trunk, (table, key, *noise) = saved[:5], saved[5:11], saved[11:]
    need_state = ctx.needs_input_grad[0]
    gradients = torch.ops.llmdpd.reverse_diffusion_backward(
        grad, tape, *tensors, trunk, table, key, noise[0] if ctx.has_noise else None, *ctx.constants, need_state
    )
    return (gradients[0] if need_state else None, *gradients[1:5], gradients[5:], *[None] * 8)


# The three-layer net. `mlp` stands for (x, input weight, init, trunk, bf16).


def _mlp_outputs(mlp: tuple[Any, ...], keep: bool) -> tuple[Tensor, Tensor]:
    x, _, _, trunk, bf16 = mlp
    out = x.new_empty(x.shape[0], trunk[4].shape[0])
    return out, _new_tape(x, mlp_tape_floats(x, trunk, bf16)) if keep else x.new_empty(0)


def _mlp_gradients(mlp: tuple[Any, ...], need_x: bool, need_weights: bool) -> list[Tensor]:
    """Memory for the gradients, each empty where it is not needed: x; the weights (all or none of them)."""
    x, input_weight, init, trunk, _ = mlp
    weights = (input_weight, init, *trunk)
    return [
        x.new_empty(x.shape if need_x else (0,)),
        *(tensor.new_empty(tensor.shape if need_weights else (0,)) for tensor in weights),
    ]


def mlp_forward_cpu(mlp: tuple[Any, ...], keep: bool) -> tuple[Tensor, Tensor]:
    """The outputs, computed in C++."""
    out, tape = _mlp_outputs(mlp, keep)
    native.mlp_forward(mlp, out, tape)
    return out, tape


def mlp_backward_cpu(
    grad: Tensor, tape: Tensor, mlp: tuple[Any, ...], need_x: bool, need_weights: bool
) -> list[Tensor]:
    """The gradients, computed in C++."""
    gradients = _mlp_gradients(mlp, need_x, need_weights)
    native.mlp_backward(mlp, grad, tape, gradients, need_x, need_weights)
    return gradients


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, input_weight, init, trunk, ctx.bf16, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, input_weight, init, *trunk)


def _mlp_autograd(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None, None, None, [None] * 6, None, None)
    tape, x, input_weight, init, *trunk = ctx.saved_tensors
    need_x, *weights = ctx.needs_input_grad[:4]
    # The reward term asks a critic that does not learn meanwhile.
    need_weights = any(any(need) if isinstance(need, (list, tuple)) else need for need in weights)
    gradients = torch.ops.llmdpd.mish_mlp_backward(
        grad, tape, x, input_weight, init, trunk, ctx.bf16, need_x, need_weights
    )
    first = gradients[0] if need_x else None
    if not need_weights:
        return (first, None, None, [None] * 6, None, None)
    return (first, *gradients[1:3], gradients[3:], None, None)


# Registration. The dispatcher passes flat arguments.


@torch.library.register_fake("llmdpd::reverse_diffusion", lib=_library)
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    return _chain_outputs(ChainArguments(*flat[:-1]), flat[-1])


@torch.library.impl(_library, "reverse_diffusion", "CPU")
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    return chain_forward_cpu(ChainArguments(*flat[:-1]), flat[-1])


@torch.library.impl(_library, "reverse_diffusion", "CUDA")
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    return triton.chain_forward(ChainArguments(*flat[:-1]), flat[-1])


@torch.library.register_fake("llmdpd::reverse_diffusion_backward", lib=_library)
def _(grad: Tensor, tape: Tensor, *flat: Any) -> list[Tensor]:
    return _chain_gradients(ChainArguments(*flat[:-1]), flat[-1])


@torch.library.impl(_library, "reverse_diffusion_backward", "CPU")
def _(grad: Tensor, tape: Tensor, *flat: Any) -> list[Tensor]:
    return chain_backward_cpu(grad, tape, ChainArguments(*flat[:-1]), flat[-1])


@torch.library.impl(_library, "reverse_diffusion_backward", "CUDA")
def _(grad: Tensor, tape: Tensor, *flat: Any) -> list[Tensor]:
    return triton.chain_backward(grad, tape, ChainArguments(*flat[:-1]), flat[-1])


@torch.library.register_fake("llmdpd::mish_mlp", lib=_library)
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    return _mlp_outputs(flat[:-1], flat[-1])


@torch.library.impl(_library, "mish_mlp", "CPU")
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    return mlp_forward_cpu(flat[:-1], flat[-1])


@torch.library.register_fake("llmdpd::mish_mlp_backward", lib=_library)
def _(grad: Tensor, tape: Tensor, *flat: Any) -> list[Tensor]:
    return _mlp_gradients(flat[:-2], *flat[-2:])


@torch.library.impl(_library, "mish_mlp_backward", "CPU")
def _(grad: Tensor, tape: Tensor, *flat: Any) -> list[Tensor]:
    return mlp_backward_cpu(grad, tape, flat[:-2], *flat[-2:])


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("the fused operators have no second derivative: use backend='reference', or float64 tensors")


torch.library.register_autograd("llmdpd::reverse_diffusion", _chain_autograd, setup_context=_chain_setup, lib=_library)
torch.library.register_autograd("llmdpd::mish_mlp", _mlp_autograd, setup_context=_mlp_setup, lib=_library)
for _name in ("reverse_diffusion_backward", "mish_mlp_backward"):
    torch.library.register_autograd(f"llmdpd::{_name}", _no_second_derivative, lib=_library)
