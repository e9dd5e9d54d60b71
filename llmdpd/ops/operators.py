"""The fused operations as PyTorch operators: `torch.ops.llmdpd.reverse_diffusion` and `.mish_mlp`.

Each has a fake implementation and a gradient, so that `torch.compile`, CUDA graphs and `torch.library.opcheck` work
with it. Registered through `torch.library.Library` itself: a call costs a third of what one of `custom_op`'s does.
C++ serves the CPU, Triton serves CUDA (the chain alone). Callers use `llmdpd.diffusion.reverse_diffusion` and
`mish_mlp`, which check what they are given.

Trunk, here and in C++: [W2, b2, W3, b3, W4, b4], what follows the first layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llmdpd.ops import native
from llmdpd.ops.compiling import constant_when_compiled

# Where a tape would be larger the backward pass computes the forward pass again, wave by wave, instead of reading it.
TAPE_LIMIT = 1 << 30  # bytes

_library = torch.library.Library("llmdpd", "DEF")
_CHAIN = (
    "Tensor state, Tensor state_weight, Tensor init, Tensor time_rows, Tensor action_weight, Tensor[] trunk, "
    "Tensor table, Tensor key, Tensor? noise, float start, float clip, int samples, bool bf16"
)
_MLP = "Tensor x, Tensor input_weight, Tensor init, Tensor[] trunk, bool bf16"
_library.define(f"reverse_diffusion({_CHAIN}, bool keep) -> (Tensor, Tensor)")
_library.define(f"reverse_diffusion_backward(Tensor grad, Tensor tape, {_CHAIN}, bool need_state) -> Tensor[]")
_library.define(f"mish_mlp({_MLP}, bool keep) -> (Tensor, Tensor)")
_library.define(f"mish_mlp_backward(Tensor grad, Tensor tape, {_MLP}, bool need_x, bool need_weights) -> Tensor[]")


@constant_when_compiled
def _tape_sizes(
    hidden: int, outputs: int, action_dim: int, samples: int, steps: int, bf16: bool
) -> tuple[int, int, int]:
    """Rows of a wave, floats a row, floats more a wave."""
    sizes: tuple[int, int, int] = tuple(native.module().tape_sizes(hidden, outputs, action_dim, samples, steps, bf16))
    return sizes


def tape_floats(rows: int, hidden: int, outputs: int, action_dim: int, samples: int, steps: int, bf16: bool) -> int:
    """Floats of the tape that C++ keeps for a backward pass, for `rows` (states times samples, or a symbol)."""
    wave_rows, row_floats, wave_floats = _tape_sizes(hidden, outputs, action_dim, samples, steps, bf16)
    waves = (rows + wave_rows - 1) // wave_rows
    return (rows + waves) * row_floats + waves * wave_floats


# The chain. Its fake implementations are also where its outputs are made.


def _chain_outputs(
    state: Tensor, time_rows: Tensor, action_weight: Tensor, samples: int, bf16: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    (hidden, action_dim), steps, batch = action_weight.shape, time_rows.shape[0], state.shape[0]
    actions = state.new_empty(batch, samples, action_dim, dtype=torch.float32)
    if not keep:
        return actions, state.new_empty(0, dtype=torch.float32)
    if state.device.type == "cuda":
        return actions, state.new_empty(steps + 1, batch, samples, action_dim, dtype=torch.float32)
    floats = tape_floats(batch * samples, hidden, action_dim, action_dim, samples, steps, bf16)
    return actions, _new_tape(state, floats)


def _new_tape(like: Tensor, floats: int) -> Tensor:
    """Memory for a tape; on the CPU from a pool, since the system takes pages of megabytes back when they are freed."""
    if isinstance(like, FakeTensor) or like.device.type == "meta":
        return like.new_empty(floats, dtype=torch.float32)
    return torch.from_numpy(native.module().pooled_buffer(floats))


@torch.library.register_fake("llmdpd::reverse_diffusion", lib=_library)
def _(
    state: Tensor,
    state_weight: Tensor,
    init: Tensor,
    time_rows: Tensor,
    action_weight: Tensor,
    trunk: Sequence[Tensor],
    table: Tensor,
    key: Tensor,
    noise: Tensor | None,
    start: float,
    clip: float,
    samples: int,
    bf16: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return _chain_outputs(state, time_rows, action_weight, samples, bf16, keep)


def _chain_gradients(inputs: Sequence[Any], need_state: bool) -> list[Tensor]:
    """Where the gradients go: state (empty where not needed), state weight, init, time rows, action weight, trunk."""
    state, *like, trunk = inputs
    like = [*like, *trunk]
    first = state.new_empty(state.shape if need_state else (0,))
    return [first, *(tensor.new_empty(tensor.shape) for tensor in like)]


@torch.library.register_fake("llmdpd::reverse_diffusion_backward", lib=_library)
def _(
    grad: Tensor,
    tape: Tensor,
    state: Tensor,
    state_weight: Tensor,
    init: Tensor,
    time_rows: Tensor,
    action_weight: Tensor,
    trunk: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    return _chain_gradients([state, state_weight, init, time_rows, action_weight, trunk], rest[-1])


def _chain_arguments(
    state: Tensor,
    state_weight: Tensor,
    init: Tensor,
    time_rows: Tensor,
    action_weight: Tensor,
    trunk: Sequence[Tensor],
    table: Tensor,
    key: Tensor,
    noise: Tensor | None,
    start: float,
    clip: float,
    samples: int,
    bf16: bool,
) -> Any:
    array = native.array
    return native.module().ChainArguments(
        [array(part) for part in trunk],
        native.rows(state_weight),
        native.rows(action_weight),
        array(init),
        array(time_rows),
        native.rows(state),
        array(table),
        start,
        clip,
        samples,
        native.keys(key),
        None if noise is None else array(noise).reshape(len(noise), -1, noise.shape[-1]),
        bf16,
        native.threads(),
    )


def chain_forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    *chain, keep = arguments
    state, time_rows, action_weight, samples, bf16 = chain[0], chain[3], chain[4], chain[11], chain[12]
    actions, tape = _chain_outputs(state, time_rows, action_weight, samples, bf16, keep)
    native.module().chain_forward(
        _chain_arguments(*chain), native.array(actions).reshape(-1, actions.shape[-1]), native.array(tape)
    )
    return actions, tape


def chain_backward_cpu(grad: Tensor, tape: Tensor, *arguments: Any) -> list[Tensor]:
    *chain, need_state = arguments
    gradients = _chain_gradients(chain[:6], need_state)
    state, state_weight, init, time_rows, action_weight, *trunk = [native.array(part) for part in gradients]
    native.module().chain_backward(
        _chain_arguments(*chain),
        native.array(grad).reshape(-1, grad.shape[-1]),
        native.array(tape),
        trunk,
        state_weight,
        state if need_state else None,
        init,
        action_weight,
        time_rows,
    )
    return gradients


@contextlib.contextmanager
def _on_device(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device; and no product may be rounded to tf32, or by autocast, behind our back."""
    from llmdpd.kernels.products import exact_float32

    device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with device, exact_float32(), torch.autocast(tensor.device.type, enabled=False):
        yield


