"""The noise network in training: one node of autograd's graph from its time embedding to the predicted noise, or to
the actions of a reverse chain.

`llmdpd.diffusion.NoiseMLP` and `.reference` define them in PyTorch, which the tests hold these to. What depends on the
diffusion step alone is computed once a step, and what depends on the prompt alone once a prompt.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmdpd.ops import native, operators
from llmdpd.ops.arguments import SamplerCoefficients
from llmdpd.ops.nodes import Array, Computation, Weights, node

WEIGHTS = tuple(
    f"{module}.{kind}"
    for module in ("time_mlp.1", "time_mlp.3", *(f"layers.{number}" for number in range(4)))
    for kind in ("weight", "bias")
)
"""Names of the weights, as in the state of `NoiseMLP`."""


def predict_noise(
    actions: Tensor,
    timesteps: Tensor,
    state: Tensor,
    prompt: Tensor,
    frequencies: Tensor,
    weights: Weights,
    bf16: bool,
) -> Tensor:
    """The noise [B, A] in actions [B, A] at the diffusion steps int64 [B], none of which has a gradient.

    Args:
        actions, timesteps: see above. state: [B, S]. prompt: [P, Z], those of P equal groups of the states.
        frequencies: of the time embedding. weights: the `WEIGHTS`, in their order.
        bf16: whether the products of the hidden layers are in bfloat16.
    """
    levels, inverse = np.unique(timesteps.numpy(), return_inverse=True)
    place: NDArray[np.int64] = inverse.astype(np.int64)
    at_levels, noisy = waves(levels, frequencies), native.array(actions)

    def compute(arrays: list[Array]) -> tuple[Computation, list[Array]]:
        keep, threads = operators.TAPE_LIMIT // 4, native.threads()
        computation = native.module().prediction_node(
            noisy, at_levels, place, arrays, prompt.shape[-1] > 0, bf16, keep, threads
        )
        return computation, [np.empty(noisy.shape, np.float32)]

    return node(compute, _shown(state, prompt), weights)[0]


def sample_actions(
    state: Tensor,
    prompt: Tensor,
    coefficients: SamplerCoefficients,
    samples: int,
    key: Tensor,
    noise: Tensor | None,
    frequencies: Tensor,
    weights: Weights,
    bf16: bool,
) -> Tensor:
    """Actions a_0 [B, N, A] by the reverse chain.

    Args:
        state: [B, S], B from 1. prompt: [1, Z] or [B, Z]. coefficients: the sampler's. samples: N.
        key: of the counter-based noise, int64 [1] or [B]. noise: instead of it, [K + 1, B, N, A].
        frequencies, weights, bf16: as of `predict_noise`.
    """
    at_steps, table, need_state = waves(coefficients.timesteps, frequencies), coefficients.table(), state.requires_grad
    action_dim, prompted = len(weights[WEIGHTS[-1]]), prompt.shape[-1] > 0
    given = None if noise is None else native.array(noise).reshape(len(noise), -1, action_dim)
    chain = (at_steps, table, native.keys(key), given, coefficients.start, coefficients.bound, samples, action_dim)

    def compute(arrays: list[Array]) -> tuple[Computation, list[Array]]:
        keep, threads = operators.TAPE_LIMIT // 4, native.threads()
        computation = native.module().chain_node(*chain, arrays, prompted, need_state, bf16, keep, threads)
        return computation, [np.empty((len(state), samples, action_dim), np.float32)]

    return node(compute, _shown(state, prompt), weights)[0]


def waves(timesteps: NDArray[np.int64], frequencies: Tensor) -> NDArray[np.float32]:
    """Sines and cosines of the time embedding [K, T]."""
    angles = timesteps[:, None].astype(np.float32) * native.array(frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def _shown(state: Tensor, prompt: Tensor) -> tuple[Tensor, ...]:
    """What the network reads beside actions: no prompt where that has no number."""
    return (state, prompt) if prompt.shape[-1] else (state,)
