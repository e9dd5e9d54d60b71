"""The C++ sampler: the reverse chain on the CPU in float32, forward only.

Everything is checked here before native code sees it. Weights are packed anew at each call, so a call always runs the
weights that the net has now.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from llmdpd.errors import InputError
from llmdpd.version import __version__

if TYPE_CHECKING:
    from llmdpd.diffusion.noise_mlp import NoiseMLP
    from llmdpd.diffusion.schedules import SamplerPlan

_MASK64 = (1 << 64) - 1
_MAX_ROWS = 1 << 32  # the row is one 32-bit word of the noise's counter


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


def available() -> tuple[bool, str | None]:
    """Whether the C++ sampler can run here, and if not, why and what would mend it."""
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


def forward(
    net: NoiseMLP,
    plan: SamplerPlan,
    state: Tensor,
    prompt: Tensor,
    *,
    samples: int = 1,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """Draw actions a_0 by the reverse chain (paper, equation 4), without gradient.

    Args:
        net: the noise network, float32 on the CPU.
        plan: the sampler's table.
        state: float32 [B, S], B from 0.
        prompt: float32 [Z] (one task) or [B, Z].
        samples: N actions a state.
        seed: key of the counter-based noise, with row = state * N + sample; or int64 [B], a key for each state, with
            row = sample.
        noise: instead of a seed, float32 [K + 1, B, A] (where N is 1) or [K + 1, B, N, A].
        threads: how many threads may work. The result does not depend on it.

    Returns:
        float32 [B, A] where N is 1, else [B, N, A].

    Raises:
        InputError: a shape, dtype or device that does not fit.
        RuntimeError: the C++ module is not there.
    """
    native = module()
    batch = _check_inputs(net, state, prompt, samples, threads)
    layers = cast("list[nn.Linear]", list(net.layers))
    weights = [_array(layer.weight, f"layers[{i}].weight") for i, layer in enumerate(layers)]
    biases = [_array(layer.bias, f"layers[{i}].bias") for i, layer in enumerate(layers)]
    with torch.no_grad():
        embedding = net.time_embedding(torch.tensor(plan.timesteps))
    table = np.stack([plan.p, plan.e, plan.A, plan.B, plan.C, plan.S], axis=1).astype(np.float32)
    draws = None if noise is None else _noise(noise, len(table), batch, samples, net.action_dim)
    keys = np.zeros(1, dtype=np.uint64) if noise is not None else _keys(seed, batch)
    actions = np.empty((batch * samples, net.action_dim), dtype=np.float32)
    native.reverse_diffusion(
        weights,
        biases,
        _array(embedding, "time embedding"),
        table,
        plan.start,
        math.inf if plan.clip is None else plan.clip,
        _array(state, "state"),
        _array(prompt, "prompt"),
        samples,
        keys,
        draws,
        actions,
        threads,
    )
    result = torch.from_numpy(actions)
    return result if samples == 1 else result.view(batch, samples, net.action_dim)


def _array(tensor: Tensor, name: str) -> np.ndarray:
    """The tensor's memory as a C-contiguous float32 array, without a copy where it is one."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device}"
        raise InputError("the C++ sampler computes in float32 on the CPU", field=name, found=found)
    return tensor.detach().contiguous().numpy()


def _require_shape(tensor: Tensor, name: str, *allowed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise InputError("wrong shape", field=name, found=list(tensor.shape), expected=expected)


def _check_inputs(net: NoiseMLP, state: Tensor, prompt: Tensor, samples: int, threads: int) -> int:
    """Raise `InputError` for what does not fit the net; the batch size where all fits."""
    if samples < 1:
        raise InputError("at least one action a state", field="samples", found=samples, expected="1 or more")
    if threads < 1:
        raise InputError("at least one thread", field="threads", found=threads, expected="1 or more")
    if state.ndim != 2:
        raise InputError("wrong shape", field="state", found=list(state.shape), expected=f"[B, {net.state_dim}]")
    batch = state.shape[0]
    _require_shape(state, "state", (batch, net.state_dim))
    _require_shape(prompt, "prompt", (net.prompt_dim,), (batch, net.prompt_dim))
    if batch * samples > _MAX_ROWS:
        raise InputError("too many rows for one call", field="state", found=batch * samples, expected=f"<= {_MAX_ROWS}")
    return batch


def _noise(noise: Tensor, steps: int, batch: int, samples: int, action_dim: int) -> np.ndarray:
    """Given noise as [K + 1, B * N, A]."""
    full = (steps + 1, batch, samples, action_dim)
    short = (steps + 1, batch, action_dim)
    _require_shape(noise, "noise", *((short, full) if samples == 1 else (full,)))
    return _array(noise, "noise").reshape(steps + 1, batch * samples, action_dim)


def _keys(seed: int | Tensor | None, batch: int) -> np.ndarray:
    """Noise keys, uint64: [1] for one seed, [B] for a seed a state."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.device.type != "cpu":
            found = f"{seed.dtype} on {seed.device}"
            raise InputError("wrong kind of seeds", field="seed", found=found, expected="an int, or int64 on the CPU")
        _require_shape(seed, "seed", (batch,))
        return seed.contiguous().numpy().view(np.uint64)
    if seed is None:
        raise InputError("the sampler needs a seed or noise", field="seed", found=None, expected="an int or int64 [B]")
    return np.array([seed & _MASK64], dtype=np.uint64)
