"""The fused operations as PyTorch operators: `torch.ops.llmdpd.reverse_diffusion` and `.mish_mlp`.

Each has a fake implementation and a gradient, so that `torch.compile`, CUDA graphs and `torch.library.opcheck` work
with it. They are registered through `torch.library.Library` directly: a call costs a third of what one of `custom_op`'s
does. C++ computes them on the CPU, Triton computes the chain on CUDA. They check nothing: callers use
`llmdpd.diffusion.reverse_diffusion` and `llmdpd.ops.mish_mlp.mish_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llmdpd.ops import native, triton
from llmdpd.ops.arguments import ChainArguments, MlpArguments
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


def mlp_tape_floats(mlp: MlpArguments) -> int:
    outputs, hidden = mlp.trunk[4].shape
    return tape_floats(mlp.x.shape[0], hidden, outputs, 0, 1, 1, mlp.bf16)


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


# The three-layer net.


def _mlp_outputs(mlp: MlpArguments, keep: bool) -> tuple[Tensor, Tensor]:
    x = mlp.x
    out = x.new_empty(x.shape[0], mlp.trunk[4].shape[0])
    return out, _new_tape(x, mlp_tape_floats(mlp)) if keep else x.new_empty(0)


def _mlp_gradients(mlp: MlpArguments, need_x: bool, need_weights: bool) -> list[Tensor]:
    """Memory for the gradients, each empty where it is not needed: x; the weights (all or none of them)."""
    x = mlp.x.new_empty(mlp.x.shape if need_x else (0,))
    weights = (mlp.input_weight, mlp.init, *mlp.trunk)
    return [x, *(x.new_empty(tensor.shape if need_weights else (0,)) for tensor in weights)]


def mlps_forward_cpu(mlps: Sequence[MlpArguments], keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of nets of the same sizes and their tapes, computed in C++."""
    outs, tapes = map(list, zip(*(_mlp_outputs(mlp, keep) for mlp in mlps), strict=True))
    native.mlps_forward(mlps, outs, tapes)
    return outs, tapes


def mlp_forward_cpu(mlp: MlpArguments, keep: bool) -> tuple[Tensor, Tensor]:
    """The outputs, computed in C++."""
    (out,), (tape,) = mlps_forward_cpu([mlp], keep)
    return out, tape


def mlp_backward_cpu(grad: Tensor, tape: Tensor, mlp: MlpArguments, need_x: bool, need_weights: bool) -> list[Tensor]:
    """The gradients, computed in C++."""
    x, *weights = gradients = _mlp_gradients(mlp, need_x, need_weights)
    native.mlps_backward([mlp], [grad], [tape], [x] if need_x else [], [weights if need_weights else []])
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


# Registration.


def _flat(arguments: Callable[..., Any], function: Callable[..., Any], first: int = 0) -> Callable[..., Any]:
    """The function as the dispatcher calls it, which passes the NamedTuple's fields one by one from `first` on."""
    end = first + len(arguments._fields)  # type: ignore[attr-defined]
    return lambda *flat: function(*flat[:first], arguments(*flat[first:end]), *flat[end:])


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("the fused operators have no second derivative: use backend='reference', or float64 tensors")


for _name, _device, _implementation in (
    ("reverse_diffusion", "CPU", _flat(ChainArguments, chain_forward_cpu)),
    ("reverse_diffusion", "CUDA", _flat(ChainArguments, triton.chain_forward)),
    ("reverse_diffusion_backward", "CPU", _flat(ChainArguments, chain_backward_cpu, 2)),
    ("reverse_diffusion_backward", "CUDA", _flat(ChainArguments, triton.chain_backward, 2)),
    ("mish_mlp", "CPU", _flat(MlpArguments, mlp_forward_cpu)),
    ("mish_mlp_backward", "CPU", _flat(MlpArguments, mlp_backward_cpu, 2)),
):
    _library.impl(_name, _implementation, _device)
for _name, _arguments, _outputs, _gradients, _autograd, _setup in (
    ("reverse_diffusion", ChainArguments, _chain_outputs, _chain_gradients, _chain_autograd, _chain_setup),
    ("mish_mlp", MlpArguments, _mlp_outputs, _mlp_gradients, _mlp_autograd, _mlp_setup),
):
    _of_gradients = _flat(_arguments, lambda grad, tape, *rest, memory=_gradients: memory(*rest), 2)
    torch.library.register_fake(f"llmdpd::{_name}", _flat(_arguments, _outputs), lib=_library)
    torch.library.register_fake(f"llmdpd::{_name}_backward", _of_gradients, lib=_library)
    torch.library.register_autograd(f"llmdpd::{_name}", _autograd, setup_context=_setup, lib=_library)
    torch.library.register_autograd(f"llmdpd::{_name}_backward", _no_second_derivative, lib=_library)