def _context(state: Tensor, state_weight: Tensor, init: Tensor) -> Tensor:
    return F.linear(state, state_weight) + init


def chain_forward_cuda(
    state: Tensor,
    state_weight: Tensor,
    init: Tensor,
    time_rows: Tensor,
    action_weight: Tensor,
    trunk: Sequence[Tensor],
    table: Tensor,
    key: Tensor,
    noise: Tensor | None,
    start: float,
    clip: float,
    samples: int,
    bf16: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    from llmdpd.kernels import reverse_diffusion as triton

    with _on_device(state):
        context = _context(state, state_weight, init)
        actions, chain = triton.forward(
            context,
            time_rows,
            action_weight,
            *trunk,
            table,
            key,
            noise,
            start=start,
            clip=clip,
            samples=samples,
            bf16=bf16,
            keep=keep,
        )
    return actions, chain


def chain_backward_cuda(grad: Tensor, chain: Tensor, *arguments: Any) -> list[Tensor]:
    from llmdpd.kernels import reverse_diffusion as triton

    state, state_weight, init, time_rows, action_weight, trunk, table = arguments[:7]
    _, clip, samples, bf16, need_state = arguments[-5:]
    with _on_device(state):
        context = _context(state, state_weight, init)
        d_context, d_time_rows, d_action_weight, *d_trunk = triton.backward(
            grad, context, time_rows, action_weight, *trunk, table, chain, clip=clip, samples=samples, bf16=bf16
        )
        d_state = d_context @ state_weight if need_state else state.new_empty(0)
        d_state_weight = d_context.t() @ state
        d_init = d_context.sum(0) if init.ndim == 1 else d_context
    return [d_state, d_state_weight, d_init, d_time_rows, d_action_weight, *d_trunk]


def _chain_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    state, state_weight, init, time_rows, action_weight, trunk, table, key, noise = inputs[:9]
    ctx.constants = inputs[9:13]
    ctx.has_noise = noise is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the tape would get a gradient of megabytes of zeros
    noises = [noise] if noise is not None else []
    ctx.save_for_backward(output[1], state, state_weight, init, time_rows, action_weight, *trunk, table, key, *noises)


def _chain_autograd(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (*[None] * 5, [None] * 6, *[None] * 8)
    tape, state, state_weight, init, time_rows, action_weight, *rest = ctx.saved_tensors
    trunk, table, key, noise = rest[:6], rest[6], rest[7], rest[8] if ctx.has_noise else None
    gradients = torch.ops.llmdpd.reverse_diffusion_backward(
        grad,
        tape,
        state,
        state_weight,
        init,
        time_rows,
        action_weight,
        trunk,
        table,
        key,
        noise,
        *ctx.constants,
        ctx.needs_input_grad[0],
    )
    first = gradients[0] if ctx.needs_input_grad[0] else None
    return (first, *gradients[1:5], gradients[5:], *[None] * 8)


# The three-layer net.


def _mlp_outputs(x: Tensor, trunk: Sequence[Tensor], bf16: bool, keep: bool) -> tuple[Tensor, Tensor]:
    outputs, hidden = trunk[4].shape
    out = x.new_empty(x.shape[0], outputs)
    if not keep:
        return out, x.new_empty(0)
    return out, _new_tape(x, tape_floats(x.shape[0], hidden, outputs, 0, 1, 1, bf16))


@torch.library.register_fake("llmdpd::mish_mlp", lib=_library)
def _(
    x: Tensor, input_weight: Tensor, init: Tensor, trunk: Sequence[Tensor], bf16: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    return _mlp_outputs(x, trunk, bf16, keep)


def _mlp_gradients(
    x: Tensor, input_weight: Tensor, init: Tensor, trunk: Sequence[Tensor], need_x: bool, need_weights: bool
) -> list[Tensor]:
    """Where the gradients go, each empty where it is not needed: x; the weights (all or none of them)."""
    weights = (input_weight, init, *trunk)
    return [
        x.new_empty(x.shape if need_x else (0,)),
        *(tensor.new_empty(tensor.shape if need_weights else (0,)) for tensor in weights),
    ]


@torch.library.register_fake("llmdpd::mish_mlp_backward", lib=_library)
def _(
    grad: Tensor,
    tape: Tensor,
    x: Tensor,
    input_weight: Tensor,
    init: Tensor,
    trunk: Sequence[Tensor],
    bf16: bool,
    need_x: bool,
    need_weights: bool,
) -> list[Tensor]:
    return _mlp_gradients(x, input_weight, init, trunk, need_x, need_weights)


def _mlp_arguments(x: Tensor, input_weight: Tensor, init: Tensor, trunk: Sequence[Tensor], bf16: bool) -> Any:
    return native.module().MlpArguments(
        [native.array(part) for part in trunk],
        native.rows(input_weight),
        native.array(init),
        native.rows(x),
        bf16,
        native.threads(),
    )


def mlp_forward_cpu(
    x: Tensor, input_weight: Tensor, init: Tensor, trunk: Sequence[Tensor], bf16: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    out, tape = _mlp_outputs(x, trunk, bf16, keep)
    native.module().mlp_forward(
        _mlp_arguments(x, input_weight, init, trunk, bf16), native.array(out), native.array(tape)
    )
    return out, tape


def mlp_backward_cpu(
    grad: Tensor,
    tape: Tensor,
    x: Tensor,
    input_weight: Tensor,
    init: Tensor,
    trunk: Sequence[Tensor],
    bf16: bool,
    need_x: bool,
    need_weights: bool,
) -> list[Tensor]:
    gradients = _mlp_gradients(x, input_weight, init, trunk, need_x, need_weights)
    first, weight, bias, *rest = [native.array(part) for part in gradients]
    native.module().mlp_backward(
        _mlp_arguments(x, input_weight, init, trunk, bf16),
        native.array(grad),
        native.array(tape),
        rest if need_weights else [],
        weight,
        first if need_x else None,
        bias,
    )
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
    return (
        (first, *gradients[1:3], gradients[3:], None, None)
        if need_weights
        else (first, None, None, [None] * 6, None, None)
    )


_library.impl("reverse_diffusion", chain_forward_cpu, "CPU")
_library.impl("reverse_diffusion_backward", chain_backward_cpu, "CPU")
_library.impl("reverse_diffusion", chain_forward_cuda, "CUDA")
_library.impl("reverse_diffusion_backward", chain_backward_cuda, "CUDA")
_library.impl("mish_mlp", mlp_forward_cpu, "CPU")
_library.impl("mish_mlp_backward", mlp_backward_cpu, "CPU")
torch.library.register_autograd("llmdpd::reverse_diffusion", _chain_autograd, setup_context=_chain_setup, lib=_library)
torch.library.register_autograd("llmdpd::mish_mlp", _mlp_autograd, setup_context=_mlp_setup, lib=_library)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("the fused operators have no second derivative: use backend='reference', or float64 tensors")


for _name in ("reverse_diffusion_backward", "mish_mlp_backward"):
    torch.library.register_autograd(f"llmdpd::{_name}", _no_second_derivative, lib=_library)


def keeps_tape(floats: int) -> bool:
    """Whether a tape of that size is kept."""
    return 4 * floats <= TAPE_LIMIT


def bound(clip: float | None) -> float:
    """A plan's clip as the operators take it."""
    return math.inf if clip is None else clip
