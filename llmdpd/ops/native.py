"""The compiled module: whether it is available, its threads, and every call of the operators' C++ functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.errors import InputError
from llmdpd.ops.arguments import ChainArguments, MlpArguments
from llmdpd.ops.compiling import constant_when_compiled
from llmdpd.utils.cores import usable_cores
from llmdpd.version import __version__

_threads: int | None = None


@lru_cache(maxsize=1)
def _load() -> ModuleType | str:
    """The compiled module, or why it can't be had and what would mend it."""
    mend = "install llmdpd with a C++17 compiler (GCC or Clang) at hand: pip install ."
    try:
        from llmdpd import _native
    except ImportError as error:
        return f"the C++ module can't be imported ({error}); {mend}"
    if _native.__version__ != __version__:
        return f"the C++ module is of version {_native.__version__}, llmdpd of {__version__}; {mend}"
    return _native


@constant_when_compiled
def available() -> tuple[bool, str | None]:
    """Whether the C++ code can run here, and if not, why and what would mend it."""
    module = _load()
    return (False, module) if isinstance(module, str) else (True, None)


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not there; the message is `available()`'s reason.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def threads() -> int:
    """Number of threads of one C++ call: what `set_threads` was given, else as many as torch uses."""
    return _threads if _threads is not None else torch.get_num_threads()


def set_threads(count: int | None) -> None:
    """Set the number of threads of the C++ code; None: as many as torch uses.

    The results do not depend on it. Unlike torch's, these threads do not wait for one of them that the system has not
    given a core: on a busy machine a call takes no longer than alone.
    """
    global _threads
    if count is not None and count < 1:
        raise InputError("at least one thread", field="threads", found=count, expected="1 or more")
    _threads = count


def use_threads(count: int) -> None:
    """Use `count` CPU threads (0: one for each core) in the C++ code from here on, and one in torch.

    torch's second thread would save little of these small operations, and on a busy machine it costs many times what
    they take: torch waits for its partner at each of them.
    """
    torch.set_num_threads(1)
    set_threads(count or usable_cores())


def array(tensor: Tensor, name: str = "tensor") -> NDArray[np.float32]:
    """The tensor's memory as a C-contiguous float32 array, without a copy where it is one.

    Raises:
        InputError: another dtype or device, or not dense.
    """
    if tensor.dtype is not torch.float32 or not tensor.is_cpu or tensor.layout is not torch.strided:
        found = f"{tensor.dtype} on {tensor.device}, {tensor.layout}"
        raise InputError("the C++ code computes in float32 on the CPU", field=name, found=found)
    dense = tensor.detach().contiguous()
    found_array: NDArray[np.float32] = (dense if aligned(dense) else dense.clone()).numpy()
    return found_array


def aligned(tensor: Tensor) -> bool:
    """Whether its numbers lie where numbers may: not so in a tensor made at an odd byte of a buffer."""
    return tensor.data_ptr() % tensor.element_size() == 0


def rows(tensor: Tensor) -> NDArray[np.float32]:
    """A matrix whose rows are contiguous, at any distance from each other: a slice of columns is not copied."""
    if (tensor.shape[1] > 1 and tensor.stride(1) != 1) or tensor.stride(0) < tensor.shape[1] or not aligned(tensor):
        return array(tensor)
    view: NDArray[np.float32] = tensor.detach().numpy()
    return view


def keys(seed: Tensor) -> NDArray[np.uint64]:
    """Noise keys int64 [1] or [B] as the C++ code takes them."""
    dense = seed.detach().contiguous()
    return (dense if aligned(dense) else dense.clone()).numpy().view(np.uint64)


def _chain(chain: ChainArguments) -> Any:
    state, W_s, u_z, tau, W_a, trunk, table, key, noise, *constants = chain
    first = (rows(state), rows(W_s), array(u_z), array(tau), rows(W_a), [array(part) for part in trunk])
    given = None if noise is None else array(noise).reshape(len(noise), -1, noise.shape[-1])
    return module().ChainArguments(*first, array(table), keys(key), given, *constants, threads())


def chain_forward(chain: ChainArguments, actions: Tensor, tape: Tensor) -> None:
    """Compute a_0 into actions [B, N, A]; into the tape, where it is not empty, what the backward pass reads."""
    module().chain_forward(_chain(chain), array(actions).reshape(-1, actions.shape[-1]), array(tape))


def chain_backward(
    chain: ChainArguments, grad: Tensor, tape: Tensor, gradients: Sequence[Tensor], need_state: bool
) -> None:
    """Compute the gradients of the first six arguments, the trunk last, from that of a_0 [B, N, A]."""
    state, *first, trunk = *(array(part) for part in gradients[:5]), [array(part) for part in gradients[5:]]
    rows_of_grad = array(grad).reshape(-1, grad.shape[-1])
    module().chain_backward(_chain(chain), rows_of_grad, array(tape), state if need_state else None, *first, trunk)


def mlp_arguments(mlp: MlpArguments) -> Any:
    """A call of the three-layer net as the C++ code takes it; it holds arrays of the tensors' memory."""
    trunk = [array(part) for part in mlp.trunk]
    return module().MlpArguments(rows(mlp.x), rows(mlp.input_weight), array(mlp.init), trunk, mlp.bf16, threads())


def mlps_forward(mlps: Sequence[MlpArguments], outs: Sequence[Tensor], tapes: Sequence[Tensor]) -> None:
    """Compute nets of the same sizes on as many rows into outs, [B, O] of each; the tapes as for the chain."""
    module().mlps_forward(list(map(mlp_arguments, mlps)), list(map(array, outs)), list(map(array, tapes)))


def mlps_backward(
    mlps: Sequence[MlpArguments],
    grads: Sequence[Tensor],
    tapes: Sequence[Tensor],
    x: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
) -> None:
    """Compute of each net the gradients of x and of input weight, init and trunk from that of its outputs [B, O].

    x: where they are wanted, one for each net. weights: of each net all of them or none.
    """
    written = [list(map(array, of)) for of in weights]
    given = (list(map(mlp_arguments, mlps)), list(map(array, grads)), list(map(array, tapes)))
    module().mlps_backward(*given, list(map(array, x)), written)


def _pooled(floats: int) -> Tensor:
    """Memory for what a layer keeps for its backward pass."""
    return torch.from_numpy(module().pooled_buffer(floats))


def _pairs(tensors: Sequence[Tensor]) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Weights and biases, which follow each other."""
    return [rows(weight) for weight in tensors[::2]], [array(bias) for bias in tensors[1::2]]


def linear_forward(x: Tensor, norm: Sequence[Tensor], layers: Sequence[Tensor], out: Sequence[Tensor]) -> Tensor:
    """Compute linear layers on x [R, I] into out, [R, O] of each; returns the tape."""
    tape = _pooled(module().linear_tape(len(x), x.shape[1], bool(norm)))
    results = [array(part) for part in out]
    module().linear_forward(array(x), list(map(array, norm)), *_pairs(layers), results, array(tape), threads())
    return tape


def linear_backward(
    x: Tensor,
    norm: Sequence[Tensor],
    layers: Sequence[Tensor],
    grads: Sequence[Tensor],
    tape: Tensor,
    d_x: Tensor | None,
    gradients: Sequence[Tensor],
) -> None:
    """Compute the gradient of x, where asked for, and those of the norm and the layers, which follow each other."""
    of_norm, (of_weights, of_biases) = gradients[: len(norm)], _pairs(gradients[len(norm) :])
    module().linear_backward(
        *(array(x), list(map(array, norm)), *_pairs(layers), list(map(array, grads)), array(tape)),
        *(None if d_x is None else array(d_x), list(map(array, of_norm)), of_weights, of_biases, threads()),
    )


def attention_forward(heads: int, inputs: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor) -> Tensor:
    """Compute an attention layer of hidden, key, value and bias into out; returns the tape."""
    (groups, count, width), steps = inputs[0].shape, inputs[1].shape[1]
    tape = _pooled(module().attention_tape(groups, count, steps, width, weights[8].shape[0], heads))
    given = [array(part) for part in inputs]
    module().attention_forward(*given, heads, _matrices(weights), array(out), array(tape), threads())
    return tape


def attention_backward(
    heads: int,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad: Tensor,
    tape: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """Compute the gradients of hidden, key and value, and of the twelve weights."""
    given, written = [array(part) for part in inputs], [array(part) for part in gradients]
    module().attention_backward(*given, heads, _matrices(weights), array(grad), array(tape), written, threads())


def retrieval_forward(sizes: tuple[int, int, int], inputs: Sequence[Tensor | None], out: Tensor) -> Tensor:
    """Compute the retrieval of waypoints into out; returns the tape."""
    query, key = inputs[0], inputs[1]
    assert query is not None
    assert key is not None
    tape = _pooled(module().retrieval_tape(query.shape[0] * query.shape[1], key.shape[1], sizes[0]))
    module().retrieval_forward(*map(_optional, inputs), *sizes, array(out), array(tape), threads())
    return tape


def retrieval_backward(
    sizes: tuple[int, int, int],
    inputs: Sequence[Tensor | None],
    out: Tensor,
    grad: Tensor,
    tape: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Compute the gradients of query and key, and of the similarity where there is one."""
    given, written = map(_optional, inputs), map(_optional, gradients)
    module().retrieval_backward(*given, *sizes, array(out), array(grad), array(tape), *written, threads())


def _optional(tensor: Tensor | None) -> NDArray[np.float32] | None:
    return None if tensor is None else array(tensor)


def _matrices(weights: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    return [rows(weight) if weight.ndim == 2 else array(weight) for weight in weights]
